"""Times functions side by side: in turns, on inputs that no cache holds, in a CUDA graph where there is a GPU."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
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


def side_by_side(
    sides: Mapping[str, Sequence[Call]], device: torch.device, repeats: int = 20, graphs: bool = True
) -> dict[str, float]:
    """Median seconds of one call of each side.

    A side is a list of calls that do the same with different inputs; they run one after the other, and the sides take
    turns. On a GPU each side's calls are one CUDA graph, unless graphs is false, and events tell the time.
    """
    runs = {name: _prepared(calls, device, graphs) for name, calls in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name].append(_seconds(run, device, graphs) / len(sides[name]))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a plain copy that no cache can hold."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / side_by_side({"copy": [lambda: target.copy_(source)]}, device)["copy"]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product of random matrices."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / side_by_side({"matmul": [lambda: torch.mm(a, b, out=out)]}, device)["matmul"]


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _prepared(calls: Sequence[Call], device: torch.device, graphs: bool) -> Call:
    """All calls as one, compiled and warm."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize()
    if not graphs:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _seconds(run: Call, device: torch.device, ahead: bool) -> float:
    """ahead: let the host be ahead of the GPU, so that the launch of the first kernel is not timed."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    if ahead:
        torch.cuda._sleep(500_000)  # type: ignore[no-untyped-call]  # cycles, some 0.3 ms
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3
