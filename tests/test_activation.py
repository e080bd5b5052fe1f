"""The gated activation against torch."""

import pytest
import torch

from fakes import DEVICE
from kernels.activation import silu_mul, silu_mul_reference
from kernels.backend import implementation

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (3, 7), (16, 1024), (33, 1025)])
def test_the_kernel_multiplies_as_torch(tokens: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (3 * torch.randn(tokens, 2 * width, generator=generator)).to(DEVICE, dtype)
    with implementation("triton"):
        got = silu_mul(gate_up)
    assert got.dtype is dtype
    torch.testing.assert_close(got, silu_mul_reference(gate_up), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_gate_far_from_zero_overflows_nothing() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 2.0, 2.0]], device=DEVICE)
    with implementation("triton"):
        assert silu_mul(gate_up).tolist() == [[0.0, 2e4, 0.0]]
