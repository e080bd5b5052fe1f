"""Expands a step's segments, all at once, into the flat tensors that the model and the settle operations read."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.segment import Pattern, Settle
from engine.state import Tables
from engine.step import BLOCK, LENGTH, LORA, PATTERN, RESTART, ROW, SETTLE, Step


@dataclass(frozen=True, slots=True)
class Batch:
    """S segments, T query tokens."""

    segments: Tensor  # [S, 9] the step's segments, on the device
    thresholds: Tensor  # [S]
    lengths: list[int]  # [S] query tokens of each segment, known to the host
    kinds: dict[Settle, slice]  # which segments end in which settle operation
    row: Tensor  # [S] row of the device tables
    block: Tensor  # [S] tokens of the block, mask groups excluded
    first: Tensor  # [S] index of the segment's first query token
    context: Tensor  # [S] tokens with causal KV before the segment
    bidirectional: Tensor  # [S] bool: the canvas still has masks
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T] where the token's KV goes
    upto: Tensor  # [T] keys of the own segment before this one are visible,
    lo: Tensor | None  # [T] and so are those from lo to hi
    hi: Tensor | None  # [T]
    lora: Tensor | None  # [T, 1] 1.0 where the draft adapter is on; None if nowhere
    pages: Tensor  # [S, columns]


def expand(step: Step, tables: Tables, page_size: int, dtype: torch.dtype) -> Batch:
    """Reads the device tables, after their update by the step. Voids canvases first where a segment asks for it."""
    device = tables.cached.device
    segments = torch.from_numpy(step.segments).to(device)
    row, block, pattern = segments[:, ROW], segments[:, BLOCK], segments[:, PATTERN]
    if step.segments[:, RESTART].any():
        _void_canvases(tables, row[segments[:, RESTART] != 0])
    context = tables.cached[row]
    # what the host knows of each token: its segment, its index inside, the segment's row and block
    length = step.segments[:, LENGTH]
    starts = length.cumsum() - length
    owners = np.repeat(np.arange(len(length)), length)
    known = np.stack(
        (
            owners,
            np.arange(len(owners)) - starts[owners],
            step.segments[owners, ROW],
            step.segments[owners, BLOCK],
        )
    )
    owner, offset, token_row, token_block = torch.from_numpy(known).to(device).unbind(0)
    slot = context[owner] + offset
    page = tables.pages[token_row, slot // page_size]
    token_ids = tables.tokens[token_row, slot]
    positions, upto, lo, hi, lora = slot, offset + 1, None, None, None
    bidirectional = torch.zeros_like(row, dtype=torch.bool)
    patterns = set(step.segments[:, PATTERN].tolist())
    if Pattern.CANVAS in patterns:
        masks = torch.zeros_like(row).index_add_(0, owner, (token_ids == tables.mask_id).long())
        bidirectional = (pattern == Pattern.CANVAS) & (masks > 0)
        upto = torch.where(bidirectional[owner], token_block, upto)
    if Pattern.QUADRATIC in patterns:
        grouped = (pattern[owner] == Pattern.QUADRATIC) & (offset >= token_block)
        group, inside = (offset - token_block) // token_block, offset % token_block
        token_ids = token_ids.masked_fill(grouped, tables.mask_id)
        positions = torch.where(grouped, context[owner] + group + 1 + inside, positions)
        upto = torch.where(grouped, group + 1, upto)
        lo = torch.where(grouped, token_block * (group + 1), 0)
        hi = torch.where(grouped, token_block * (group + 2), 0)
    if step.segments[:, LORA].any():
        lora = segments[:, LORA][owner, None].to(dtype)
    return Batch(
        segments=segments,
        thresholds=torch.from_numpy(step.thresholds).to(device),
        lengths=length.tolist(),
        kinds=_kinds(step),
        row=row,
        block=block,
        first=torch.from_numpy(starts).to(device),
        context=context,
        bidirectional=bidirectional,
        token_ids=token_ids,
        positions=positions,
        slots=page * page_size + slot % page_size,
        upto=upto,
        lo=lo,
        hi=hi,
        lora=lora,
        pages=tables.pages[row],
    )


def _void_canvases(tables: Tables, row: Tensor) -> None:
    column = torch.arange(tables.tokens.shape[1], device=row.device)
    stale = column > tables.cached[row, None]
    tables.tokens[row] = tables.tokens[row].masked_fill(stale, tables.mask_id)
    tables.passes[row] = 0


def _kinds(step: Step) -> dict[Settle, slice]:
    settles: list[int] = step.segments[:, SETTLE].tolist()
    kinds: dict[Settle, slice] = {}
    start = 0
    for settle in Settle:
        count = settles.count(settle)
        if count:
            kinds[settle] = slice(start, start + count)
        start += count
    return kinds
