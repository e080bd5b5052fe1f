"""Decode modes: small state machines outside the scheduler. A new mode is a new file and a line here."""

from typing import Protocol

from engine.config import ModeName
from engine.modes.ar import AR
from engine.modes.diffusion import Diffusion
from engine.modes.linear_spec import LinearSpec
from engine.modes.quadratic_spec import QuadraticSpec
from engine.segment import Segment, Settled
from engine.sequence import Sequence


class Mode(Protocol):
    """Plans a prefilled sequence's next segment and reads what became of it. Holds no state of a sequence.

    `plan` reads `sequence.last`, the segment planned before, and has no effect. `advance` commits what a segment
    brought, at once or a step late. `at_seam` says whether, after all that was planned, the sequence surely stands at
    a seam, where the mode may change.
    """

    @property
    def name(self) -> ModeName: ...

    def plan(self, sequence: Sequence) -> Segment | None: ...

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]: ...

    def at_seam(self, sequence: Sequence) -> bool: ...


def build_mode(name: ModeName, block_length: int, sequence: Sequence, draft_lora: bool) -> Mode:
    """The mode of that name for one sequence; `block_length` is ignored by AR."""
    match name:
        case "ar":
            return AR()
        case "diffusion":
            diffusion = sequence.request.diffusion
            return Diffusion(block_length, diffusion.threshold, diffusion.steps)
        case "linear_spec":
            return LinearSpec(block_length, draft_lora)
        case "quadratic_spec":
            return QuadraticSpec(block_length)
