"""Quadratic self-speculation: one forward verifies the pending drafts and drafts from every point where they may end.

The first round of a sequence has masks for drafts, which nothing accepts; it costs a token and needs no special case.
"""

from dataclasses import dataclass
from typing import ClassVar

from engine.config import EngineConfig, ModeName
from engine.segment import Pattern, Segment, Settle, Settled
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class QuadraticSpec:
    name: ClassVar[ModeName] = "quadratic_spec"
    lossless: ClassVar[bool] = True
    block_length: int

    @classmethod
    def of(cls, sequence: Sequence, config: EngineConfig, block_length: int) -> "QuadraticSpec":
        return cls(config.quadratic_block_length)

    def plan(self, sequence: Sequence) -> Segment:
        return Segment(
            sequence,
            self,
            self.block_length,
            Pattern.QUADRATIC,
            Settle.VERIFY,
            commits=self.block_length,
            drafted=self.block_length - 1 if sequence.last is not None else 0,
            restart=sequence.restart,
        )

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]:
        return sequence.append_verified(settled)

    def at_seam(self, sequence: Sequence) -> bool:
        return True
