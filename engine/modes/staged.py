"""A mode whose drafts or canvases are drawn elsewhere where they can be, and as the mode itself does where not.

The text is the mode's own: what comes back is verified, or is the canvas that this engine would have drawn.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from engine.config import ModeName
from engine.drafts import Wanted
from engine.segment import Segment, Settled
from engine.sequence import Sequence


@runtime_checkable
class Draftable(Protocol):
    """A mode that can say what it wants drawn, and go on from it at a seam."""

    @property
    def name(self) -> ModeName: ...

    @property
    def lossless(self) -> bool: ...

    @property
    def wanted(self) -> Wanted: ...

    def plan(self, sequence: Sequence) -> Segment | None: ...

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]: ...

    def at_seam(self, sequence: Sequence) -> bool: ...

    def take(self, sequence: Sequence, drafts: tuple[int, ...]) -> Segment:
        """The segment that ends a round with what was drawn elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class Staged:
    """Waits at a seam, with nothing in flight, for what was asked for; a round that nobody else draws is `inner`'s."""

    inner: Draftable

    @property
    def name(self) -> ModeName:
        return self.inner.name

    @property
    def lossless(self) -> bool:
        return self.inner.lossless

    def plan(self, sequence: Sequence) -> Segment | None:
        draft, position = sequence.draft, len(sequence.tokens)
        if draft.off or sequence.restart:
            return self.inner.plan(sequence)
        if sequence.in_flight and not _drafted(sequence):
            return None  # drafts go where its tokens end, once that is known: see each pass before the next
        if _midway(sequence):
            return self.inner.plan(sequence)
        if draft.answer is not None and draft.asked == (position, self.inner.wanted):
            return replace(self.inner.take(sequence, draft.answer.tokens), mode=self)
        return self.inner.plan(sequence) if draft.here == position else None

    def advance(self, sequence: Sequence, settled: Settled) -> list[int]:
        if settled.segment.drafts:
            assert sequence.draft.answer is not None
            sequence.denoise_passes += sequence.draft.answer.passes
            sequence.drafted_elsewhere += 1
        return self.inner.advance(sequence, settled)

    def at_seam(self, sequence: Sequence) -> bool:
        return self.inner.at_seam(sequence)

    def missing(self, sequence: Sequence) -> Wanted | None:
        """What to ask for now; None if nothing is missing, or it has been asked for."""
        draft, position, wanted = sequence.draft, len(sequence.tokens), self.inner.wanted
        if draft.off or sequence.restart or _midway(sequence) or sequence.in_flight:
            return None
        return None if draft.here == position or draft.asked == (position, wanted) else wanted


def _midway(sequence: Sequence) -> bool:
    """Whether a round has begun here: there is a canvas, or there are drafts."""
    return sequence.canvas_open or _drafted(sequence)


def _drafted(sequence: Sequence) -> bool:
    """Whether drafts have been planned here that are not verified yet."""
    return sequence.last is not None and not sequence.last.commits
