"""RMS norm with the residual addition that precedes it."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum.

    x, residual: [T, hidden], contiguous; no residual means that x starts the stream. weight: [hidden].
    Returns (normalised, new residual), of x's dtype. The sum is rounded to it before the norm, whose arithmetic is
    float32.
    """
    if not on_triton(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    tokens, hidden = x.shape
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    launch(
        _add_rms_norm,
        (tokens,),
        x,
        x if residual is None else residual,
        weight,
        normed,
        total,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=8 if block >= 4096 else 4,
    )
    return normed, total


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = x if residual is None else residual + x
    return F.rms_norm(residual, (residual.shape[-1],), weight, eps), residual


@triton.jit
def _add_rms_norm(
    x, residual, weight, normed, total, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / HIDDEN + eps)
    value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, value.to(normed.dtype.element_ty), mask=inside)
