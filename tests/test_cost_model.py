"""What a step costs: the grid, its corrections, its measurement and its file."""

import csv
import json
import logging
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig, ModeName, SamplingParams
from engine.cost_model import (
    REPEATS,
    CostModel,
    Output,
    StepTimer,
    conditions,
    measure,
    read_or_measure,
    shape_of,
)
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.loop import EngineLoop, step_costs
from engine.request import Request
from engine.segment import Settle
from engine.step import BLOCK, LENGTH, ROW_CACHED, SETTLE, Step
from fakes import TOY, TOY_ENGINE, generate, toy_engine, toy_model, write_checkpoint
from perf.plot_cost_model import SWEEP, roofline_seconds

QUERIES, CONTEXTS = [1, 8, 64, 512], [0, 1000, 8000]


def linear(query_tokens: float, context: float) -> float:
    """A device whose steps a grid describes exactly."""
    return 1e-3 + 2e-6 * query_tokens + 1e-7 * context


def linear_model(key: dict[str, object] | None = None) -> CostModel:
    return CostModel(QUERIES, CONTEXTS, [[linear(q, c) for c in CONTEXTS] for q in QUERIES], key)


def sweep() -> list[dict[str, str]]:
    with SWEEP.open(newline="") as file:
        return list(csv.DictReader(file))


sizes = st.floats(0, 20_000)
grids = st.lists(st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=3), min_size=4, max_size=4)


@given(
    grids, st.lists(st.tuples(sizes, sizes, st.floats(1e-5, 10.0)), max_size=20), sizes, sizes, sizes, sizes
)
@settings(max_examples=100)
def test_seconds_never_fall_in_either_argument_whatever_was_measured_and_observed(
    grid: list[list[float]],
    observed: list[tuple[float, float, float]],
    query_tokens: float,
    context: float,
    more_tokens: float,
    more_context: float,
) -> None:
    model = CostModel(QUERIES, CONTEXTS, grid)
    for tokens, cached, seconds in observed:
        model.observe(tokens, cached, seconds)
    less = model.seconds(query_tokens, context)
    assert 0 < less <= model.seconds(query_tokens + more_tokens, context + more_context) * (1 + 1e-12)


@given(grids, st.lists(st.tuples(sizes, sizes), min_size=1, max_size=10))
def test_many_steps_at_once_cost_what_they_cost_one_by_one(
    grid: list[list[float]], steps: list[tuple[float, float]]
) -> None:
    model = CostModel(QUERIES, CONTEXTS, grid)
    tokens, contexts = np.array(steps).T
    single = [model.seconds(*step) for step in steps]
    assert model.curve(tokens, contexts) == pytest.approx(single, rel=1e-12)
    assert model.curve(tokens, steps[0][1])[0] == pytest.approx(single[0], rel=1e-12)


def test_a_monotone_grid_is_met_exactly() -> None:
    model = linear_model()
    for tokens in QUERIES:
        assert [model.seconds(tokens, c) for c in CONTEXTS] == [linear(tokens, c) for c in CONTEXTS]


def test_seconds_are_bilinear_between_grid_points() -> None:
    model = CostModel([2, 4], [0, 100], [[1.0, 2.0], [3.0, 8.0]])
    assert model.seconds(3, 50) == pytest.approx((1 + 2 + 3 + 8) / 4)
    assert model.seconds(2, 25) == pytest.approx(1.25)
    assert model.seconds(2.5, 100) == pytest.approx(3.5)


def test_below_the_grid_the_weights_decide_and_beyond_it_the_upper_half() -> None:
    model = linear_model()
    assert model.seconds(0, 0) == model.seconds(1, 0)
    assert model.seconds(5000, 90_000) == pytest.approx(linear(5000, 90_000))
    stairs = CostModel([1, 1000, 1999, 2000], [0], [[1.0], [1.0], [2.0], [2.0]])
    assert stairs.seconds(3000, 0) == pytest.approx(3.0)


def test_a_grid_of_one_point_is_flat() -> None:
    model = CostModel([8], [0], [[0.5]])
    assert model.seconds(1, 0) == model.seconds(4096, 99) == 0.5
    assert model.curve(np.array([1, 4096]), 3.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("query_tokens", "context", "seconds"),
    [
        ([], [], []),
        ([1, 2], [0], [[1.0]]),
        ([2, 1], [0], [[1.0], [1.0]]),
        ([1], [0], [[0.0]]),
        ([1], [0], [[math.nan]]),
    ],
)
def test_what_is_no_grid_is_refused(
    query_tokens: list[float], context: list[float], seconds: list[list[float]]
) -> None:
    with pytest.raises(ValueError):
        CostModel(query_tokens, context, seconds)


