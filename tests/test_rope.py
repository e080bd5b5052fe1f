"""The kernel that rotates, scales and stores against torch."""

import pytest
import torch
from torch import Tensor

from fakes import DEVICE
from kernels.backend import implementation
from kernels.rope import rope_and_store, rope_and_store_reference

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
PAGE_SIZE = 4


def inputs(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv, cos, sin, scale, kv and slots, the latter in no order and each once."""
    generator = torch.Generator().manual_seed(tokens)
    angle = (6 * torch.rand(tokens, 1, head_dim // 2, generator=generator)).repeat(1, 1, 2)
    sign = torch.ones(head_dim)
    sign[: head_dim // 2] = -1
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator)
    scale = 1 + torch.rand(tokens, 1, 1, generator=generator)
    pages = tokens // PAGE_SIZE + 2
    kv = torch.randn(pages, PAGE_SIZE, 2 * kv_heads, head_dim, generator=generator)
    slots = torch.randperm(pages * PAGE_SIZE, generator=generator)[:tokens]
    qkv, cos, sin, scale, kv = (
        part.to(DEVICE, dtype) for part in (qkv, angle.cos(), angle.sin() * sign, scale, kv)
    )
    return qkv, cos, sin, scale, kv, slots.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"),
    [(1, 4, 2, 8), (3, 32, 8, 128), (16, 5, 1, 12), (33, 4, 4, 64)],
)
def test_the_kernel_rotates_scales_and_stores_as_torch(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    qkv, cos, sin, scale, kv, slots = inputs(tokens, heads, kv_heads, head_dim, dtype)
    want_kv = kv.clone()
    want = rope_and_store_reference(qkv, cos, sin, scale, want_kv, slots, heads)
    with implementation("triton"):
        got = rope_and_store(qkv, cos, sin, scale, kv, slots, heads)
    assert got.is_contiguous()
    for mine, theirs in ((got, want), (kv, want_kv)):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_the_slots_of_others_keep_their_bits(dtype: torch.dtype) -> None:
    qkv, cos, sin, scale, kv, slots = inputs(5, 4, 2, 8, dtype)
    want = kv.clone().flatten(0, 1)
    with implementation("triton"):
        rope_and_store(qkv, cos, sin, scale, kv, slots, 4)
    got = kv.flatten(0, 1)
    want[slots, 2:] = qkv[:, 6:]
    want[slots, :2] = got[slots, :2]
    assert torch.equal(got, want)
