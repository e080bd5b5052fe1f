"""Products with weights against torch, and the bits that exact mode promises."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fakes import DEVICE
from kernels import linear as module
from kernels.backend import implementation, recording
from kernels.linear import SKINNY_TOKENS, linear, linear_reference, multiply, splits_of

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
SPLIT = 2048, 8  # K and N of a weight that is split


def inputs(tokens: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, k, generator=generator), torch.randn(n, k, generator=generator) / k**0.5
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight in float8_e4m3fn and the scale of each row."""
    scale = weight.float().abs().amax(1) / 448
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("tokens", "k", "n"),
    [
        (0, 128, 64),
        (1, 128, 64),
        (3, 24, 7),
        (16, 130, 65),
        (33, 300, 100),
        (65, 128, 64),
        (2, *SPLIT),
        (33, 3200, 70),
    ],
)
def test_the_kernel_multiplies_as_torch(tokens: int, k: int, n: int, exact: bool, dtype: torch.dtype) -> None:
    x, weight = inputs(tokens, k, n, dtype)
    with implementation("triton"):
        got = linear(x, weight, exact=exact)
    assert got.dtype is dtype
    torch.testing.assert_close(got, linear_reference(x, weight), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 24, 7), (33, 300, 100), (3, *SPLIT), (70, 128, 64)])
@pytest.mark.parametrize("exact", [False, True])
def test_an_eight_bit_weight_is_scaled_by_row(
    tokens: int, k: int, n: int, exact: bool, dtype: torch.dtype
) -> None:
    x, weight = inputs(tokens, k, n, dtype)
    quantised, scale = in_fp8(weight)
    with implementation("triton"):
        got = linear(x, quantised, scale, exact=exact)
    assert got.dtype is dtype
    want = F.linear(x.double(), quantised.double() * scale.double()[:, None])
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    reference = linear_reference(x, quantised, scale).double()
    torch.testing.assert_close(reference, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [2, SKINNY_TOKENS + 1])
def test_float32_results_are_not_rounded_in_between(tokens: int) -> None:
    dtype = DTYPES[-1]
    x, weight = inputs(tokens, 128, 64, dtype)
    with implementation("triton"):
        got = linear(x, weight, out_dtype=torch.float32)
    assert got.dtype is torch.float32
    want = F.linear(x.double(), weight.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert linear_reference(x, weight, out_dtype=torch.float32).dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [SPLIT, (3200, 70), (128, 64)])
def test_exact_rows_have_the_same_bits_among_any_number_of_tokens(k: int, n: int, dtype: torch.dtype) -> None:
    many = 3 * SKINNY_TOKENS - 7
    x, weight = inputs(many, k, n, dtype)
    with implementation("triton"):
        together = linear(x, weight, exact=True)
        for first, last in ((0, 1), (130, 131), (60, 100)):
            part = linear(x[first:last].clone(), weight, exact=True)
            assert torch.equal(part, together[first:last])


def test_a_split_of_k_follows_the_weights_shape_alone() -> None:
    assert splits_of(SPLIT[1], SPLIT[0]) == 2
    assert [splits_of(*shape) for shape in ((6144, 5120), (5120, 16384), (32768, 5120))] == [2, 3, 1]
    assert splits_of(64, 512) == 1


def test_parts_are_added_in_order_and_the_counters_are_left_at_zero() -> None:
    x, weight = inputs(20, 1024, 40, torch.float32)
    out = torch.empty(20, 40, device=DEVICE)
    for _ in range(2):
        multiply(x, weight, out, 16, 32, 8)
        pieces = []
        for part in range(8):
            columns = slice(128 * part, 128 * (part + 1))
            piece = torch.empty_like(out)
            multiply(x[:, columns].contiguous(), weight[:, columns].contiguous(), piece, 16, 32, 1)
            pieces.append(piece)
        want = torch.zeros_like(out)
        for piece in pieces:
            want += piece
        assert torch.equal(out, want)
        assert not module._counters(x.device).any()


def test_many_tokens_take_the_library_on_a_gpu_but_not_in_exact_mode_or_eight_bits() -> None:
    def launches(tokens: int, **options: object) -> int:
        x = torch.empty(tokens, 256, dtype=torch.bfloat16, device="meta")
        dtype = torch.bfloat16 if "scale" not in options else torch.float8_e4m3fn
        weight = torch.empty(128, 256, dtype=dtype, device="meta")
        with recording() as recorded:
            out = linear(x, weight, **options)  # type: ignore[arg-type]
        assert out.shape == (tokens, 128)
        assert out.dtype is options.get("out_dtype", torch.bfloat16)
        return len(recorded)

    scale = torch.empty(128, device="meta")
    assert launches(SKINNY_TOKENS) == launches(SKINNY_TOKENS, out_dtype=torch.float32) == 1
    assert launches(SKINNY_TOKENS + 1) == launches(SKINNY_TOKENS + 1, out_dtype=torch.float32) == 0
    assert launches(SKINNY_TOKENS + 1, exact=True) == launches(SKINNY_TOKENS + 1, scale=scale) == 1


def test_a_split_product_has_the_same_bits_in_every_run() -> None:
    x, weight = inputs(20, 3072, 640, torch.float32)
    with implementation("triton"):
        first, again = (linear(x, weight) for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, linear_reference(x, weight), rtol=1e-5, atol=1e-5)