def test_corrections_find_a_slower_device_and_are_undone() -> None:
    model, chance = linear_model(), np.random.default_rng(0)
    for factor in (1.3, 1.0):
        for _ in range(2000):
            tokens, context = 2 ** chance.uniform(0, 9), 9 ** chance.uniform(0, 4)
            noise = chance.uniform(0.95, 1.05)
            model.observe(tokens, context, factor * noise * linear(tokens, context))
        for tokens in (1, 20, 64, 300, 512):
            for context in (0, 500, 5000):
                assert model.seconds(tokens, context) == pytest.approx(
                    factor * linear(tokens, context), rel=0.05
                )


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_one_kind_of_step_corrects_itself_and_hardly_what_is_far(factor: float) -> None:
    model = linear_model()
    for _ in range(300):
        model.observe(8, 1000, factor * linear(8, 1000))
    assert model.seconds(8, 1000) == pytest.approx(factor * linear(8, 1000), rel=0.02)
    assert model.seconds(512, 0) == pytest.approx(linear(512, 0), rel=0.01)


def test_a_compilation_or_a_pause_says_little_and_corrections_are_bounded() -> None:
    model = linear_model()
    model.observe(8, 1000, 60.0)
    assert model.seconds(8, 1000) == pytest.approx(linear(8, 1000), rel=0.03)
    for nonsense in (0.0, -1.0, math.inf, math.nan):
        model.observe(8, 1000, nonsense)
    assert model.seconds(8, 1000) == pytest.approx(linear(8, 1000), rel=0.03)
    for _ in range(500):
        model.observe(8, 1000, 60.0)
    assert model.seconds(8, 1000) == pytest.approx(4 * linear(8, 1000))


def test_a_model_survives_its_text() -> None:
    model = linear_model({"device": "x", "list": (1, 2)})
    model.observe(8, 1000, 5e-3)
    again = CostModel.from_json(model.to_json())
    assert again.key == model.key == {"device": "x", "list": [1, 2]}
    points = np.array([0, 3, 8, 100, 9999]), np.array([9999, 0, 1000, 77, 500])
    assert again.curve(*points).tolist() == model.curve(*points).tolist()


