"""Autoregressive decoding: a round is one step and one token."""

from dataclasses import dataclass
from typing import ClassVar

from engine.config import EngineConfig, ModeName
from engine.segment import Pattern, Segment, Settle, Settled
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class AR:
    name: ClassVar[ModeName] = "ar"
    lossless: ClassVar[bool] = True

    @classmethod
    def of(cls, sequence: Sequence, config: EngineConfig, block_length: int) -> "AR":
        return cls()

    def plan(self, sequence: Sequence) -> Segment:
        return Segment(sequence, self, 1, Pattern.CAUSAL, Settle.SAMPLE, commits=1, restart=sequence.restart)

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]:
        return sequence.append(settled.tokens)

    def at_seam(self, sequence: Sequence) -> bool:
        return True
