"""Linear self-speculation: one bidirectional forward drafts a block, one causal forward verifies it."""

from dataclasses import dataclass
from typing import ClassVar

from engine.config import EngineConfig, ModeName
from engine.drafts import Wanted
from engine.segment import Pattern, Segment, Settle, Settled
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class LinearSpec:
    name: ClassVar[ModeName] = "linear_spec"
    lossless: ClassVar[bool] = True
    block_length: int
    lora: bool

    @classmethod
    def of(cls, sequence: Sequence, config: EngineConfig, block_length: int) -> "LinearSpec":
        return cls(block_length, config.draft_lora)

    def plan(self, sequence: Sequence) -> Segment:
        last = sequence.last
        if last is not None and last.settle is Settle.DENOISE:
            return Segment(
                sequence, self, last.block, Pattern.CAUSAL, Settle.VERIFY, last.block, drafted=last.block - 1
            )
        return Segment(
            sequence,
            self,
            self.block_length,
            Pattern.CANVAS,
            Settle.DENOISE,
            commits=0,
            restart=sequence.restart,
            lora=self.lora,
        )

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.block_length)

    def take(self, sequence: Sequence, drafts: tuple[int, ...]) -> Segment:
        block = len(drafts) + 1
        return Segment(
            sequence, self, block, Pattern.CAUSAL, Settle.VERIFY, block, drafted=block - 1, drafts=drafts
        )

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]:
        return sequence.append_verified(settled)

    def at_seam(self, sequence: Sequence) -> bool:
        return sequence.last is None or sequence.last.settle is not Settle.DENOISE
