"""Where an op runs: as a Triton kernel on CUDA tensors, as plain torch on others, unless a caller of this module says.

Every kernel is launched through `launch`, so that the very launches of a model can also be recorded, on tensors without
memory, and compiled for a GPU that is not there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

_forced: Literal["torch", "triton"] | None = None
_recorded: "list[Launch] | None" = None


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: a jitted kernel, its grid, positional arguments in order, constexpr arguments, compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Tensor | int | float, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def on_triton(x: Tensor) -> bool:
    """Whether ops on x run as Triton kernels."""
    return x.is_cuda if _forced is None else _forced == "triton"


@contextmanager
def implementation(name: Literal["torch", "triton"]) -> Iterator[None]:
    """Forces one side for everything inside. Triton on CPU tensors needs its interpreter, `TRITON_INTERPRET=1` in the
    environment before anything imports Triton."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches inside instead of running them; meant for tensors on the `meta` device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with implementation("triton"):
            yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | int | float,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Runs a jitted kernel: args are its arguments in their order, constants its constexpr ones by name."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, num_warps, num_stages))
        return
    kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
