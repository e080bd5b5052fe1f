"""Rotary embedding, llama-4 query scaling and the KV store, in one place because they touch the same values."""

import torch
from torch import Tensor


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, kv: Tensor, slots: Tensor, heads: int
) -> Tensor:
    """Rotates queries and keys, scales the queries and writes keys and values to their slots.

    qkv: [T, heads + 2 * kv_heads, head_dim]. cos, sin: [T, 1, head_dim], the first half of sin negated.
    scale: [T, 1, 1]. kv: [pages, page_size, 2 * kv_heads, head_dim], written at slots [T] int64.
    Returns the queries, [T, heads, head_dim].
    """
    rotated_heads = heads + (qkv.shape[1] - heads) // 2
    turned = qkv[:, :rotated_heads]
    half = turned.shape[-1] // 2
    rotated = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
    kv.flatten(0, 1).index_copy_(0, slots, torch.cat((rotated[:, heads:], qkv[:, rotated_heads:]), 1))
    return rotated[:, :heads] * scale
