"""Ragged paged attention with one visibility rule for every decode mode.

A query token sees its sequence's whole cached context and, inside its own segment, key j iff `j < upto` or
`lo <= j < hi`. The segment's own keys and values lie in the pages, at `context + j`, before attention runs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Consecutive segments of equal length: `segments` x `length` query tokens from token `start`."""

    start: int
    segments: int
    length: int
    keys: int  # of the longest segment, its own included
    pages: Tensor  # [segments * columns] int64, pages that hold them
    bias: Tensor | None  # [segments, 1, groups * length, keys], 0 or -inf; None where everything is visible


def plan_attention(
    lengths: list[int],
    context: Tensor,
    upto: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    page_table: Tensor,
    page_size: int,
    groups: int,
    dtype: torch.dtype,
) -> list[AttentionGroup]:
    """Builds, once per step, what every layer's attention needs.

    lengths: query tokens of each segment. context: [S] int64, cached tokens. upto, lo, hi: [T] int64, relative to
    the segment's first token (lo, hi may be None where no token uses them). page_table: [S, P] int64 page ids.
    groups: query heads per KV head. dtype: of the queries.
    """
    plan: list[AttentionGroup] = []
    segment = token = 0
    while segment < len(lengths):
        length, end = lengths[segment], segment + 1
        while end < len(lengths) and lengths[end] == length:
            end += 1
        count, stop = end - segment, token + (end - segment) * length
        first = context[segment:end, None]
        longest = int(first.max()) + length
        pages = page_table[segment:end, : -(-longest // page_size)].reshape(-1)
        bias = None
        if length > 1 or count > 1:
            keys = torch.arange(longest, device=context.device)
            start = first[:, None]  # [count, 1, 1]
            visible = keys < start + upto[token:stop].view(count, length, 1)
            if lo is not None and hi is not None:
                own = (keys >= start + lo[token:stop].view(count, length, 1)) & (
                    keys < start + hi[token:stop].view(count, length, 1)
                )
                visible |= own
            hidden = torch.zeros((), dtype=dtype, device=context.device).masked_fill(~visible, float("-inf"))
            bias = hidden[:, None].expand(count, groups, length, -1).reshape(count, 1, groups * length, -1)
        plan.append(AttentionGroup(token, count, length, longest, pages, bias))
        segment, token = end, stop
    return plan


def ragged_attention(q: Tensor, kv: Tensor, plan: list[AttentionGroup]) -> Tensor:
    """Attention of all segments at once.

    q: [T, heads, head_dim], rotated and query-scaled. kv: [pages, page_size, 2 * kv_heads, head_dim], keys then values.
    Returns [T, heads * head_dim].
    """
    tokens, heads, head_dim = q.shape
    kv_heads = kv.shape[2] // 2
    groups = heads // kv_heads
    out = q.new_empty(tokens, heads * head_dim)
    for group in plan:
        rows = group.segments * group.length
        # rows of one KV head share its keys: [segments, kv_heads, groups * length, head_dim]
        query = q[group.start : group.start + rows].view(
            group.segments, group.length, kv_heads, groups, head_dim
        )
        query = query.permute(0, 2, 3, 1, 4).reshape(
            group.segments, kv_heads, groups * group.length, head_dim
        )
        cached = kv.index_select(0, group.pages).view(group.segments, -1, 2 * kv_heads, head_dim)
        cached = cached[:, : group.keys].transpose(1, 2)  # [segments, 2 * kv_heads, keys, head_dim]
        result = F.scaled_dot_product_attention(query, cached[:, :kv_heads], cached[:, kv_heads:], group.bias)
        result = result.view(group.segments, kv_heads, groups, group.length, head_dim).permute(0, 3, 1, 2, 4)
        out[group.start : group.start + rows] = result.reshape(rows, heads * head_dim)
    return out
