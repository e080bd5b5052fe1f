"""Eight bits keep a weight to a sixteenth of itself, and what cannot be kept harms nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.fp8 import FP8, LARGEST, check_fp8, dequantise, quantise
from fakes import DEVICE


def rows(seed: int, dtype: torch.dtype, magnitude: float) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(16, 1, generator=draw).mul(2).exp()  # rows of very different size
    weights = torch.randn(16, 48, generator=draw) * spread * magnitude
    return weights.clamp(-6e4, 6e4).to(DEVICE, dtype)  # what float16 can hold


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    magnitude=st.sampled_from([1e-4, 0.02, 1.0, 100.0]),
)
def test_every_weight_is_kept_within_half_a_step(seed: int, dtype: torch.dtype, magnitude: float) -> None:
    weight = rows(seed, dtype, magnitude)
    quantised, scale = quantise(weight)
    assert quantised.dtype is FP8 and quantised.shape == weight.shape
    assert scale.dtype is torch.float32 and scale.shape == weight.shape[:1]
    error = (dequantise(quantised, scale, torch.float32) - weight.float()).abs()
    # Three bits behind the point, and 2^-9 the smallest value: half of either step.
    bound = torch.maximum(weight.float().abs() / 16, scale[:, None] / 2**10)
    assert bool((error <= bound * 1.0001).all())


@given(seed=st.integers(0, 2**31))
def test_the_largest_weight_of_a_row_takes_the_largest_value(seed: int) -> None:
    weight = rows(seed, torch.float32, 1.0)
    quantised, scale = quantise(weight)
    assert bool((quantised.float().abs().amax(1) == LARGEST).all())
    torch.testing.assert_close(scale, weight.abs().amax(1) / LARGEST)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_rows_of_zeros_and_of_extreme_weights_become_no_nan(value: float) -> None:
    weight = torch.full((2, 8), value)
    weight[1, 3] = -value
    quantised, scale = quantise(weight)
    assert bool(quantised.float().isfinite().all()) and bool((scale > 0).all())
    kept = dequantise(quantised, scale, torch.float32)
    torch.testing.assert_close(kept, weight, rtol=1 / 16, atol=1e-37)


def test_the_sign_and_the_order_of_weights_are_kept() -> None:
    weight = torch.linspace(-3, 3, 100)[None]
    kept = dequantise(*quantise(weight), torch.float32)[0]
    assert bool((kept.diff() >= 0).all()) and bool((kept.sign() == weight[0].sign()).all())


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="compute capability 8.9 or newer, not a cpu device"):
        check_fp8(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "fine"),
    [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 3), True)],
)
def test_a_gpu_is_refused_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fine: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    if fine:
        check_fp8(torch.device("cuda"))
    else:
        with pytest.raises(ValueError, match=rf"not A GPU \({capability[0]}\.{capability[1]}\)"):
            check_fp8(torch.device("cuda"))
