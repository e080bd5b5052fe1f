"""Expands a step's segments, all at once, into the flat tensors that the model and the settle operations read.

What follows from the segments alone is a layout, kept and used again, since steps repeat; what depends on the device
tables is read anew.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.segment import Pattern, Settle
from engine.state import Tables
from engine.step import BLOCK, COLUMNS, COMMITS, LENGTH, LORA, PATTERN, RESTART, ROW, SETTLE, STEPS, Step


@dataclass(frozen=True, slots=True)
class Part:
    """The P segments of a step that one settle operation ends."""

    span: slice  # where they are among the step's segments
    width: int  # of the longest block
    row: Tensor  # [P] row of the device tables
    block: Tensor  # [P] tokens of the block, mask groups excluded
    first: Tensor  # [P] index of the segment's first query token
    threshold: Tensor  # [P]
    steps: Tensor  # [P]
    commits: bool  # whether any may commit a token
    quadratic: Tensor | None  # indices of the quadratic ones; None if there are none


@dataclass(frozen=True, slots=True)
class Layout:
    """What the segments say of a step: S segments, T query tokens."""

    parts: dict[Settle, Part]
    lengths: list[int]  # [S] query tokens of each segment, known to the host
    patterns: frozenset[int]
    row: Tensor  # [S] row of the device tables
    pattern: Tensor  # [S]
    restarts: Tensor | None  # rows whose canvases are void; None if there are none
    owner: Tensor  # [T] segment of the token
    offset: Tensor  # [T] index of the token in its segment
    token_row: Tensor  # [T] row of the device tables
    token_block: Tensor  # [T] block of the token's segment
    lora: Tensor | None  # [T, 1] 1.0 where the draft adapter is on; None if nowhere


@dataclass(frozen=True, slots=True)
class Batch:
    """A layout and what the device tables add to it."""

    layout: Layout
    context: Tensor  # [S] tokens with causal KV before the segment
    open: Tensor  # [S] bool: a canvas that still has masks, whose tokens see each other
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T] where the token's KV goes
    upto: Tensor  # [T] keys of the own segment before this one are visible,
    lo: Tensor | None  # [T] and so are those from lo to hi
    hi: Tensor | None  # [T]
    pages: Tensor  # [S, columns]


def expand(step: Step, tables: Tables, page_size: int, dtype: torch.dtype) -> Batch:
    """Reads the device tables, after their update by the step. Voids canvases first where a segment asks for it."""
    layout = _layout(step.segments.tobytes(), step.thresholds.tobytes(), tables.cached.device, dtype)
    if layout.restarts is not None:
        tables.void_canvases(layout.restarts)
    owner, offset, block = layout.owner, layout.offset, layout.token_block
    context = tables.cached[layout.row]
    slot = context[owner] + offset
    page = tables.pages[layout.token_row, slot // page_size]
    token_ids = tables.tokens[layout.token_row, slot]
    positions, upto, lo, hi = slot, offset + 1, None, None
    open_ = torch.zeros_like(layout.row, dtype=torch.bool)
    if Pattern.CANVAS in layout.patterns:
        masks = torch.zeros_like(layout.row).index_add_(0, owner, (token_ids == tables.mask_id).long())
        open_ = (layout.pattern == Pattern.CANVAS) & (masks > 0)
        upto = torch.where(open_[owner], block, upto)
    if Pattern.QUADRATIC in layout.patterns:
        grouped = (layout.pattern[owner] == Pattern.QUADRATIC) & (offset >= block)
        group, inside = (offset - block) // block, offset % block
        token_ids = token_ids.masked_fill(grouped, tables.mask_id)
        positions = torch.where(grouped, context[owner] + group + 1 + inside, positions)
        upto = torch.where(grouped, group + 1, upto)
        lo = torch.where(grouped, block * (group + 1), 0)
        hi = torch.where(grouped, block * (group + 2), 0)
    return Batch(
        layout=layout,
        context=context,
        open=open_,
        token_ids=token_ids,
        positions=positions,
        slots=page * page_size + slot % page_size,
        upto=upto,
        lo=lo,
        hi=hi,
        pages=tables.pages[layout.row],
    )


@lru_cache(maxsize=256)
def _layout(packed: bytes, packed_thresholds: bytes, device: torch.device, dtype: torch.dtype) -> Layout:
    """packed: Step.segments, packed_thresholds: Step.thresholds, as bytes."""
    segments = np.frombuffer(packed, np.int64).reshape(-1, COLUMNS)
    on_device = torch.tensor(segments, device=device)
    thresholds = torch.tensor(np.frombuffer(packed_thresholds), device=device)
    length = segments[:, LENGTH]
    first = torch.tensor(length.cumsum() - length, device=device)
    owner = torch.tensor(np.repeat(np.arange(len(length)), length), device=device)
    restarts = segments[:, RESTART] != 0
    parts: dict[Settle, Part] = {}
    for settle in Settle:
        members = np.flatnonzero(segments[:, SETTLE] == settle)
        if not len(members):
            continue
        span = slice(int(members[0]), int(members[-1]) + 1)
        assert len(members) == span.stop - span.start, (
            "a step's segments stand in the order of their settle operations"
        )
        quadratic = np.flatnonzero(segments[span, PATTERN] == Pattern.QUADRATIC)
        parts[settle] = Part(
            span=span,
            width=int(segments[span, BLOCK].max()),
            row=on_device[span, ROW].contiguous(),
            block=on_device[span, BLOCK].contiguous(),
            first=first[span],
            threshold=thresholds[span],
            steps=on_device[span, STEPS].contiguous(),
            commits=bool(segments[span, COMMITS].any()),
            quadratic=torch.tensor(quadratic, device=device) if len(quadratic) else None,
        )
    return Layout(
        parts=parts,
        lengths=length.tolist(),
        patterns=frozenset(segments[:, PATTERN].tolist()),
        row=on_device[:, ROW].contiguous(),
        pattern=on_device[:, PATTERN].contiguous(),
        restarts=torch.tensor(segments[restarts, ROW], device=device) if restarts.any() else None,
        owner=owner,
        offset=torch.arange(len(owner), device=device) - first[owner],
        token_row=on_device[owner, ROW],
        token_block=on_device[owner, BLOCK],
        lora=on_device[owner, LORA, None].to(dtype) if segments[:, LORA].any() else None,
    )
