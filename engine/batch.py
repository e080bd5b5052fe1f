"""Lays a step's segments out for the device: the one copy that a step sends there.

On a CPU, what follows from the segments alone is kept and used again, since steps repeat. On a GPU a layout may be
filled up to a fixed number of query tokens, so that one captured graph serves all steps of up to that size.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.segment import Pattern, Settle
from engine.state import to_device
from engine.step import (
    AHEAD,
    BLOCK,
    COLUMNS,
    COMMITS,
    LENGTH,
    LORA,
    PATTERN,
    RESTART,
    ROW,
    SETTLE,
    STEPS,
    Step,
)
from kernels.expand import Known, Segments
from kernels.settle import Part

# rows of a packed layout; the fields of Segments in their order
FIELDS = len(Segments._fields)
_PACKED = (ROW, LENGTH, BLOCK, PATTERN, SETTLE, COMMITS, STEPS, LORA, RESTART, AHEAD)


@dataclass(frozen=True, slots=True)
class Layout:
    """S segments and T query tokens on the device."""

    segments: Segments
    query_tokens: int
    rows: Tensor | None  # [R] query tokens whose logits are read; None: all
    lora: bool  # whether the draft adapter is on anywhere
    known: Known | None  # for the torch side
    parts: list[Part] | None  # for the torch side


def packed_layout(step: Step, count: int) -> NDArray[np.int64]:
    """The step's segments as [FIELDS, count] int64, thresholds as the bits of float64. Columns beyond the segments
    describe segments of no length; with always as many, no step is the first of its shape."""
    segments = step.segments
    packed = np.zeros((FIELDS, count), np.int64)
    here = packed[:, : len(segments)]
    here[: len(_PACKED)] = segments[:, _PACKED].T
    here[-3] = segments[:, LENGTH].cumsum() - segments[:, LENGTH]
    here[-2], here[-1] = _logit(segments), step.thresholds.view(np.int64)
    return packed


def padded_layout(step: Step, size: int, count: int, scratch_row: int) -> NDArray[np.int64]:
    """The same, filled up to `size` query tokens by tokens of the scratch row, where all tokens have a row of the
    logits. `count` must be above the number of segments if tokens are lacking."""
    packed = packed_layout(step, count)
    number, taken = len(step.segments), int(step.segments[:, LENGTH].sum())
    if taken < size:
        packed[: len(_PACKED), number] = (
            scratch_row,
            size - taken,
            1,
            Pattern.PAD,
            Settle.NOTHING,
            0,
            0,
            0,
            0,
            0,
        )
    packed[-3] = packed[-2] = packed[1].cumsum() - packed[1]
    return packed


def unpack_layout(packed: Tensor, size: int, rows: Tensor | None, lora: bool) -> Layout:
    """The layout in a packed tensor on the device, for the Triton side."""
    return Layout(
        Segments._make((*packed[:-1], packed[-1].view(torch.float64))), size, rows, lora, None, None
    )


def layout(step: Step, count: int, device: torch.device, dtype: torch.dtype) -> Layout:
    """The step as it is, with rows of the logits for those tokens only that need them. count: of segments, at most."""
    if device.type == "cpu":
        return known_layout(step, device, dtype)
    segments = step.segments
    size, rows = int(segments[:, LENGTH].sum()), to_device(_rows(segments), device)
    return unpack_layout(
        to_device(packed_layout(step, count), device), size, rows, bool(segments[:, LORA].any())
    )


def known_layout(step: Step, device: torch.device, dtype: torch.dtype) -> Layout:
    """As `layout`, with all that the torch side needs, on any device."""
    return _layout(step.segments.tobytes(), step.thresholds.tobytes(), device, dtype)


def _wanted(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of its last query tokens each segment needs logits of: a canvas all but the seed token's."""
    settle, length = segments[:, SETTLE], segments[:, LENGTH]
    return np.select(
        [settle == Settle.KEEP, settle == Settle.SAMPLE, settle == Settle.DENOISE], [0, 1, length - 1], length
    )


def _logit(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the logits of each segment's first query token would be, were there rows for it."""
    wanted = _wanted(segments)
    return np.asarray(wanted.cumsum() - segments[:, LENGTH])


def _rows(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """The query tokens whose logits are read."""
    length = segments[:, LENGTH]
    owner = np.repeat(np.arange(len(length)), length)
    offset = np.arange(len(owner)) - (length.cumsum() - length)[owner]
    return np.flatnonzero(offset >= (length - _wanted(segments))[owner])


@lru_cache(maxsize=256)
def _layout(packed: bytes, packed_thresholds: bytes, device: torch.device, dtype: torch.dtype) -> Layout:
    """packed: Step.segments, packed_thresholds: Step.thresholds, as bytes."""
    segments = np.frombuffer(packed, np.int64).reshape(-1, COLUMNS)
    thresholds = torch.tensor(np.frombuffer(packed_thresholds), device=device)
    length, block, settle = segments[:, LENGTH], segments[:, BLOCK], segments[:, SETTLE]
    first, logit = length.cumsum() - length, _logit(segments)
    owner = np.repeat(np.arange(len(length)), length)
    offset = np.arange(len(owner)) - first[owner]
    rows = _rows(segments)
    columns = torch.tensor(np.column_stack((segments[:, _PACKED], first, logit)).T.copy(), device=device)
    described = Segments._make((*columns, thresholds))
    restarts = segments[:, RESTART] != 0
    gate = segments[owner, LORA, None]
    known = Known(
        lengths=length.tolist(),
        patterns=frozenset(segments[:, PATTERN].tolist()),
        restarts=torch.tensor(segments[restarts][:, (ROW, AHEAD)].T.copy(), device=device)
        if restarts.any()
        else None,
        ahead=bool(segments[:, AHEAD].any()),
        owner=torch.tensor(owner, device=device),
        offset=torch.tensor(offset, device=device),
        row=torch.tensor(segments[owner, ROW], device=device),
        block=torch.tensor(block[owner], device=device),
        gate=torch.tensor(gate, device=device, dtype=dtype) if gate.any() else None,
    )
    return Layout(
        described,
        len(owner),
        None if len(rows) == len(owner) else torch.tensor(rows, device=device),
        bool(gate.any()),
        known,
        [
            _part(segments, described, logit, members)
            for kind in Settle
            for commits in (False, True)
            if (members := (settle == kind) & ((segments[:, COMMITS] > 0) == commits)).any()
        ],
    )


def _part(
    segments: NDArray[np.int64], described: Segments, logit: NDArray[np.int64], members: NDArray[np.bool_]
) -> Part:
    """members: [S], whether each segment belongs to the part."""
    first = int(members.argmax())
    span, settle = slice(first, first + int(members.sum())), Settle(segments[first, SETTLE])
    assert members[span].all(), "segments stand in the order of their settle operations"
    block = segments[span, BLOCK, None]
    column = np.arange(1 if settle in (Settle.KEEP, Settle.SAMPLE) else int(block.max()))
    place = block - 1 if settle is Settle.SAMPLE else np.minimum(column, block - 1)
    quadratic = np.flatnonzero(segments[span, PATTERN] == Pattern.QUADRATIC)
    device = described.row.device
    return Part(
        settle=settle,
        span=span,
        row=described.row[span].contiguous(),
        block=described.block[span].contiguous(),
        logits=torch.tensor(logit[span, None] + place, device=device),
        inside=torch.tensor(column < block, device=device),
        threshold=described.threshold[span],
        steps=described.steps[span].contiguous(),
        commits=bool(segments[first, COMMITS]),
        quadratic=torch.tensor(quadratic, device=device) if len(quadratic) else None,
    )
