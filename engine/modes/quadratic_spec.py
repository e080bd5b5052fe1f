"""Quadratic self-speculation: one forward verifies the pending drafts and drafts from every point where they may end.

The first round of a sequence has masks for drafts, which nothing accepts; it costs a token and needs no special case.
"""

from dataclasses import dataclass
from typing import ClassVar

from engine.config import ModeName
from engine.segment import Pattern, Segment, Settle, Settled
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class QuadraticSpec:
    name: ClassVar[ModeName] = "quadratic_spec"
    block_length: int

    def plan(self, sequence: Sequence) -> Segment:
        return Segment(
            sequence,
            self,
            self.block_length,
            Pattern.QUADRATIC,
            Settle.VERIFY,
            commits=self.block_length,
            restart=sequence.restart,
        )

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]:
        sequence.drafted += settled.segment.block - 1
        sequence.accepted += len(settled.tokens) - 1
        return sequence.append(settled.tokens)

    def at_seam(self, sequence: Sequence) -> bool:
        return True
