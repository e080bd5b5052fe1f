"""Noise, the choice of a token and its confidence: statistics, and the kernels against the reference."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from fakes import DEVICE
from kernels.backend import implementation, recording
from kernels.filters import filter_limit
from kernels.sampling import Sampling
from kernels.vocabulary import FIELDS, choose, combine, gumbel_noise, summarise
from test_filters import MASK, random_logits, sampling

Side = Literal["torch", "triton"]
SIDES: list[Side] = ["torch", "triton"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.vocabulary.CHUNK", 64)
    monkeypatch.setattr("kernels.filters.BLOCK", 128)


def chosen(
    side: Side, logits: Tensor, parameters: Sampling, position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and confidences of logits whose rows are those of the table, by default all at position 9."""
    row = torch.arange(len(logits), device=logits.device)
    position = torch.full_like(row, 9) if position is None else position
    with implementation(side):
        return choose(logits.clone(), row, position, parameters, MASK, False, True, True)


def mixed() -> Sampling:
    """Greedy, sampled and filtered rows."""
    return sampling(
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 8, 1.0, 0.0),
        (1.5, 0, 0.9, 0.0),
        (0.0, 5, 0.5, 0.1),
        (1.0, 0, 1.0, 0.2),
        (100.0, 50, 0.8, 0.0),
        (1e-6, 0, 1.0, 0.0),
    )


def noise(seeds: range, positions: range, vocab_size: int) -> Tensor:
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


def test_noise_is_accurate_over_all_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 on the same float32 uniforms: dense ones, and the smallest, largest and those at the seam."""
    edges = [0, 1, 2, 3, 2**32 - 1, 2**32 - 2, *range(int(0.02 * 2**32) - 500, int(0.02 * 2**32) + 500)]
    bits = torch.cat((torch.tensor(edges), torch.arange(0, 2**32, 9973)))
    monkeypatch.setattr("kernels.vocabulary._mix", lambda x: bits[None] if x.dim() == 2 else x)
    sample = gumbel_noise(torch.tensor([0]), torch.tensor([0]), len(bits))[0]
    uniform = ((bits.float() + 0.5) / 2**32).clamp(max=1 - 2**-24).double()
    exact = -torch.log(-torch.log1p(-uniform))
    assert float((sample.double() - exact).abs().max()) < 4e-6
    assert float(sample.max()) < 23


def test_a_seed_of_64_bits_counts_whole() -> None:
    low, high = torch.tensor([5]), torch.tensor([5 + (1 << 40)])
    at = torch.tensor([3])
    assert not torch.equal(gumbel_noise(low, at, 64), gumbel_noise(high, at, 64))


def test_noise_of_a_token_does_not_depend_on_the_vocabulary_or_its_shard() -> None:
    seed, position = torch.tensor([7]), torch.tensor([11])
    whole = gumbel_noise(seed, position, 100)
    assert torch.equal(whole[:, :60], gumbel_noise(seed, position, 60))
    assert torch.equal(whole[:, 60:], gumbel_noise(seed, position, 40, 60))


def test_the_kernel_makes_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one token has the token's noise as its score."""
    monkeypatch.setattr("kernels.vocabulary.CHUNK", 1)
    seed = torch.tensor([0, 1, (1 << 62) + 12345, (1 << 32) + 1], device=DEVICE)
    position = torch.tensor([0, 1, 262143, 77], device=DEVICE)
    parameters = sampling(*[(1.0, 0, 1.0, 0.0)] * 4)._replace(seed=seed)
    logits = torch.zeros(4, 25, device=DEVICE)
    unlimited = torch.full((4,), float("-inf"), device=DEVICE)
    with implementation("triton"):
        row = torch.arange(4, device=DEVICE)
        summary = summarise(logits, row, position, parameters, unlimited, mask_id=-1, vocab_start=131000)
    want = gumbel_noise(seed, position, 25, 131000)
    torch.testing.assert_close(summary[:, :, 2], want, rtol=0, atol=1e-5)


def test_sampled_tokens_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 9.0, -1.0, 0.5, 0.5, -3.0, 1.5]).double()
    rows = 40000
    parameters = Sampling(
        torch.tensor([0.7]), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([9])
    )
    tokens, _ = choose(
        logits.repeat(rows, 1),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
        parameters,
        MASK,
        greedy=False,
        filtered=False,
        confident=False,
    )
    logits[MASK] = float("-inf")
    want = (logits / 0.7).softmax(-1) * rows
    deviation = (tokens.bincount(minlength=9) - want) ** 2 / want
    assert float(deviation.nansum()) < 24.3  # 99.9 % of 7 degrees of freedom
    assert not (tokens == MASK).any()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-44])
