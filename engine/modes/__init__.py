"""Decode modes: small state machines outside the scheduler. A new one is a file, a line here and a name in config."""

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
    a seam, where the mode may change. Each class has `of(sequence, config, block_length)`, the mode for a sequence,
    with a block of that many tokens unless the request or the engine sets another for this mode, and says by
    `lossless` whether its text is AR's.
    """

    @property
    def name(self) -> ModeName: ...

    def plan(self, sequence: Sequence) -> Segment | None: ...

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]: ...

    def at_seam(self, sequence: Sequence) -> bool: ...


MODES: dict[ModeName, type[AR] | type[Diffusion] | type[LinearSpec] | type[QuadraticSpec]] = {
    mode.name: mode for mode in (AR, Diffusion, LinearSpec, QuadraticSpec)
}
