"""The lowest logit that the filters keep: definitions, and the kernel against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes import DEVICE
from kernels.backend import implementation, recording
from kernels.filters import filter_limit
from kernels.sampling import Sampling

MASK = 3


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.filters.BLOCK", 128)


def sampling(*rows: tuple[float, int, float, float]) -> Sampling:
    """Temperature, top_k, top_p and min_p of each row."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return Sampling(
        torch.tensor(temperature, device=DEVICE),
        torch.tensor(top_k, device=DEVICE),
        torch.tensor(top_p, device=DEVICE),
        torch.tensor(min_p, device=DEVICE),
        torch.arange(len(rows), device=DEVICE),
    )


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * scale).to(DEVICE)


def both(logits: Tensor, parameters: Sampling, mask_id: int = MASK) -> tuple[Tensor, Tensor]:
    """What plain torch says of the rows, and what the kernel says."""
    row = torch.arange(len(logits), device=DEVICE)
    limits = []
    for name in ("torch", "triton"):
        with implementation(name):
            limits.append(filter_limit(logits.clone(), row, parameters, mask_id))
    return limits[0], limits[1]


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.just(1.0) | st.floats(0.0625, 1.0, width=32),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.floats(0.125, 2.0, width=32),
)
def test_filters_keep_what_their_definitions_say(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = random_logits(1, 11, seed, 1.0).cpu().double()
    order = [t for t in logits[0].argsort(descending=True).tolist() if t != MASK]
    kept = order[: top_k or 10]
    inside = (logits[0, kept] / temperature).softmax(-1)
    wanted, mass = [], 0.0
    for token, probability in zip(kept, inside.tolist(), strict=True):
        if (mass < top_p or top_p == 1) and probability >= min_p * float(inside[0]):
            wanted.append(token)
        mass += probability
    parameters = Sampling(*(t.cpu() for t in sampling((temperature, top_k, top_p, min_p))))
    with implementation("torch"):
        limit = filter_limit(logits, torch.tensor([0]), parameters, MASK)
    unfiltered = top_k == 0 and top_p == 1 and min_p == 0
    assert limit.item() == (float("-inf") if unfiltered else logits[0, wanted].min().item())


@pytest.mark.usefixtures("small_blocks")
def test_the_kernel_finds_the_limits_of_the_reference() -> None:
    """No sum comes nearer to its top_p than 4e-4 of the whole; they are rounded to some 1e-7."""
    parameters = sampling(
        (1.0, 0, 1.0, 0.0),
        (0.0, 5, 0.5, 0.1),
        (1.0, 1, 1.0, 0.0),
        (0.7, 40, 1.0, 0.0),
        (0.7, 299, 1.0, 0.0),
        (1.0, 300, 1.0, 0.0),
        (1.0, 10**6, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (2.0, 0, 0.3, 0.0),
        (1.0, 0, 1.0, 0.05),
        (1.0, 0, 1.0, 1.0),
        (1.3, 60, 0.8, 0.01),
        (100.0, 0, 0.5, 0.0),
        (1e-6, 0, 0.5, 0.0),
        (1e-6, 20, 0.999, 0.0),
        (1.0, 0, 1e-6, 0.0),
    )
    want, got = both(random_logits(16, 300), parameters)
    assert torch.equal(want, got)
    assert want.isinf().tolist() == [True, True] + [False] * 14


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("extreme", [1e4, 1e-4, 1e-40])
def test_limits_hold_at_extreme_logits(extreme: float) -> None:
    logits = random_logits(5, 260, seed=2, scale=extreme)
    for temperature in (1e-6, 1.0, 100.0):
        parameters = sampling(
            (temperature, 9, 1.0, 0.0),
            (temperature, 0, 0.5, 0.0),
            (temperature, 0, 1.0, 0.2),
            (temperature, 199, 0.7, 0.1),
            (temperature, 258, 1.0, 0.0),
        )
        want, got = both(logits, parameters)
        assert torch.equal(want, got)


@pytest.mark.usefixtures("small_blocks")
def test_ties_at_a_limit_stay_and_zeros_of_both_signs_tie() -> None:
    logits = torch.full((6, 200), -5.0, device=DEVICE)
    logits[:, 10:14] = 2.0
    logits[:, 150:155] = 0.0
    logits[:, 160:165] = -0.0
    parameters = sampling(
        (1.0, 4, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 14, 1.0, 0.0),
        (1.0, 15, 1.0, 0.0),
        (1.0, 0, 0.5, 0.0),  # the four likeliest have 0.73 of the mass
        (1.0, 0, 0.8, 0.0),
    )
    want, got = both(logits, parameters)
    assert torch.equal(want, got)
    assert got.tolist() == [2.0, 0.0, 0.0, -5.0, 2.0, 0.0]


@pytest.mark.usefixtures("small_blocks")
def test_the_mask_token_and_impossible_tokens_count_for_nothing() -> None:
    logits = random_logits(3, 150)
    logits[:, MASK] = 50.0
    logits[:, 100:] = float("-inf")
    parameters = sampling((1.0, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 200, 1.0, 0.0))
    want, got = both(logits, parameters)
    assert torch.equal(want, got)
    others = logits.clone()
    others[:, MASK] = float("-inf")
    assert torch.equal(got[0], others[0].topk(3).values[-1])
    assert torch.equal(got[2], others[2][others[2].isfinite()].min())


@pytest.mark.usefixtures("small_blocks")
def test_the_limit_of_a_row_does_not_depend_on_its_batch() -> None:
    logits = random_logits(4, 300, seed=4)
    parameters = sampling((1.0, 0, 0.9, 0.0), (0.0, 0, 1.0, 0.0), (0.8, 30, 0.7, 0.0), (1.0, 0, 1.0, 0.1))
    with implementation("triton"):
        together = filter_limit(logits, torch.arange(4, device=DEVICE), parameters, MASK)
        for r in range(4):
            alone = filter_limit(logits[r : r + 1], torch.tensor([r], device=DEVICE), parameters, MASK)
            assert torch.equal(alone, together[r : r + 1])


def test_a_filter_is_one_launch_whatever_the_rows_want() -> None:
    parameters = Sampling(*(t.to("meta") for t in sampling((1.0, 0, 1.0, 0.0))))
    with recording() as launches:
        row = torch.empty(32, dtype=torch.int64, device="meta")
        limit = filter_limit(torch.empty(32, 1000, device="meta"), row, parameters, MASK)
    assert [launch.grid for launch in launches] == [(32,)]
    assert limit.shape == (32,)
