"""The device tables: one row per running sequence, read and written by every step without the host."""

import torch
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


class Tables:
    """State of `rows` sequences of at most `length` tokens, slack included.

    tokens: [rows, length] int64: prompt, answer, then the canvas or the drafts, then mask tokens. cached: [rows]
    tokens with causal KV, so tokens[row, cached] is the seed token at a seam. passes: [rows] denoise passes of the
    open canvas. pages: [rows, columns] KV page ids. The rest are sampling parameters, one per row.
    """

    def __init__(
        self, rows: int, length: int, columns: int, canvas: int, mask_id: int, device: torch.device
    ) -> None:
        """canvas: the longest block of any mode, its seed token included. columns: of the page table."""
        self.mask_id, self.canvas = mask_id, canvas
        self.tokens = torch.full((rows, length), mask_id, device=device)
        self.cached = torch.zeros(rows, dtype=torch.int64, device=device)
        self.passes = torch.zeros(rows, dtype=torch.int64, device=device)
        self.pages = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(rows, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top_p = torch.ones(rows, device=device)
        self.min_p = torch.zeros(rows, device=device)

    def update(self, step: Step) -> None:
        """Fills the rows of sequences that start and enters newly granted pages."""
        if len(step.rows):
            self._start(step)
        if len(step.grants):
            row, column, page = torch.from_numpy(step.grants).to(self.cached.device).unbind(1)
            self.pages[row, column] = page

    def void_canvases(self, row: Tensor) -> None:
        """Turns what stands after the seed tokens of the rows [R] back into masks."""
        behind = self.cached[row, None] + torch.arange(1, self.canvas, device=row.device)
        self.tokens[row[:, None], behind] = self.mask_id
        self.passes[row] = 0

    def _start(self, step: Step) -> None:
        device = self.cached.device
        rows, sampling = (
            torch.from_numpy(step.rows).to(device),
            torch.from_numpy(step.sampling).to(device).float(),
        )
        row = rows[:, ROW_ID]
        self.tokens[row] = self.mask_id
        length = rows[:, ROW_TOKENS]
        owner = torch.repeat_interleave(row, length)
        column = torch.arange(len(step.tokens), device=device) - torch.repeat_interleave(
            length.cumsum(0) - length, length
        )
        self.tokens[owner, column] = torch.from_numpy(step.tokens).to(device)
        self.cached[row] = rows[:, ROW_CACHED]
        self.passes[row] = 0
        self.seed[row] = rows[:, ROW_SEED]
        self.top_k[row] = rows[:, ROW_TOP_K]
        self.temperature[row] = sampling[:, TEMPERATURE]
        self.top_p[row] = sampling[:, TOP_P]
        self.min_p[row] = sampling[:, MIN_P]
