"""The device tables: one row per running sequence, read and written by every step without the host."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.step import (
    MIN_P,
    ROW_CACHED,
    ROW_ID,
    ROW_SEED,
    ROW_TOKENS,
    ROW_TOP_K,
    TEMPERATURE,
    TOP_P,
    Step,
)
from kernels.sampling import Sampling


class Tables:
    """State of `rows` sequences of at most `length` tokens, slack included, and of one row more, for padding.

    tokens: [rows + 1, length] int64: prompt, answer, then the canvas or the drafts, then mask tokens.
    cached: [rows + 1] tokens with causal KV, so tokens[row, cached] is the seed token at a seam. passes: [rows + 1]
    denoise passes of the open canvas. pages: [rows + 1, columns + 1] KV page ids; the last column is spare, so that a
    kernel may look one page ahead. sampling: parameters, one per row.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        columns: int,
        canvas: int,
        mask_id: int,
        scratch_page: int,
        device: torch.device,
    ) -> None:
        """canvas: the longest block of any mode, its seed token included. columns: of the page table. scratch_page:
        where padding writes."""
        self.mask_id, self.canvas, self.scratch_row, self.device = mask_id, canvas, rows, device
        self.tokens = torch.full((rows + 1, length), mask_id, device=device)
        self.cached = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.passes = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.pages = torch.zeros(rows + 1, columns + 1, dtype=torch.int64, device=device)
        self.pages[rows] = scratch_page
        self.sampling = Sampling(
            temperature=torch.zeros(rows + 1, device=device),
            top_k=torch.zeros(rows + 1, dtype=torch.int64, device=device),
            top_p=torch.ones(rows + 1, device=device),
            min_p=torch.zeros(rows + 1, device=device),
            seed=torch.zeros(rows + 1, dtype=torch.int64, device=device),
        )

    def update(self, step: Step) -> None:
        """Fills the rows of sequences that start, writes the host's tokens and enters newly granted pages."""
        if len(step.rows):
            self._start(step)
        if len(step.edits):
            row, column, token = to_device(step.edits.T, self.device)
            self.tokens[row, column] = token
        if len(step.grants):
            row, column, page = to_device(step.grants.T, self.device)
            self.pages[row, column] = page

    def _start(self, step: Step) -> None:
        rows = to_device(step.rows.T, self.device)
        sampling = to_device(step.sampling.T, self.device).float()
        row = rows[ROW_ID]
        length = step.rows[:, ROW_TOKENS]
        place = np.stack(
            (
                np.repeat(step.rows[:, ROW_ID], length),
                np.arange(len(step.tokens)) - np.repeat(length.cumsum() - length, length),
                step.tokens,
            )
        )
        owner, column, token = to_device(place, self.device)
        # filled, not assigned: a number that is assigned goes to a GPU by way of a copy that waits
        self.tokens.index_fill_(0, row, self.mask_id)
        self.tokens[owner, column] = token
        self.cached[row] = rows[ROW_CACHED]
        self.passes.index_fill_(0, row, 0)
        self.sampling.seed[row] = rows[ROW_SEED]
        self.sampling.top_k[row] = rows[ROW_TOP_K]
        self.sampling.temperature[row] = sampling[TEMPERATURE]
        self.sampling.top_p[row] = sampling[TOP_P]
        self.sampling.min_p[row] = sampling[MIN_P]


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
