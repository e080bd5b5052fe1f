"""The benchmark of whole forwards, at its CPU scale, every suite."""

import json
from dataclasses import replace

import pytest
import torch

from perf.bench_forward import SCALES, SUITES, Bench, e1, e2, f1, main


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SCALES["cpu"], torch.device("cpu"), repeats=1)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    target = tmp_path_factory.mktemp("bench") / "forward.json"
    if torch.cuda.is_available():
        pytest.skip("on a GPU perf/gpu_suite.sh runs it at full scale")
    assert main(["--repeats", "1", "--json", str(target)]) == 0
    rows: list[dict[str, object]] = json.loads(target.read_text())["rows"]
    return rows


def test_every_suite_has_figures(report: list[dict[str, object]]) -> None:
    assert {row["suite"] for row in report} == set(SUITES)
    assert all(isinstance(row["value"], float | int) and row["value"] >= 0 for row in report)


def test_the_floor_is_the_weights_and_the_context_at_the_read_bandwidth(bench: Bench) -> None:
    bench.bandwidth, bench.rate = 1e9, 1e30
    model, shape = bench.model, bench.model.config
    body = sum(
        w.values.numel() for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    read = 4 * (body + model.output.numel())
    read += 4 * 3 * 50 * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim
    assert bench.floor(rows=3, block=2, context=50) == pytest.approx(read / 1e9)


def test_contexts_that_do_not_fit_are_left_out(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "scale", replace(bench.scale, tokens=(1,), contexts=(32, 10**6)))
    assert len(list(f1(bench))) == 1
    assert "is skipped" in capsys.readouterr().err


def test_hugging_face_says_the_same_with_the_same_memory(bench: Bench) -> None:
    (row,) = e1(bench)
    assert f"{bench.scale.answer} tokens alike" in row.shape


def test_as_many_tokens_stand_as_are_forced(bench: Bench) -> None:
    one, four = e2(bench)
    assert "1.0 had" in one.shape and "unlike" not in one.shape + four.shape
    assert one.other == pytest.approx(one.value / one.ratio)
    assert four.value > one.value
