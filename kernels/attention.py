"""Ragged paged attention with one visibility rule for every decode mode.

A query token sees its sequence's whole cached context and, inside its own segment, key j iff `j < upto` or
`lo <= j < hi`. The segment's own keys and values lie in the pages, at `context + j`, before attention runs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SegmentAttention:
    """What one segment's attention needs in every layer."""

    start: int  # of its query tokens
    length: int
    keys: int  # context and segment
    pages: Tensor | slice  # int64 ids of the pages that hold the keys; a slice where they follow one another
    bias: Tensor | None  # [1, 1, groups * length, keys], 0 or -inf; None where everything is visible


class Ragged(NamedTuple):
    first: Tensor
    length: Tensor
    context: Tensor
    row: Tensor
    open: Tensor
    upto: Tensor
    lo: Tensor | None
    hi: Tensor | None
    pages: Tensor
    lengths: list[int] | None


AttentionPlan = list[SegmentAttention]


def plan_attention(
    ragged: Ragged,
    page_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    exact: bool,
) -> list[SegmentAttention]:
    """Works out, once per step, what every layer's attention needs.

    lengths: query tokens of each segment. context: [S] int64, cached tokens. upto, lo, hi: [T] int64, relative to
    the segment's first token (lo, hi may be None where no token uses them). page_table: [S, P] int64 page ids.
    groups: query heads per KV head. dtype: of the queries.
    """
    lengths, context, groups = ragged.lengths, ragged.context, heads // kv_heads
    upto, lo, hi = ragged.upto, ragged.lo, ragged.hi
    assert lengths is not None
    plan: list[SegmentAttention] = []
    page_table = ragged.pages[ragged.row]
    start = 0
    for segment, (length, cached) in enumerate(zip(lengths, context.tolist(), strict=True)):
        tokens = slice(start, start + length)
        keys = cached + length
        pages = _consecutive(page_table[segment, : -(-keys // page_size)])
        bias = None
        if length > 1:
            own = torch.arange(length, device=context.device)
            visible = own < upto[tokens, None]
            if lo is not None and hi is not None:
                visible |= (own >= lo[tokens, None]) & (own < hi[tokens, None])
            if not visible.all():
                hidden = torch.zeros(length, keys, dtype=dtype, device=context.device)
                hidden[:, cached:].masked_fill_(~visible, float("-inf"))
                bias = hidden.repeat(groups, 1)[None, None]
        plan.append(SegmentAttention(start, length, keys, pages, bias))
        start += length
    return plan


def ragged_attention(q: Tensor, kv: Tensor, plan: list[SegmentAttention]) -> Tensor:
    """Attention of all segments.

    q: [T, heads, head_dim], rotated and query-scaled. kv: [pages, page_size, 2 * kv_heads, head_dim], keys then
    values. Returns [T, heads * head_dim].
    """
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