def test_a_stored_model_is_used_again_where_it_was_measured(tmp_path: Path) -> None:
    file = str(tmp_path / "new folder" / "costs.json")
    made: list[str] = []

    def measured(device: str) -> CostModel:
        made.append(device)
        return linear_model({"device": device})

    for device in ("a", "a", "b", "b", "a"):
        model = read_or_measure(file, {"device": device}, lambda device=device: measured(device))  # type: ignore[misc]
        assert model.key == {"device": device} and model.seconds(8, 1000) == linear(8, 1000)
    assert made == ["a", "b", "a"]
    assert [path.name for path in Path(file).parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"costs"', '{"key": {}, "seconds": [[1]]}', "\ufffd"])
def test_a_file_that_is_no_model_is_measured_anew(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    model = read_or_measure(str(file), {}, linear_model)
    assert model.seconds(8, 1000) == linear(8, 1000) and "measuring anew" in caplog.text
    assert CostModel.from_json(file.read_text()).seconds(8, 1000) == linear(8, 1000)


def test_a_file_with_wrong_corrections_is_no_model() -> None:
    raw = json.loads(linear_model().to_json())
    for wrong in ([[0.1]], [[-1.0] * 3] * 4, [[math.nan] * 3] * 4, None):
        with pytest.raises(ValueError):
            CostModel.from_json(json.dumps({**raw, "corrected": wrong}))


def test_a_place_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    model = read_or_measure(str(tmp_path / "file" / "costs.json"), {}, linear_model)
    assert model.seconds(8, 1000) == linear(8, 1000) and "could not be stored" in caplog.text


def test_a_measurement_takes_medians_without_the_first_timing() -> None:
    calls: dict[tuple[int, int], int] = {}

    def run(tokens: int, context: int) -> float:
        calls[tokens, context] = calls.get((tokens, context), -1) + 1
        # the first one compiles, the third one is interrupted
        return linear(tokens, context) * {0: 1000, 2: 50}.get(calls[tokens, context], 1)

    model = measure(run, QUERIES, CONTEXTS, budget=10, key={"device": "x"})
    assert set(calls.values()) == {REPEATS} and model.key == {"device": "x"}
    assert model.seconds(64, 1000) == linear(64, 1000)


def test_a_measurement_keeps_to_its_budget_and_extrapolates_the_rest() -> None:
    def run(tokens: int, context: int) -> float:
        time.sleep(0.02)
        return linear(tokens, context)

    start = time.perf_counter()
    model = measure(run, QUERIES, CONTEXTS, budget=0.1)
    assert time.perf_counter() - start < 1.0
    assert model.seconds(512, 0) == pytest.approx(linear(512, 0))
    assert measure(run, QUERIES, CONTEXTS, budget=0).seconds(512, 8000) == linear(1, 0)


def test_steps_that_cannot_be_are_made_up_from_their_row_and_column() -> None:
    def run(tokens: int, context: int) -> float:
        return math.nan if context > 1000 * tokens else linear(tokens, context)

    model = measure(run, QUERIES, CONTEXTS, budget=10)
    assert model.seconds(1, 8000) == pytest.approx(linear(1, 8000))


def test_a_long_measurement_says_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    with caplog.at_level(logging.INFO):
        measure(linear, QUERIES, CONTEXTS, budget=10)
    assert "measuring step costs: 3 s of at most 10 s" in caplog.text
    assert "10 of 12 step costs measured within 10.0 s" in caplog.text


def test_timed_steps_have_the_tokens_and_the_context_asked_for() -> None:
    engine = toy_engine()
    steps: list[Step] = []

    def run(step: Step) -> Output:
        steps.append(step)
        return engine.executor.run([step])

    timer = StepTimer(run, TOY_ENGINE, TOY)
    queries, contexts = timer.grid()
    assert queries == [1, 2, 4, 8, 16, 32, 64, 128, 160] and contexts[0] == 0 and max(contexts) > 1000
    for tokens, context in ((1, 100), (8, 800), (20, 801), (160, 90)):
        steps.clear()
        assert timer(tokens, context) > 0
        fill, timed = steps
        assert fill.segments[:, BLOCK].sum() + fill.rows[:, ROW_CACHED].sum() == context
        assert timed.segments[:, LENGTH].sum() == tokens
        assert len(timed.segments) == min(tokens, TOY_ENGINE.max_running)
        assert np.unique(fill.grants[:, 2]).size == len(fill.grants) <= engine.status().total_pages
    assert math.isnan(timer(1, 1000)) and math.isnan(timer(160, 4000))
    # what blocks cannot take is prefilled
    small = replace(TOY_ENGINE, max_running=2)
    steps.clear()
    StepTimer(run, small, TOY)(160, 4)
    assert steps[-1].segments[:, [LENGTH, SETTLE]].tolist() == [[128, Settle.KEEP], [32, Settle.VERIFY]]


def test_a_measurement_leaves_the_engines_answers_as_they_are() -> None:
    def answers(measured: bool) -> dict[str, list[int]]:
        config = replace(TOY_ENGINE, lag=1)
        executor = LocalExecutor(toy_model(1, config), config)
        engine = Engine(config, executor)
        if measured:
            start = time.perf_counter()
            model = step_costs(executor)
            assert time.perf_counter() - start < 3 and model.seconds(1, 0) > 0
        modes: tuple[ModeName, ...] = ("ar", "diffusion", "linear_spec", "quadratic_spec")
        requests = [
            Request(f"{mode} {i}", (5 + i, 9, 6), SamplingParams(1.0, seed=i, max_tokens=24), mode=mode)
            for i in range(2)
            for mode in modes
        ]
        return generate(engine, requests)

    assert answers(measured=True) == answers(measured=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, TOY)
    return EngineConfig(
        str(folder), page_size=4, kv_tokens=2048, max_batch_tokens=160, cost_file=str(folder / "costs.json")
    )


async def test_a_server_measures_once_and_observes_every_step(config: EngineConfig) -> None:
    first = EngineLoop(config)
    assert "measure step costs" in first.phases and first.cost_model.key["device"]
    first.close()
    stored = Path(config.cost_file).read_text()
    loop = EngineLoop(config)
    assert loop.cost_model.to_json() == stored
    sampling = SamplingParams(0, max_tokens=20, ignore_eos=True)
    async for _ in loop.stream(Request("a", (5, 6), sampling, mode="ar")):
        pass
    assert loop.cost_model is loop.engine.cost_model and loop.cost_model.to_json() != stored
    loop.close()
    assert Path(config.cost_file).read_text() == loop.cost_model.to_json()


@pytest.mark.parametrize("lag", [0, 1])
async def test_observed_steps_have_the_shapes_that_were_run(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, lag: Literal[0, 1]
) -> None:
    monkeypatch.setattr("engine.loop.OBSERVED", 1)
    loop = EngineLoop(replace(config, lag=lag))
    seen: list[tuple[float, ...]] = []
    monkeypatch.setattr(loop.cost_model, "observe", lambda *step: seen.append(step))
    sampling = SamplingParams(0, max_tokens=6, ignore_eos=True)
    for name in ("a", "b"):
        async for _ in loop.stream(Request(name, (5, 6), sampling, mode="ar")):
            pass
    loop.close()
    assert all(0 < seconds < 10 for _, _, seconds in seen)
    one_answer = [(2, 0), *((1, cached) for cached in range(2, 7))]
    shapes = [step[:2] for step in seen]
    # at lag 1 nothing was reported before the first step, and the last may be one for nobody
    assert shapes[: len(one_answer) - lag] == one_answer[lag:]
    assert shapes.count((1, 6)) >= 2


def test_the_shape_of_a_step_counts_what_each_segment_reads() -> None:
    engine = toy_engine(max_batch_tokens=96)
    engine.add(Request("a", tuple(range(8, 38)) * 4, SamplingParams(0, max_tokens=8), mode="linear_spec"))
    shapes = []
    for _ in range(4):
        segments = engine.scheduler.schedule()
        shapes.append(shape_of(segments))
        engine.scheduler.started.clear()
        for segment in segments:
            segment.sequence.in_flight -= 1
        if engine.sequences["a"].decoding:
            break
    assert shapes == [(96, 0), (24, 96)]


def test_other_conditions_have_another_key(config: EngineConfig) -> None:
    key = conditions("a device", config, TOY)
    assert key == conditions("a device", replace(config, lag=1, cost_file="", default_mode="ar"), TOY)
    others = [
        conditions("another device", config, TOY),
        conditions("a device", replace(config, dtype="float64"), TOY),
        conditions("a device", replace(config, max_batch_tokens=256), TOY),
        conditions("a device", config, replace(TOY, num_layers=3)),
    ]
    assert key not in others and key["torch"]


def test_planning_with_a_cost_model_needs_no_torch() -> None:
    code = "import sys, engine.cost_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_the_published_sweep_is_met_where_it_is_monotone_and_nearly_elsewhere() -> None:
    rows = sweep()
    model = CostModel.from_sweep(rows)
    assert len(rows) == 384
    errors = []
    for row in rows:
        context = int(row["concurrency"]) * float(row["mean_history"])
        errors.append(1e3 * model.seconds(int(row["query_tokens"]), context) / float(row["mean_ms"]) - 1)
    size = np.abs(errors)
    assert np.median(size) < 0.015 and np.quantile(size, 0.95) < 0.09 and size.max() < 0.23
    assert sum(error < 1e-12 for error in size) > 100


def test_a_step_of_one_token_costs_what_the_smallest_published_step_does_but_for_its_context() -> None:
    model = CostModel.from_sweep(sweep())
    kv_seconds = 160 * 1024 / 6.4e12
    assert model.seconds(1, 328.8) == pytest.approx(6.992498e-3)
    assert model.seconds(1, 32_768) - model.seconds(1, 0) == pytest.approx(32_768 * kv_seconds)
    assert model.seconds(1, 10_000_000) - model.seconds(1, 0) == pytest.approx(10_000_000 * kv_seconds)
    # 24.5 us a token is what the sweep's saturated steps cost
    assert (model.seconds(8192, 0) - model.seconds(4096, 0)) / 4096 == pytest.approx(22e-6, rel=0.15)


def test_nothing_published_is_below_the_roofline() -> None:
    tokens = np.array([float(row["query_tokens"]) for row in sweep()])
    seconds = np.array([float(row["mean_ms"]) / 1e3 for row in sweep()])
    floors = roofline_seconds(tokens, 328.8, 32)
    assert (floors < seconds).all() and floors.min() == pytest.approx(3.21e-3, rel=0.01)
