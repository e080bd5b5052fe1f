"""The gated low-rank addition against torch."""

import pytest
import torch
from torch import Tensor

from fakes import DEVICE
from kernels.backend import implementation
from kernels.lora import gated_lora_add, gated_lora_add_reference

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6.4e-2}


def inputs(
    tokens: int, k: int, n: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, x, a, b."""
    generator = torch.Generator().manual_seed(tokens)
    out, x = torch.randn(tokens, n, generator=generator), torch.randn(tokens, k, generator=generator)
    a = torch.randn(rank, k, generator=generator) / k**0.5
    b = torch.randn(n, rank, generator=generator) / rank**0.5
    return tuple(part.to(DEVICE, dtype) for part in (out, x, a, b))  # type: ignore[return-value]


def gates(tokens: int, which: str, dtype: torch.dtype) -> Tensor:
    """[T, 1]: all, none, every third token, or those of the second tile of 64."""
    token = torch.arange(tokens)[:, None]
    chosen = {"all": token >= 0, "none": token < 0, "some": token % 3 == 0, "late": token >= 64}[which]
    return chosen.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "n", "rank", "which"),
    [
        (1, 32, 24, 4, "all"),
        (3, 100, 70, 5, "some"),
        (16, 512, 64, 16, "all"),
        (33, 700, 33, 40, "some"),
        (33, 64, 64, 128, "none"),
        (70, 520, 24, 8, "late"),
    ],
)
def test_the_kernels_add_as_torch_and_leave_ungated_rows_alone(
    tokens: int, k: int, n: int, rank: int, which: str, dtype: torch.dtype
) -> None:
    out, x, a, b = inputs(tokens, k, n, rank, dtype)
    gate = gates(tokens, which, dtype)
    before = out.clone()
    want = gated_lora_add_reference(out.clone(), x, a, b, gate)
    with implementation("triton"):
        got = gated_lora_add(out, x, a, b, gate)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    off = gate[:, 0] == 0
    assert torch.equal(got[off], before[off])


def test_weights_are_not_read_for_tokens_without_a_gate() -> None:
    out, x, a, b = inputs(70, 64, 24, 8, torch.float32)
    before = out.clone()
    with implementation("triton"):
        # NaN times a gate of 0 would be NaN
        got = gated_lora_add(out, x, a.fill_(float("nan")), b, gates(70, "none", torch.float32))
    assert torch.equal(got, before)


def test_the_addition_has_the_same_bits_in_every_run() -> None:
    out, x, a, b = inputs(5, 1024, 24, 8, torch.float32)
    gate = gates(5, "some", torch.float32)
    with implementation("triton"):
        first, again = (gated_lora_add(out.clone(), x, a, b, gate) for _ in range(2))
    assert torch.equal(first, again)