def test_a_vanishing_temperature_is_greedy(side: Side, temperature: float) -> None:
    logits = random_logits(6, 300, seed=2, scale=8.0)
    tokens, _ = chosen(side, logits, sampling(*[(temperature, 0, 1.0, 0.0)] * 6))
    logits[:, MASK] = float("-inf")
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("small_chunks")
def test_confidence_is_the_unscaled_probability_of_the_token_without_the_mask_token(side: Side) -> None:
    logits = random_logits(8, 300)
    logits[:, MASK] = 40.0
    tokens, confidence = chosen(side, logits, mixed())
    assert not (tokens == MASK).any()
    logits[:, MASK] = float("-inf")
    torch.testing.assert_close(confidence, logits.softmax(-1).gather(-1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("vocab_size", [50, 64, 200, 257])
@pytest.mark.usefixtures("small_chunks")
def test_the_kernels_choose_what_the_reference_chooses(vocab_size: int) -> None:
    for seed in range(2):
        logits = random_logits(8, vocab_size, seed)
        want, got = (chosen(side, logits, mixed(), torch.arange(8, device=DEVICE) + seed) for side in SIDES)
        assert torch.equal(want[0], got[0])
        torch.testing.assert_close(want[1], got[1])


@pytest.mark.usefixtures("small_chunks")
def test_the_kernels_choose_what_the_reference_chooses_at_extremes() -> None:
    for scale in (1e4, 1e-4, 0.0):
        for temperature in (1e-6, 1.0, 100.0):
            rows = [
                (temperature, 0, 1.0, 0.0),
                (temperature, 3, 1.0, 0.0),
                (temperature, 0, 0.5, 0.1),
                (0.0, 0, 1.0, 0.0),
            ]
            logits = random_logits(4, 150, seed=6, scale=scale)
            want, got = (chosen(side, logits, sampling(*rows)) for side in SIDES)
            assert torch.equal(want[0], got[0])
            torch.testing.assert_close(want[1], got[1])


@pytest.mark.usefixtures("small_chunks")
def test_summaries_and_their_merging_equal_the_reference() -> None:
    logits = random_logits(8, 260, seed=3)
    logits[1, 64:128] = float("-inf")
    row, position = torch.arange(8, device=DEVICE), torch.arange(8, device=DEVICE) * 1000
    with implementation("torch"):
        limit = filter_limit(logits.clone(), row, mixed(), MASK)
    summaries, answers = [], []
    for side in SIDES:
        with implementation(side):
            summaries.append(summarise(logits, row, position, mixed(), limit, MASK, 0))
            answers.append(combine(summaries[0], row, mixed()))
    assert summaries[0].shape == (8, 5, FIELDS)
    torch.testing.assert_close(summaries[0], summaries[1])
    assert torch.equal(summaries[0][:, :, 3], summaries[1][:, :, 3])
    assert torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[0][1], answers[1][1])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("small_chunks")
def test_equal_logits_give_the_lowest_token(side: Side) -> None:
    logits = torch.zeros(1, 300, device=DEVICE)
    logits[0, [70, 77, 200]] = 4.0
    assert chosen(side, logits, sampling((0.0, 0, 1.0, 0.0)))[0].tolist() == [70]


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_of_the_mask_token_alone_and_impossible_tokens_are_passed_over() -> None:
    logits = torch.full((8, 65 + 64), float("-inf"), device=DEVICE)
    logits[:, 70] = -3.0
    logits[:, MASK] = 8.0
    for side in SIDES:
        tokens, confidence = chosen(side, logits, mixed())
        assert tokens.tolist() == [70] * 8
        assert confidence.tolist() == [1.0] * 8


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.usefixtures("small_chunks")
def test_shards_of_the_vocabulary_change_no_bit(side: Side, shards: int) -> None:
    logits = random_logits(8, 512, seed=5)
    row, position = torch.arange(8, device=DEVICE), torch.arange(8, device=DEVICE) + 40
    with implementation(side):
        limit = filter_limit(logits.clone(), row, mixed(), MASK)
        whole = summarise(logits, row, position, mixed(), limit, MASK, 0)
        width = 512 // shards
        parts = [
            summarise(logits[:, first : first + width], row, position, mixed(), limit, MASK, first)
            for first in range(0, 512, width)
        ]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("small_chunks")
def test_a_row_does_not_depend_on_its_batch(side: Side) -> None:
    logits = random_logits(8, 300, seed=8)
    together = chosen(side, logits, mixed())
    at = torch.tensor([9], device=DEVICE)
    with implementation(side):
        for r in range(8):
            row = torch.tensor([r], device=DEVICE)
            token, confidence = choose(
                logits[r : r + 1].clone(), row, at, mixed(), MASK, False, True, confident=True
            )
            assert torch.equal(token, together[0][r : r + 1])
            assert torch.equal(confidence, together[1][r : r + 1])


def test_what_the_host_knows_leaves_out_work_and_changes_no_token() -> None:
    logits = random_logits(3, 100)
    row = torch.arange(3, device=DEVICE)
    with implementation("torch"):
        for parameters, greedy in (
            (sampling(*[(0.0, 0, 1.0, 0.0)] * 3), True),
            (sampling(*[(0.9, 0, 1.0, 0.0)] * 3), False),
        ):
            lean = choose(logits.clone(), row, row, parameters, MASK, greedy, filtered=False, confident=False)
            full = choose(logits.clone(), row, row, parameters, MASK, False, filtered=True, confident=True)
            assert torch.equal(lean[0], full[0])
            assert lean[1].shape == (0,)


def test_the_launches_are_the_same_whatever_the_host_knows() -> None:
    logits = torch.empty(32, 131072, device="meta")
    row = torch.empty(32, dtype=torch.int64, device="meta")
    parameters = Sampling(*(t.to("meta") for t in mixed()))
    recorded = []
    for known in ((True, False, False), (False, True, True)):
        with recording() as launches:
            tokens, confidence = choose(logits, row, row, parameters, MASK, *known)
        assert (tokens.dtype, tokens.shape, confidence.shape) == (torch.int64, (32,), (32,))
        recorded.append([(launch.kernel, launch.grid, launch.constants) for launch in launches])
    assert recorded[0] == recorded[1]
    assert [grid for _, grid, _ in recorded[0]] == [(32,), (32, 32), (32,)]
