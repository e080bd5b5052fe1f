"""Times functions side by side: in turns, on inputs that no cache holds, in a CUDA graph where there is a GPU."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    here: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for name in ("torch", "triton", "transformers"):
        try:
            here[name] = version(name)
        except PackageNotFoundError:
            here[name] = None
    if torch.cuda.is_available():
        here |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return here


def rotations(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of so many bytes it takes until the first has left the GPU's L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(nbytes, 1))))


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call; None where the side raised, and note says what."""

    seconds: float | None
    note: str = ""


def side_by_side(
    sides: Mapping[str, Sequence[Call]],
    device: torch.device,
    repeats: int = 20,
    eager: Collection[str] = (),
    ahead: bool = False,
) -> dict[str, Timing]:
    """Times each side.

    A side is a list of calls that do the same with different inputs; they run one after the other, and the sides take
    turns. On a GPU each side's calls are one CUDA graph, but for the sides named in eager, and events tell the time.
    ahead: the host gets a start on the GPU, which graphs have anyway, so that what it does before the first kernel is
    not timed.
    """
    runs: dict[str, _Run] = {}
    timings: dict[str, Timing] = {}
    for name, calls in sides.items():
        try:
            runs[name] = _prepared(calls, device, name not in eager, ahead)
        except Exception as error:  # whatever another library raises is a result too
            timings[name] = Timing(None, f"{type(error).__name__}: {error}".partition("\n")[0][:200])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name].append(_seconds(run, device) / len(sides[name]))
    for name in runs:
        note = "eager" if name in eager and device.type == "cuda" else ""
        timings[name] = Timing(statistics.median(samples[name]), note)
    return timings


def seconds_of(
    call: Call, device: torch.device, repeats: int = 20, eager: bool = False, ahead: bool = False
) -> float:
    """Median seconds of one call, as `side_by_side` takes them. Raises RuntimeError if it raises anything."""
    timing = side_by_side({"call": [call]}, device, repeats, ("call",) if eager else (), ahead)["call"]
    if timing.seconds is None:
        raise RuntimeError(timing.note)
    return timing.seconds


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading what no cache can hold, which is faster than a copy on a GPU."""
    size = 2**32 if device.type == "cuda" else 2**26
    source = torch.empty(size // 4, device=device).normal_()
    return size / seconds_of(source.sum, device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product of random matrices."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class _Run:
    run: Call
    ahead: bool


def _prepared(calls: Sequence[Call], device: torch.device, graphs: bool, ahead: bool) -> _Run:
    """All calls as one, compiled and warm."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if device.type != "cuda":
        return _Run(run, ahead)
    run()
    torch.cuda.synchronize()
    if not graphs:
        return _Run(run, ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return _Run(graph.replay, True)


def _seconds(prepared: _Run, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        prepared.run()
        return time.perf_counter() - start
    before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    if prepared.ahead:
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # cycles, some 1 ms
    before.record()
    prepared.run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def write_report(target: Path | None, report: dict[str, Any]) -> None:
    """Writes JSON, if anywhere. Benchmarks do after every suite, so that one that is cut short leaves the others."""
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")
