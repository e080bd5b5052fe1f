"""Predicted speeds beside what others measured on a B200, and what must hold whatever the figures are."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.forecast import (
    ALL_REDUCE,
    BANDWIDTH_SHARE,
    BATCHED,
    BATCHED_FROM,
    LAYER,
    LINEAR_TOKENS,
    PEAK_SHARE,
    all_reduce_seconds,
    rounds,
    speed,
    step_seconds,
)
from cluster.gpu import GPUS
from cluster.published import LARGE, MIDDLE, SMALL, nearest
from engine.config import EngineConfig
from engine.cost_model import CostModel

DATA = Path(__file__).parent.parent / "perf" / "data"
B200, GB200 = GPUS["b200"], GPUS["gb200"]
CONFIG = EngineConfig(max_batch_tokens=2048, max_running=64)


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


SWEEP, SWEEP_8B = rows("b200_14b_forward_sweep.csv"), rows("b200_8b_forward_sweep_key.csv")
HISTORY = {(row["block"], row["concurrency"]): float(row["mean_history"]) for row in SWEEP}


def errors(file: list[dict[str, str]]) -> Iterator[float]:
    """Relative error of each row's predicted seconds."""
    model = (LARGE if file is SWEEP else MIDDLE).geometry()
    for row in file:
        measured = float(row["mean_ms"]) if file is SWEEP else float(row["sum_ms"]) / 2
        history = HISTORY[row["block"], row["concurrency"]]
        step = step_seconds(model, B200, 1, int(row["concurrency"]), int(row["query_tokens"]), history)
        yield 1e3 * step / measured - 1


def test_the_14b_on_a_b200_is_predicted_within_14_percent_and_mostly_within_3() -> None:
    size = np.abs(list(errors(SWEEP)))
    assert np.median(size) < 0.03 and np.quantile(size, 0.95) < 0.09 and size.max() < 0.14


def test_the_8b_which_the_fit_has_not_seen_is_predicted_within_17_percent_and_mostly_within_4() -> None:
    size = np.abs(list(errors(SWEEP_8B)))
    assert np.median(size) < 0.04 and size.max() < 0.17


def test_the_constants_are_those_that_fit_the_sweep_best() -> None:
    model, layers = LARGE.geometry(), LARGE.geometry().num_layers
    parts, measured = [], []
    for row in SWEEP:
        sequences, tokens = int(row["concurrency"]), int(row["query_tokens"])
        history = float(row["mean_history"])
        batched = sequences >= BATCHED_FROM
        whole = step_seconds(model, B200, 1, sequences, tokens, history) - layers * (
            LAYER + BATCHED * batched
        )
        bytes_alone = step_seconds(model, B200, 1, sequences, 0, history) - layers * (
            LAYER + BATCHED * batched
        )
        parts.append((layers, layers * batched, (whole - bytes_alone) * PEAK_SHARE))
        measured.append(float(row["mean_ms"]) / 1e3 - bytes_alone)
    scale = np.array([1e3 / float(row["mean_ms"]) for row in SWEEP])
    fitted = np.linalg.lstsq(np.array(parts) * scale[:, None], np.array(measured) * scale, rcond=None)[0]
    assert fitted == pytest.approx([LAYER, BATCHED, 1 / PEAK_SHARE], rel=0.01)


def test_the_engines_cost_model_of_the_same_sweep_agrees() -> None:
    costs = CostModel.from_sweep(SWEEP)
    for sequences, tokens in ((1, 1), (1, 32), (8, 128), (16, 512), (64, 1024), (64, 2048)):
        predicted = step_seconds(LARGE.geometry(), B200, 1, sequences, tokens, 800)
        assert predicted == pytest.approx(costs.seconds(tokens, sequences * 800), rel=0.2)
    assert BANDWIDTH_SHARE * B200.bandwidth == 6.4e12  # which the cost model assumes too


def test_tokens_of_a_round_are_the_served_sweeps_means() -> None:
    served = rows("b200_14b_sglang_served.csv")
    for block in (8, 16, 32):
        mean = np.mean([float(row["tpf_raw"]) for row in served if int(row["block"]) == block])
        assert LINEAR_TOKENS[block] == pytest.approx(2 * mean, rel=0.01)
    assert all(tokens <= block for block, tokens in LINEAR_TOKENS.items())


def test_the_served_14b_reached_a_quarter_to_two_thirds_of_what_is_predicted_for_its_forwards() -> None:
    shares = []
    for block, sequences in ((32, 1), (32, 4), (16, 8), (16, 16), (16, 32), (8, 64), (8, 128)):
        served = [
            float(row["system_tps"])
            for row in rows("b200_14b_sglang_served.csv")
            if (int(row["block"]), int(row["concurrency"])) == (block, sequences)
        ]
        step = step_seconds(LARGE.geometry(), B200, 1, sequences, block * sequences, 600)
        shares.append(np.mean(served) / (sequences * LINEAR_TOKENS[block] / (2 * step)))
    assert min(shares) > 0.25 and max(shares) < 0.7, shares


def test_nothing_is_predicted_above_the_roofline() -> None:
    weights = 25.67e9  # bytes that a forward of the 14B reads
    for gpu in GPUS.values():
        for ranks in (1, 2, 4, 8):
            for tokens in (1, 64, 2048):
                least = max(weights / gpu.bandwidth, tokens * weights / gpu.peak) / ranks
                assert step_seconds(LARGE.geometry(), gpu, ranks, 1, tokens, 0) > least


def test_steps_take_longer_with_more_of_anything_but_ranks() -> None:
    model = LARGE.geometry()
    base = step_seconds(model, GB200, 2, 8, 64, 1000)
    assert base < step_seconds(model, GB200, 2, 9, 64, 1000)
    assert base < step_seconds(model, GB200, 2, 8, 65, 1000)
    assert base < step_seconds(model, GB200, 2, 8, 64, 1001)
    assert base > step_seconds(model, GB200, 4, 8, 64, 1000)
    assert base < step_seconds(model, GPUS["h100"], 2, 8, 64, 1000)


def test_an_all_reduce_takes_what_the_table_says_and_more_for_more() -> None:
    for size, seconds in ALL_REDUCE:
        assert all_reduce_seconds(size) == pytest.approx(seconds)
    sizes = np.geomspace(1, 1e9, 200)
    taken = [all_reduce_seconds(size) for size in sizes]
    assert taken == sorted(taken) and taken[-1] > 1e-3


def test_short_blocks_win_where_many_run() -> None:
    model = LARGE.geometry()
    blocks = [
        speed(model, B200, 1, CONFIG, "linear_spec", batch, 800).block_length for batch in (1, 8, 32, 128)
    ]
    assert blocks == [32, 32, 16, 8]


def test_what_exceeds_a_step_takes_several() -> None:
    model = LARGE.geometry()
    small = EngineConfig(max_batch_tokens=1152)
    alone = speed(model, B200, 1, small, "quadratic_spec", 16, 800)  # 1152 query tokens
    four = speed(model, B200, 1, small, "quadratic_spec", 64, 800)
    assert alone.tokens_per_second == pytest.approx(four.tokens_per_second)


def test_every_published_model_has_its_acceptance_and_another_geometry_the_largest_ones() -> None:
    for published in (SMALL, MIDDLE, LARGE):
        assert nearest(published.geometry()) is published
        linear = [item for item in rounds(published.geometry(), 8) if item.mode == "linear_spec"]
        assert linear[-1].tokens == pytest.approx(12.6 * published.linear / LARGE.linear)
