"""The fused residual addition and RMS norm against torch."""

import pytest
import torch

from fakes import DEVICE
from kernels.backend import implementation
from kernels.norm import add_rms_norm, add_rms_norm_reference

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 24), (3, 100), (16, 128), (33, 7), (2, 5120), (1, 8192)])
@pytest.mark.parametrize("starts", [False, True])
def test_the_kernel_adds_and_normalises_as_torch(
    tokens: int, hidden: int, starts: bool, dtype: torch.dtype
) -> None:
    x, weight = random(tokens, hidden, dtype=dtype), 1 + 0.1 * random(hidden, dtype=dtype, seed=1)
    residual = None if starts else 3 * random(tokens, hidden, dtype=dtype, seed=2)
    with implementation("triton"):
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
    want_normed, want_total = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert torch.equal(total, want_total)
    assert normed.dtype is dtype
    torch.testing.assert_close(normed, want_normed, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, 24, device=DEVICE)
    with implementation("triton"):
        normed, total = add_rms_norm(x, x, torch.ones(24, device=DEVICE), 1e-5)
    assert not normed.any() and not total.any()


def test_a_row_has_the_same_bits_among_any_others() -> None:
    x, weight = random(9, 100, dtype=torch.float32), random(100, dtype=torch.float32, seed=1)
    with implementation("triton"):
        together = add_rms_norm(x, x, weight, 1e-5)[0]
        alone = add_rms_norm(x[4:5].clone(), x[4:5].clone(), weight, 1e-5)[0]
    assert torch.equal(together[4:5], alone)
