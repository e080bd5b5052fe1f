"""The gated activation of the MLP."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * intermediate], contiguous, gate then up, to silu(gate) * up, [T, intermediate]."""
    if not on_triton(gate_up):
        return silu_mul_reference(gate_up)
    assert gate_up.is_contiguous()
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    launch(_silu_mul, (tokens, triton.cdiv(width, _BLOCK)), gate_up, out, WIDTH=width, BLOCK=_BLOCK)
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + row * 2 * WIDTH + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # exp(-gate) would overflow
    sigmoid = tl.where(gate < 0, small, 1.0) / (1.0 + small)
    tl.store(out + row * WIDTH + column, (gate * sigmoid * up).to(out.dtype.element_ty), mask=inside)
