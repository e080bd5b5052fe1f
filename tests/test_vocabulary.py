"""Noise, filters and confidence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.vocabulary import choose, confidence, gumbel_noise, keep_filtered


def noise(seeds: range, positions: range, vocab_size: int) -> torch.Tensor:
    seed = torch.tensor([s for s in seeds for _ in positions])
    position = torch.tensor([p for _ in seeds for p in positions])
    return gumbel_noise(seed, position, vocab_size).view(len(seeds), len(positions), vocab_size)


def test_noise_is_standard_gumbel() -> None:
    sample = noise(range(40), range(100), 1000).double().flatten()
    assert sample.isfinite().all()
    assert abs(float(sample.mean()) - 0.57722) < 0.003
    assert abs(float(sample.var()) - 1.64493) < 0.01
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):  # against the inverse of exp(-exp(-x))
        want = -torch.log(-torch.log(torch.tensor(quantile)))
        below = float((sample < want).double().mean())
        assert abs(below - quantile) < 4 * (quantile * (1 - quantile) / len(sample)) ** 0.5 + 1e-6


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_neighbouring_seeds_positions_and_tokens_are_uncorrelated(shift: tuple[int, int, int]) -> None:
    sample = noise(range(33), range(65), 257).double()
    sample = sample - sample.mean()
    a, b = sample[:32, :64, :256], sample[shift[0] :, shift[1] :, shift[2] :][:32, :64, :256]
    correlation = float((a * b).mean() / sample.var())
    assert abs(correlation) < 4 / a.numel() ** 0.5


def test_sampled_tokens_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, -3.0, 1.5]).double()
    rows = 40000
    one = torch.ones(rows)
    tokens = choose(
        logits.expand(rows, -1),
        one * 0.7,
        one.long() * 0,
        one,
        one * 0,
        one.long() * 9,
        torch.arange(rows),
        filtered=False,
    )
    want = (logits / 0.7).softmax(-1) * rows
    chi_square = float(((tokens.bincount(minlength=8) - want) ** 2 / want).sum())
    assert chi_square < 24.3  # 99.9 % of 7 degrees of freedom


def test_a_seed_of_64_bits_counts_whole() -> None:
    low, high = torch.tensor([5]), torch.tensor([5 + (1 << 40)])
    at = torch.tensor([3])
    assert not torch.equal(gumbel_noise(low, at, 64), gumbel_noise(high, at, 64))


def test_noise_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    seed, position = torch.tensor([7]), torch.tensor([11])
    assert torch.equal(gumbel_noise(seed, position, 100)[:, :60], gumbel_noise(seed, position, 60))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 12),
    st.just(1.0) | st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.floats(0.1, 2.0),
)
def test_filters_keep_what_their_definitions_say(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = (
        torch.randn(1, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / temperature
    )
    order = logits[0].argsort(descending=True).tolist()
    kept = order[: top_k or 10]
    inside = logits[0, kept].softmax(-1)
    wanted, mass = [], 0.0
    for token, probability in zip(kept, inside.tolist(), strict=True):
        if (mass < top_p or top_p == 1) and probability >= min_p * float(inside[0]):
            wanted.append(token)
        mass += probability
    got = keep_filtered(
        logits, torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double()
    )
    assert got.isfinite().nonzero()[:, 1].tolist() == sorted(wanted)


def test_filters_that_are_off_change_nothing_whatever_the_vocabulary() -> None:
    logits = torch.randn(3, 131072, generator=torch.Generator().manual_seed(1)) * 4
    off = torch.ones(3)
    assert torch.equal(keep_filtered(logits, off.long() * 0, off, off * 0), logits)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-44])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(2)) * 8
    one = torch.ones(20)
    tokens = choose(
        logits, one * temperature, one.long() * 0, one, one * 0, one.long(), torch.arange(20), filtered=True
    )
    assert torch.equal(tokens, logits.argmax(-1))


def test_confidence_is_the_softmax_probability() -> None:
    logits = torch.randn(5, 20, dtype=torch.float64)
    logits[:, 3] = float("-inf")
    tokens = logits.argmax(-1)
    torch.testing.assert_close(confidence(logits, tokens), logits.softmax(-1).max(-1).values)
