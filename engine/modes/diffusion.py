"""Block diffusion: a canvas is denoised pass by pass, then run causally once, which keeps its KV.

The device decides which of the two a segment is, by the masks left, so that a host that lags need not know.
"""

from dataclasses import dataclass
from typing import ClassVar

from engine.config import EngineConfig, ModeName
from engine.drafts import Wanted
from engine.segment import Pattern, Segment, Settle, Settled
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Diffusion:
    name: ClassVar[ModeName] = "diffusion"
    lossless: ClassVar[bool] = False
    block_length: int
    threshold: float
    steps: int

    @classmethod
    def of(cls, sequence: Sequence, config: EngineConfig, block_length: int) -> "Diffusion":
        asked = sequence.request.diffusion
        return cls(asked.block_length or block_length, asked.threshold, asked.steps)

    def plan(self, sequence: Sequence) -> Segment | None:
        if sequence.wanted is not None and sequence.in_flight:
            return None  # a switch waits for a seam: see each pass before the next
        return Segment(
            sequence,
            self,
            self.block_length,
            Pattern.CANVAS,
            Settle.DENOISE,
            commits=self.block_length,
            restart=sequence.restart,
            threshold=self.threshold,
            steps=self.steps,
        )

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.block_length, True, self.threshold, self.steps)

    def take(self, sequence: Sequence, drafts: tuple[int, ...]) -> Segment:
        """A canvas without masks, which is run causally and committed."""
        block = len(drafts) + 1
        return Segment(sequence, self, block, Pattern.CANVAS, Settle.DENOISE, commits=block, drafts=drafts)

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]:
        sequence.canvas_open = not settled.tokens
        if sequence.canvas_open:
            sequence.denoise_passes += 1
        else:
            sequence.canvases += 1
        return sequence.append(settled.tokens)

    def at_seam(self, sequence: Sequence) -> bool:
        return not sequence.in_flight and not sequence.canvas_open
