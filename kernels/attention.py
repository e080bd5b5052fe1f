"""Ragged paged attention with one visibility rule for every decode mode.

A query token sees its sequence's whole cached context and, inside its own segment, key j iff `j < upto` or
`lo <= j < hi`. The segment's own keys and values lie in the pages, at `context + j`, before attention runs.

On Triton a segment is cut into tiles of query tokens, and a tile's keys into pieces, where one tile alone would leave
the GPU idle. A work list of all pieces is built on the device, once per step; a fixed number of programs walks it, so
that one captured graph serves all contexts. A second launch merges each token's pieces, always in their order.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton

ROWS = 64  # query tokens x query heads of one KV head in a tile: the least that warp-group matrix units take
MOST_PIECES = 16  # of a tile in exact mode
SHORTEST_EXACT, SHORTEST = (
    512,
    256,
)  # keys of a piece; a shorter one costs more in partial results than it saves
WAVES = 4  # pieces that a program takes, at most, where the device chooses their length
PIECE_COST = 128  # what starting, storing and merging a piece costs, in keys: an estimate
CHUNK = 64  # items, or tokens, that the builder writes at once
_WAVES, _PIECE_COST, _CHUNK = tl.constexpr(WAVES), tl.constexpr(PIECE_COST), tl.constexpr(CHUNK)
FIELDS = 10  # int32 of an item, in this order:
_FIRST = tl.constexpr(0)  # query token that the tile starts with
_TOKENS = tl.constexpr(1)  # of the tile
_CONTEXT = tl.constexpr(2)
_ROW = tl.constexpr(3)  # of the page table
_LOW = tl.constexpr(4)  # first key of the piece
_HIGH = tl.constexpr(5)  # and the end of its keys
_PIECE = tl.constexpr(6)  # its index
_PIECES = tl.constexpr(7)  # of the tile
_PARTIAL = tl.constexpr(8)  # row of the partial results of the tile's first token in piece 0
_STRIDE = tl.constexpr(9)  # rows from there to that of piece 1
_FIELDS = tl.constexpr(FIELDS)
MERGED = 3  # int32 of a token: its pieces, or 0 if they need no merging; its row of partial results; rows to the next
_MERGED = tl.constexpr(MERGED)


class Ragged(NamedTuple):
    """What attention reads of a batch of S segments and T query tokens.

    A segment of length 0 takes no part; none of its other values matter.
    """

    first: Tensor  # [S] int64 first query token
    length: Tensor  # [S] int64 query tokens
    context: Tensor  # [S] int64 cached tokens before them
    row: Tensor  # [S] int64 row of the page table
    open: Tensor  # [S] bool: tokens may see later ones of their segment
    upto: Tensor  # [T] int64
    lo: Tensor | None  # [T] int64; None, on the torch side only, where no token uses lo and hi
    hi: Tensor | None  # [T] int64
    pages: Tensor  # [rows, columns] int64 page ids; the last column is spare, but the id of a page
    lengths: list[int] | None = None  # `length` as the host knows it, for the torch side


@dataclass(frozen=True, slots=True)
class SegmentAttention:
    """What one segment's attention needs in every layer, on the torch side."""

    start: int  # of its query tokens
    length: int
    keys: int  # context and segment
    pages: Tensor | slice  # int64 ids of the pages that hold the keys; a slice where they follow one another
    bias: Tensor | None  # [1, 1, groups * length, keys], 0 or -inf; None where everything is visible


@dataclass(frozen=True, slots=True)
class WorkList:
    """The pieces of all tiles, and room for their results."""

    ragged: Ragged
    count: Tensor  # [1] int32 items
    items: Tensor  # [most, FIELDS] int32
    merged: Tensor | None  # [T, MERGED] int32; None where one piece holds all keys
    partial: Tensor  # [rows * heads, head_dim] float32 weighted sums of values, where pieces are several
    softmax: Tensor  # [rows * heads, 2] float32 their largest scores, scaled, and sums of weights
    programs: int
    exact: bool


AttentionPlan = list[SegmentAttention] | WorkList


