"""An engine does not start on kernels that are wrong, or that differ from run to run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.batch import Layout, unpack_layout
from engine.config import SamplingParams
from engine.executor import LocalExecutor
from engine.request import Request
from engine.runner import Runner
from engine.selfcheck import check_graphs, check_kernels
from fakes import generate, toy_engine
from kernels.backend import implementation, on_triton
from kernels.norm import add_rms_norm

Norm = Callable[..., tuple[Tensor, Tensor]]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="the toy's heads and pages are too small for a GPU; tests/test_gpu.py has its own",
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.selfcheck.CONTEXT", 6)


def runner(**settings: Any) -> Runner:
    executor = toy_engine(1, dtype="float32", **settings).executor
    assert isinstance(executor, LocalExecutor)
    return executor.runner


def replaced(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Lets every normalisation be followed by a change."""

    def norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        normalised, residual = add_rms_norm(x, *rest)
        return change(normalised), residual

    monkeypatch.setattr("engine.layers.add_rms_norm", norm)


@pytest.mark.parametrize("settings", [{"kv_tokens": 208}, {"max_running": 1, "exact": True}])
def test_right_kernels_pass(settings: dict[str, Any]) -> None:
    with implementation("triton"):
        ready = runner(**settings)
        check_kernels(ready)
        check_graphs(ready)


def test_kernels_that_differ_from_run_to_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def drift(x: Tensor) -> Tensor:
        calls.append(1)
        return x * (1 + 1e-6 * len(calls))

    replaced(monkeypatch, drift)
    with implementation("triton"), pytest.raises(RuntimeError, match="different logits for the same input"):
        check_kernels(runner(max_running=1))


def test_kernels_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda x: x * 1.01 if on_triton(x) else x)
    with implementation("triton"), pytest.raises(RuntimeError, match="off by .* of their norm"):
        check_kernels(runner(max_running=1))


def test_graphs_without_the_adapter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server once captured its drafts with the base weights, and nobody noticed."""

    def without(packed: Tensor, size: int, rows: Tensor | None, lora: bool) -> Layout:
        return unpack_layout(packed, size, rows, False)

    with implementation("triton"):
        ready = runner(block_length=8)
        monkeypatch.setattr("engine.graphs.unpack_layout", without)
        with pytest.raises(RuntimeError, match="captured graphs bring other tokens"):
            check_graphs(ready)


def test_the_check_leaves_no_trace_in_an_answer() -> None:
    request = Request("0", (5, 9, 11), SamplingParams(temperature=0, max_tokens=3), mode="ar")
    fresh = generate(toy_engine(1, dtype="float32"), [request])
    with implementation("triton"):
        engine = toy_engine(1, dtype="float32")
        assert isinstance(engine.executor, LocalExecutor)
        check_kernels(engine.executor.runner)
        check_graphs(engine.executor.runner)
        assert generate(engine, [request]) == fresh
