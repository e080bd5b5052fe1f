"""Rotary embedding, llama-4 query scaling and the KV store, in one place because they touch the same values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton

_HEADS = 16  # of one program


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, kv: Tensor, slots: Tensor, heads: int
) -> Tensor:
    """Rotates queries and keys, scales the queries and writes keys and values to their slots.

    qkv: [T, heads + 2 * kv_heads, head_dim]. cos, sin: [T, 1, head_dim], the first half of sin negated.
    scale: [T, 1, 1]. kv: [pages, page_size, 2 * kv_heads, head_dim], written at slots [T] int64. All contiguous.
    Returns the queries, [T, heads, head_dim]. The kernel rounds once, after the scale.
    """
    if not on_triton(qkv):
        return rope_and_store_reference(qkv, cos, sin, scale, kv, slots, heads)
    assert all(part.is_contiguous() for part in (qkv, cos, sin, scale, kv, slots))
    tokens, all_heads, head_dim = qkv.shape
    q = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _rope_and_store,
        (tokens, triton.cdiv(all_heads, _HEADS)),
        qkv,
        cos,
        sin,
        scale,
        kv,
        slots,
        q,
        HEADS=heads,
        KV_HEADS=(all_heads - heads) // 2,
        HALF=head_dim // 2,
        BLOCK_HEADS=_HEADS,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
    )
    return q


def rope_and_store_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, kv: Tensor, slots: Tensor, heads: int
) -> Tensor:
    rotated_heads = heads + (qkv.shape[1] - heads) // 2
    turned = qkv[:, :rotated_heads]
    half = turned.shape[-1] // 2
    rotated = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
    kv.flatten(0, 1).index_copy_(0, slots, torch.cat((rotated[:, heads:], qkv[:, rotated_heads:]), 1))
    return rotated[:, :heads] * scale


@triton.jit
def _rope_and_store(
    qkv,
    cos,
    sin,
    scale,
    kv,
    slots,
    q,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    DIM: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = column < HALF
    inside = (head < HEADS + 2 * KV_HEADS) & in_half
    at = qkv + token * (HEADS + 2 * KV_HEADS) * DIM + head * DIM + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)

    angle = token * DIM + column
    cos_first = tl.load(cos + angle, mask=in_half, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + HALF, mask=in_half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=in_half, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + HALF, mask=in_half, other=0.0).to(tl.float32)
    rotates = head < HEADS + KV_HEADS
    turned_first = tl.where(rotates, first * cos_first + second * sin_first, first)
    turned_second = tl.where(rotates, second * cos_second + first * sin_second, second)

    is_query = inside & (head < HEADS)
    factor = tl.load(scale + token).to(tl.float32)
    to = q + token * HEADS * DIM + head * DIM + column
    tl.store(to, (turned_first * factor).to(q.dtype.element_ty), mask=is_query)
    tl.store(to + HALF, (turned_second * factor).to(q.dtype.element_ty), mask=is_query)

    stays = inside & (head >= HEADS)
    to = kv + tl.load(slots + token) * (2 * KV_HEADS * DIM) + (head - HEADS) * DIM + column
    tl.store(to, turned_first.to(kv.dtype.element_ty), mask=stays)
    tl.store(to + HALF, turned_second.to(kv.dtype.element_ty), mask=stays)
