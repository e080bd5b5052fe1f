"""A step's segments, expanded at once into what the model reads of every query token.

A segment is `block` tokens of a row of the device tables, from its first uncached one, or from `ahead` tokens behind it
where an earlier segment of the step runs those causally; a quadratic one has also `block` groups of `block` masks.
Query token i of a segment writes its key and value to slot `context + i`. It sees the whole context and, inside its
segment, key j iff `j < upto` or `lo <= j < hi`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton

# patterns: who sees whom; a canvas without masks is causal. PAD tokens fill a batch up and touch nothing that counts.
CAUSAL, CANVAS, QUADRATIC, PAD = range(4)


class Segments(NamedTuple):
    """What a step asks: one value a segment, [S] int64 each, `threshold` float64. A row of length 0 asks nothing."""

    row: Tensor  # of the device tables
    length: Tensor  # query tokens
    block: Tensor
    pattern: Tensor
    settle: Tensor
    commits: Tensor  # the most tokens it can commit
    steps: Tensor
    lora: Tensor  # 1: with the draft adapter
    restart: Tensor  # 1: void what stands behind the seed token first
    ahead: Tensor  # uncached tokens of the row that an earlier segment of this step keeps
    first: Tensor  # query token it begins at
    logit: Tensor  # row of the logits of its first query token, were there one
    threshold: Tensor


class Known(NamedTuple):
    """What the host knows of a step, by which the torch side leaves work out."""

    lengths: list[int]  # [S]
    patterns: frozenset[int]
    restarts: Tensor | None  # [2, N] rows that restart, and tokens ahead; None if there are none
    ahead: bool  # whether any segment has tokens ahead
    owner: Tensor  # [T] segment of the token
    offset: Tensor  # [T] index of the token in its segment
    row: Tensor  # [T] row of the device tables
    block: Tensor  # [T] block of the token's segment
    gate: Tensor | None  # [T, 1] of the adapter; None if it is off everywhere


class Expanded(NamedTuple):
    """What a step reads of S segments and T query tokens."""

    context: Tensor  # [S] tokens with causal KV before the segment
    open: Tensor  # [S] bool: tokens see later ones; of a canvas, that it has masks left
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T] where the token's KV goes
    upto: Tensor  # [T]
    lo: Tensor | None  # [T]; None where no token uses it
    hi: Tensor | None  # [T]
    row: Tensor  # [T] row of the device tables
    target: Tensor  # [T] the absolute position that the token's logits speak of
    gate: Tensor | None  # [T, 1] 1 where the draft adapter is on; None where it is off everywhere


def expand(
    segments: Segments,
    known: Known | None,
    query_tokens: int,
    tokens: Tensor,
    cached: Tensor,
    passes: Tensor,
    pages: Tensor,
    page_size: int,
    mask_id: int,
    canvas: int,
    gate: torch.dtype | None,
) -> Expanded:
    """Expands S segments; first voids what stands behind the seed token where a segment restarts.

    known: of the same step; the Triton side needs none. query_tokens: T. tokens: [rows, length] int64, cached, passes:
    [rows] int64 and pages: [rows, columns] int64 are the device tables. canvas: tokens that a restart voids at most,
    the seed token included. gate: the dtype of the adapter's gate, None if it is off.
    """
    if not on_triton(tokens):
        assert known is not None
        return expand_reference(
            segments, known, query_tokens, tokens, cached, passes, pages, page_size, mask_id, canvas, gate
        )
    count, device = len(segments.row), tokens.device
    of_segments = torch.empty(count, dtype=torch.int64, device=device)
    is_open = torch.empty(count, dtype=torch.bool, device=device)
    of_tokens = torch.empty(8, query_tokens, dtype=torch.int64, device=device)
    gates = torch.empty(query_tokens, 1, dtype=gate or torch.float32, device=device)
    launch(
        _expand_kernel,
        (count,),
        segments.row,
        segments.length,
        segments.block,
        segments.pattern,
        segments.lora,
        segments.restart,
        segments.ahead,
        segments.first,
        tokens,
        cached,
        passes,
        pages,
        of_segments,
        is_open,
        of_tokens,
        gates,
        tokens.stride(0),
        pages.stride(0),
        query_tokens,
        mask_id,
        num_warps=4,
        PAGE=page_size,
        CANVAS_LENGTH=canvas,
        WIDTH=triton.next_power_of_2(canvas),
        CHUNK=128,
    )
    token_ids, positions, slots, upto, lo, hi, row, target = of_tokens
    return Expanded(
        of_segments,
        is_open,
        token_ids,
        positions,
        slots,
        upto,
        lo,
        hi,
        row,
        target,
        None if gate is None else gates,
    )


def expand_reference(
    segments: Segments,
    known: Known | None,
    query_tokens: int,
    tokens: Tensor,
    cached: Tensor,
    passes: Tensor,
    pages: Tensor,
    page_size: int,
    mask_id: int,
    canvas: int,
    gate: torch.dtype | None,
) -> Expanded:
    """As `expand`, in torch."""
    assert known is not None
    if known.restarts is not None:
        row, ahead = known.restarts
        behind = (cached[row] + ahead)[:, None] + torch.arange(1, canvas, device=tokens.device)
        tokens[row[:, None], behind] = mask_id
        passes[row] = 0
    owner, offset, block = known.owner, known.offset, known.block
    context = cached[segments.row]
    if known.ahead:
        context = context + segments.ahead
    slot = context[owner] + offset
    page = pages[known.row, slot // page_size]
    token_ids = tokens[known.row, slot]
    positions, upto, lo, hi = slot, offset + 1, None, None
    open_ = torch.zeros_like(segments.row, dtype=torch.bool)
    target = slot + 1
    if CANVAS in known.patterns:
        masks = torch.zeros_like(segments.row).index_add_(0, owner, (token_ids == mask_id).long())
        open_ = (segments.pattern == CANVAS) & (masks > 0)
        seen = open_[owner]
        upto, target = torch.where(seen, block, upto), torch.where(seen, slot, target)
    if QUADRATIC in known.patterns:
        open_ = open_ | (segments.pattern == QUADRATIC)
        grouped = (segments.pattern[owner] == QUADRATIC) & (offset >= block)
        group, inside = (offset - block) // block, offset % block
        token_ids = token_ids.masked_fill(grouped, mask_id)
        positions = torch.where(grouped, context[owner] + group + 1 + inside, positions)
        upto = torch.where(grouped, group + 1, upto)
        lo = torch.where(grouped, block * (group + 1), 0)
        hi = torch.where(grouped, block * (group + 2), 0)
        target = torch.where(grouped, positions, target)
    slots = page * page_size + slot % page_size
    return Expanded(context, open_, token_ids, positions, slots, upto, lo, hi, known.row, target, known.gate)


@triton.jit(do_not_specialize=["query_tokens"])
def _expand_kernel(
    row_ptr,
    length_ptr,
    block_ptr,
    pattern_ptr,
    lora_ptr,
    restart_ptr,
    ahead_ptr,
    first_ptr,
    tokens_ptr,
    cached_ptr,
    passes_ptr,
    pages_ptr,
    context_ptr,
    open_ptr,
    out_ptr,
    gate_ptr,
    tokens_stride,
    pages_stride,
    query_tokens,
    mask_id,
    PAGE: tl.constexpr,
    CANVAS_LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a segment. The patterns' codes: 0 causal, 1 canvas, 2 quadratic, 3 pad."""
    segment = tl.program_id(0)
    length = tl.load(length_ptr + segment)
    row = tl.load(row_ptr + segment)
    context = tl.load(cached_ptr + row) + tl.load(ahead_ptr + segment)
    tl.store(context_ptr + segment, context)
    if length == 0:
        tl.store(open_ptr + segment, 0)
        return
    block = tl.load(block_ptr + segment)
    pattern = tl.load(pattern_ptr + segment)
    restart = tl.load(restart_ptr + segment)
    first = tl.load(first_ptr + segment)
    line = tokens_ptr + row * tokens_stride + context
    column = tl.arange(0, WIDTH)
    inside = column < block
    # what is voided below is not read back: the same program would have to wait for its own stores
    voided = (restart != 0) & (column >= 1)
    held = tl.load(line + column, mask=inside & (pattern == 1), other=0)
    masks = tl.sum((inside & (voided | (held == mask_id))).to(tl.int32), 0)
    is_open = ((pattern == 1) & (masks > 0)) | (pattern == 2)
    tl.store(open_ptr + segment, is_open)
    if restart != 0:
        tl.store(line + column, mask_id, mask=(column >= 1) & (column < CANVAS_LENGTH))
        tl.store(passes_ptr + row, 0)
    gate = tl.load(lora_ptr + segment).to(gate_ptr.dtype.element_ty)
    for start in tl.range(0, length, CHUNK):
        offset = start + tl.arange(0, CHUNK)
        ok = offset < length
        grouped = (pattern == 2) & (offset >= block)
        group = (offset - block) // block
        slot = tl.where(pattern == 3, 0, context + offset)
        read = ok & (grouped == 0) & (pattern != 3) & ((restart == 0) | (offset == 0))
        token_ids = tl.load(tokens_ptr + row * tokens_stride + slot, mask=read, other=mask_id)
        page = tl.load(pages_ptr + row * pages_stride + slot // PAGE, mask=ok, other=0)
        position = tl.where(grouped, context + group + 1 + offset % block, slot)
        seen = is_open & (pattern == 1)
        upto = tl.where(seen, block, tl.where(grouped, group + 1, tl.where(pattern == 3, 1, offset + 1)))
        out = out_ptr + first + offset
        tl.store(out, token_ids, mask=ok)
        tl.store(out + query_tokens, position, mask=ok)
        tl.store(out + 2 * query_tokens, page * PAGE + slot % PAGE, mask=ok)
        tl.store(out + 3 * query_tokens, upto, mask=ok)
        tl.store(out + 4 * query_tokens, tl.where(grouped, block * (group + 1), 0), mask=ok)
        tl.store(out + 5 * query_tokens, tl.where(grouped, block * (group + 2), 0), mask=ok)
        tl.store(out + 6 * query_tokens, row + tl.zeros_like(offset), mask=ok)
        tl.store(out + 7 * query_tokens, tl.where(seen | grouped, position, position + 1), mask=ok)
        tl.store(gate_ptr + first + offset, gate + tl.zeros([CHUNK], gate.dtype), mask=ok)