def plan_attention(
    ragged: Ragged, page_size: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, exact: bool
) -> AttentionPlan:
    """Works out, once per step, what every layer's attention needs.

    heads, kv_heads: of this rank; head_dim and page_size: powers of two, at least 16 on a GPU. dtype: of the queries.
    exact: a token's result has the same bits whatever the batch, the lengths of segments and the neighbours, since
    keys are cut at fixed places and every token goes through the same instructions. Else the device chooses a length
    of pieces that fills it. The torch side needs no `exact`.
    """
    if not on_triton(ragged.length):
        return plan_attention_reference(ragged, page_size, heads, kv_heads, head_dim, dtype, exact)
    segments, tokens, capacity = len(ragged.length), len(ragged.upto), ragged.pages.shape[1] * page_size
    block, programs = ROWS * kv_heads // heads, _programs(ragged.length.device)
    tiles = min(tokens, tokens // block + segments)
    shortest = SHORTEST
    if exact:
        shortest = max(SHORTEST_EXACT, triton.cdiv(capacity, MOST_PIECES))
    shortest = triton.cdiv(shortest, page_size) * page_size
    pieces = triton.cdiv(capacity, shortest)
    most, rows = tiles * pieces, tokens * pieces if pieces > 1 else 0
    if not exact:
        # The pieces' length is at least (keys of all tiles) / filling. A tile has at most keys / length + 1 of them,
        # 2 * keys / length if more than one.
        filling = programs * WAVES // kv_heads
        most, rows = min(most, tiles + filling), min(rows, 2 * filling * block)
    # For 32 heads of 128 a row takes 16,640 bytes. 512 tokens, exact: 8,192 rows or 136 MB, for sequences of 32,768
    # as of 262,144 tokens; else, on 264 programs for 8 KV heads: 4,224 rows or 70 MB at most.
    device = ragged.length.device
    plan = WorkList(
        ragged=ragged,
        count=torch.empty(1, dtype=torch.int32, device=device),
        items=torch.empty(most, FIELDS, dtype=torch.int32, device=device),
        merged=torch.zeros(tokens, MERGED, dtype=torch.int32, device=device) if rows else None,
        partial=torch.empty(rows * heads, head_dim, device=device),
        softmax=torch.empty(rows * heads, 2, device=device),
        programs=programs,
        exact=exact,
    )
    launch(
        _build_work_list,
        (segments,),
        ragged.first,
        ragged.length,
        ragged.context,
        ragged.row,
        ragged.open,
        plan.count,
        plan.items,
        plan.items if plan.merged is None else plan.merged,
        shortest,
        programs,
        segments,
        SEGMENTS=triton.next_power_of_2(segments),
        KV_HEADS=kv_heads,
        BLOCK_Q=block,
        PAGE_SIZE=page_size,
        EXACT=exact,
        MERGES=plan.merged is not None,
        num_warps=4 if segments > 32 else 1,
    )
    return plan


def ragged_attention(q: Tensor, kv: Tensor, plan: AttentionPlan) -> Tensor:
    """Attention of all segments.

    q: [T, heads, head_dim], rotated and query-scaled. kv: [pages, page_size, 2 * kv_heads, head_dim], keys then
    values. Both contiguous. Returns [T, heads * head_dim]; tokens of no segment get anything.
    """
    if isinstance(plan, list):
        return ragged_attention_reference(q, kv, plan)
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = kv.shape[1], kv.shape[2] // 2
    out = q.new_empty(tokens, heads * head_dim)
    ragged = plan.ragged
    assert ragged.lo is not None and ragged.hi is not None, "Triton reads lo and hi of every token"
    stages = 3 if q.element_size() < 4 else 2  # of two bytes an element, two programs of three fit on an SM
    launch(
        _attend,
        (plan.programs,),
        q,
        kv,
        out,
        plan.count,
        plan.items,
        plan.partial,
        plan.softmax,
        ragged.upto,
        ragged.lo,
        ragged.hi,
        ragged.pages,
        KV_HEADS=kv_heads,
        GROUPS=heads // kv_heads,
        HEAD_DIM=head_dim,
        ROWS=ROWS,
        PAGE_SIZE=page_size,
        COLUMNS=ragged.pages.shape[1],
        SCALE=head_dim**-0.5 * 1.4426950408889634,  # log2(e): weights are powers of two
        EXACT=plan.exact,
        STAGES=stages,
        num_warps=4,
        num_stages=stages,
    )
    if plan.merged is not None:
        groups = heads // kv_heads
        launch(
            _merge,
            (tokens, kv_heads),
            plan.merged,
            plan.partial,
            plan.softmax,
            out,
            KV_HEADS=kv_heads,
            GROUPS=groups,
            GROUPS_HELD=triton.next_power_of_2(groups),
            HEAD_DIM=head_dim,
            PIECES=MOST_PIECES,
        )
    return out


@lru_cache
def _programs(device: torch.device) -> int:
    """How many programs run at a time: two on each SM. Elsewhere a few, so that each has several items."""
    if device.type != "cuda":
        return 6
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _build_work_list(
    first_ptr,
    length_ptr,
    context_ptr,
    row_ptr,
    open_ptr,
    count_ptr,
    items_ptr,
    merged_ptr,
    shortest,
    programs,
    segments,
    SEGMENTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EXACT: tl.constexpr,
    MERGES: tl.constexpr,
):
    """Program s writes the items of segment s; where, it finds by itself, from the sizes of all segments before."""
    mine = tl.program_id(0)
    segment = tl.arange(0, SEGMENTS)
    length = tl.load(length_ptr + segment, segment < segments, 0)
    context = tl.load(context_ptr + segment, segment < segments, 0)
    keys = tl.where(length > 0, context + length, 0)
    tiles = tl.cdiv(length, BLOCK_Q)
    if EXACT:
        piece = tl.zeros_like(keys) + shortest
    else:
        total, longest = tl.sum(tiles * keys), tl.max(keys)
        chosen, least = longest, longest * 0 + 2**62
        for waves in tl.static_range(1, _WAVES + 1):
            each = tl.maximum(tl.cdiv(total * KV_HEADS, programs * waves), shortest)
            each = tl.cdiv(each, PAGE_SIZE) * PAGE_SIZE
            items = tl.sum(tiles * tl.cdiv(keys, each)) * KV_HEADS
            cost = tl.cdiv(items, programs) * (tl.minimum(each, longest) + _PIECE_COST)
            chosen = tl.where(cost < least, each, chosen)
            least = tl.minimum(cost, least)
        # the pieces of a tile in equal lengths
        piece = tl.cdiv(keys, tl.maximum(tl.cdiv(keys, tl.maximum(chosen, 1)), 1))
        piece = tl.maximum(tl.cdiv(piece, PAGE_SIZE), 1) * PAGE_SIZE
    pieces = tl.cdiv(keys, piece)
    before = segment < mine
    at = tl.sum(tl.where(before, tiles * pieces, 0))
    partial = tl.sum(tl.where(before & (pieces > 1), pieces * length, 0))
    if mine == 0:
        tl.store(count_ptr, tl.sum(tiles * pieces).to(tl.int32))
    length = tl.load(length_ptr + mine)
    context = tl.load(context_ptr + mine)
    first = tl.load(first_ptr + mine)
    row = tl.load(row_ptr + mine)
    sees_later = tl.load(open_ptr + mine)
    tiles = tl.cdiv(length, BLOCK_Q)
    piece = tl.sum(tl.where(segment == mine, piece, 0))
    pieces = tl.sum(tl.where(segment == mine, pieces, 0))
    each = tl.arange(0, _CHUNK)
    for start in tl.range(0, tiles * pieces, _CHUNK):
        # the tiles of one piece stand together: they read the same keys at the same time
        index = start + each
        inside = index < tiles * pieces
        offset = index % tiles * BLOCK_Q
        end = tl.where(sees_later, context + length, context + tl.minimum(offset + BLOCK_Q, length))
        item = items_ptr + (at + index) * _FIELDS
        low = index // tiles * piece
        tl.store(item + _FIRST, (first + offset).to(tl.int32), inside)
        tl.store(item + _TOKENS, tl.minimum(length - offset, BLOCK_Q).to(tl.int32), inside)
        tl.store(item + _CONTEXT, (context + offset * 0).to(tl.int32), inside)
        tl.store(item + _ROW, (row + offset * 0).to(tl.int32), inside)
        tl.store(item + _LOW, low.to(tl.int32), inside)
        tl.store(item + _HIGH, tl.minimum(low + piece, end).to(tl.int32), inside)
        tl.store(item + _PIECE, (index // tiles).to(tl.int32), inside)
        tl.store(item + _PIECES, tl.cdiv(end, piece).to(tl.int32), inside)
        tl.store(item + _PARTIAL, (partial + offset).to(tl.int32), inside)
        tl.store(item + _STRIDE, (length + offset * 0).to(tl.int32), inside)
    if MERGES:
        for start in tl.range(0, tl.where(pieces > 1, length, 0), _CHUNK):
            offset = start + each
            inside = offset < length
            behind = tl.minimum(offset // BLOCK_Q * BLOCK_Q + BLOCK_Q, length)
            end = tl.where(sees_later, context + length, context + behind)
            count = tl.cdiv(end, piece)
            token = merged_ptr + (first + offset) * _MERGED
            tl.store(token, tl.where(count > 1, count, 0).to(tl.int32), inside)
            tl.store(token + 1, (partial + offset).to(tl.int32), inside)
            tl.store(token + 2, (length + offset * 0).to(tl.int32), inside)


@triton.jit
def _fold(scores, v, top, weight, acc, SCALE: tl.constexpr):
    """Adds a page's keys to a running softmax. Rows that have seen no key yet stay at -inf, 0, 0."""
    # scaled at once: where the top stays, the rest is shrunk by exp2(0), which is 1 whatever the compiler fuses
    higher = tl.maximum(top, tl.max(scores, 1) * SCALE)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    # explicit, so that masked and unmasked scores are rounded alike
    weights = tl.exp2(tl.fma(scores, SCALE, -base[:, None]))
    shrink = tl.exp2(top - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, weight * shrink + tl.sum(weights, 1), acc


@triton.jit
def _attend(
    q_ptr,
    kv_ptr,
    out_ptr,
    count_ptr,
    items_ptr,
    partial_ptr,
    softmax_ptr,
    upto_ptr,
    lo_ptr,
    hi_ptr,
    pages_ptr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    KEY: tl.constexpr = 2 * KV_HEADS * HEAD_DIM  # elements from a key to the next
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    slots = tl.arange(0, PAGE_SIZE)
    heads = rows // GROUPS * HEADS + rows % GROUPS  # of the rows, from the tile's first
    grid = heads[:, None] * HEAD_DIM + dims[None, :]
    cells = slots[:, None] * KEY + dims[None, :]  # of a head's keys, or values, in a page
    # what is the same for all items is computed for each again: kept, it would take the registers that spill
    for work in tl.range(
        tl.program_id(0), tl.load(count_ptr) * KV_HEADS, tl.num_programs(0), disable_licm=True
    ):
        item = items_ptr + work // KV_HEADS * _FIELDS
        kv_head = work % KV_HEADS
        low = tl.load(item + _LOW)
        high = tl.load(item + _HIGH)
        if low < high:  # a causal tile may end before its segment's last piece
            context = tl.load(item + _CONTEXT)
            pieces = tl.load(item + _PIECES)
            tokens = tl.load(item + _TOKENS)
            inside = rows < tokens * GROUPS
            first = tl.load(item + _FIRST)
            at = (first.to(tl.int64) * HEADS + kv_head * GROUPS) * HEAD_DIM  # of the tile in q and out
            q = tl.load(q_ptr + at + grid, inside[:, None], 0.0)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            weight = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
            table = pages_ptr + tl.load(item + _ROW).to(tl.int64) * COLUMNS
            k_ptr = kv_ptr + kv_head * HEAD_DIM
            v_ptr = k_ptr + KV_HEADS * HEAD_DIM
            # A page id is loaded one page ahead: loaded with the page, it would halve the depth of the prefetch.
            page = tl.load(table + low // PAGE_SIZE)
            masked = low
            if not EXACT:  # one loop for all keys is what makes the bits equal where contexts differ
                masked = tl.maximum(low, tl.minimum(high, context // PAGE_SIZE * PAGE_SIZE))
                for start in tl.range(low, masked, PAGE_SIZE, num_stages=STAGES):
                    base = page * (PAGE_SIZE * KEY)
                    page = tl.load(table + start // PAGE_SIZE + 1)
                    k = tl.load(k_ptr + base + cells)
                    v = tl.load(v_ptr + base + cells)
                    scores = tl.dot(q, k.T, input_precision="ieee")
                    top, weight, acc = _fold(scores, v, top, weight, acc, SCALE)
            token = first + rows // GROUPS
            upto = tl.load(upto_ptr + token, inside, 0).to(tl.int32)[:, None]
            lo = tl.load(lo_ptr + token, inside, 0).to(tl.int32)[:, None]
            hi = tl.load(hi_ptr + token, inside, 0).to(tl.int32)[:, None]
            for start in tl.range(masked, high, PAGE_SIZE, num_stages=STAGES):
                base = page * (PAGE_SIZE * KEY)
                page = tl.load(table + start // PAGE_SIZE + 1)
                # behind the keys lies whatever the page held before, even nan
                held = start + slots < high
                k = tl.load(k_ptr + base + cells, held[:, None], 0.0)
                v = tl.load(v_ptr + base + cells, held[:, None], 0.0)
                key = (start + slots - context)[None, :]
                visible = (key < upto) | ((key >= lo) & (key < hi))
                scores = tl.where(visible, tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
                top, weight, acc = _fold(scores, v, top, weight, acc, SCALE)
            if pieces > 1:
                row = tl.load(item + _PARTIAL) + tl.load(item + _PIECE) * tl.load(item + _STRIDE)
                mine = row.to(tl.int64) * HEADS + kv_head * GROUPS
                tl.store(partial_ptr + mine * HEAD_DIM + grid, acc, inside[:, None])
                tl.store(softmax_ptr + mine * 2 + heads * 2, top, inside)
                tl.store(softmax_ptr + mine * 2 + heads * 2 + 1, weight, inside)
            else:
                acc = acc / tl.where(weight == 0, 1.0, weight)[:, None]
                tl.store(out_ptr + at + grid, acc.to(out_ptr.dtype.element_ty), inside[:, None])


@triton.jit
def _merge(
    merged_ptr,
    partial_ptr,
    softmax_ptr,
    out_ptr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_HELD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program a token and KV head. Reads PIECES pieces at a time, so that few loads wait for others; in exact mode
    there are no more. A piece that a token sees nothing of adds zeros."""
    HEADS: tl.constexpr = KV_HEADS * GROUPS
    token = tl.program_id(0).to(tl.int64)
    pieces = tl.load(merged_ptr + token * _MERGED)
    if pieces == 0:
        return
    first = tl.load(merged_ptr + token * _MERGED + 1).to(tl.int64)
    stride = tl.load(merged_ptr + token * _MERGED + 2).to(tl.int64)
    group = tl.arange(0, GROUPS_HELD)
    dims = tl.arange(0, HEAD_DIM)
    head = tl.program_id(1) * GROUPS + group
    top = tl.full([GROUPS_HELD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUPS_HELD], tl.float32)
    acc = tl.zeros([GROUPS_HELD, HEAD_DIM], tl.float32)
    for start in tl.range(0, pieces, PIECES, num_stages=1):
        piece = start + tl.arange(0, PIECES)
        row = (first + piece * stride)[:, None] * HEADS + head[None, :]
        there = (piece < pieces)[:, None] & (group < GROUPS)[None, :]
        its_top = tl.load(softmax_ptr + row * 2, there, float("-inf"))
        its_weight = tl.load(softmax_ptr + row * 2 + 1, there, 0.0)
        its_acc = tl.load(
            partial_ptr + row[:, :, None] * HEAD_DIM + dims[None, None, :], there[:, :, None], 0.0
        )
        higher = tl.maximum(top, tl.max(its_top, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - base)
        share = tl.exp2(its_top - base[None, :])
        weight = weight * shrink + tl.sum(its_weight * share, 0)
        acc = acc * shrink[:, None] + tl.sum(its_acc * share[:, :, None], 0)
        top = higher
    acc = acc / tl.where(weight == 0, 1.0, weight)[:, None]
    at = out_ptr + (token * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), (group < GROUPS)[:, None])


def plan_attention_reference(
    ragged: Ragged, page_size: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, exact: bool
) -> list[SegmentAttention]:
    """`plan_attention` for plain torch: each segment by itself."""
    lengths = ragged.length.tolist() if ragged.lengths is None else ragged.lengths
    page_table, upto, lo, hi = ragged.pages[ragged.row], ragged.upto, ragged.lo, ragged.hi
    plan: list[SegmentAttention] = []
    start = 0
    for segment, (length, cached) in enumerate(zip(lengths, ragged.context.tolist(), strict=True)):
        tokens = slice(start, start + length)
        keys = cached + length
        pages = _consecutive(page_table[segment, : -(-keys // page_size)])
        bias = None
        if length > 1:
            own = torch.arange(length, device=upto.device)
            visible = own < upto[tokens, None]
            if lo is not None and hi is not None:
                visible |= (own >= lo[tokens, None]) & (own < hi[tokens, None])
            if not visible.all():
                hidden = torch.zeros(length, keys, dtype=dtype, device=upto.device)
                hidden[:, cached:].masked_fill_(~visible, float("-inf"))
                bias = hidden.repeat(heads // kv_heads, 1)[None, None]
        plan.append(SegmentAttention(start, length, keys, pages, bias))
        start += length
    return plan


def ragged_attention_reference(q: Tensor, kv: Tensor, plan: list[SegmentAttention]) -> Tensor:
    """`ragged_attention` in plain torch."""
    tokens, heads, head_dim = q.shape
    kv_heads, page_size = kv.shape[2] // 2, kv.shape[1]
    groups = heads // kv_heads
    q = q.view(tokens, kv_heads, groups, head_dim)
    by_head = kv.view(-1, 2 * kv_heads, head_dim).transpose(0, 1)[None]
    every_k, every_v = by_head[:, :kv_heads], by_head[:, kv_heads:]  # [1, kv_heads, slots, head_dim]
    parts: list[Tensor] = []
    for segment in plan:
        if isinstance(segment.pages, slice):
            slots = slice(segment.pages.start * page_size, segment.pages.start * page_size + segment.keys)
            k, v = every_k[:, :, slots], every_v[:, :, slots]
        else:
            held = kv.index_select(0, segment.pages).view(-1, 2 * kv_heads, head_dim)
            gathered = held[: segment.keys].transpose(0, 1)[None]
            k, v = gathered[:, :kv_heads], gathered[:, kv_heads:]
        # the query heads of one KV head become rows that share its keys: [1, kv_heads, groups * length, head_dim]
        query = q[segment.start : segment.start + segment.length]
        if segment.length == 1:
            parts.append(F.scaled_dot_product_attention(query, k, v).view(1, -1))
            continue
        query = query.permute(1, 2, 0, 3).reshape(1, kv_heads, groups * segment.length, head_dim)
        result = F.scaled_dot_product_attention(query, k, v, segment.bias)
        result = result.view(kv_heads, groups, segment.length, head_dim).permute(2, 0, 1, 3)
        parts.append(result.reshape(segment.length, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _consecutive(pages: Tensor) -> Tensor | slice:
    """The same pages as a slice, which reads them without a copy, if they follow one another."""
    first, count = int(pages[0]), len(pages)
    if torch.equal(pages, torch.arange(first, first + count, device=pages.device)):
        return slice(first, first + count)
    return pages
