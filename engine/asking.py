"""An engine's dealings with whoever draws its drafts: asks, deadlines, misses. It never waits long for anybody."""

import secrets
import time
from collections.abc import Callable, Iterable

from engine.config import ModelConfig
from engine.drafts import Answer, Ask, DraftSource, Verdict
from engine.modes import Mode
from engine.modes.staged import Draftable, Staged
from engine.sequence import Sequence

MISSES = 3  # in a row, after which a sequence asks nobody for a while
OFF_SECONDS = 1.0
WAIT_SECONDS = 0.002  # at a time, since new requests come by another way


class Asking:
    """Asks a source for the drafts of staged modes. `answered` and `missed` count asks."""

    def __init__(
        self,
        source: DraftSource,
        patience: float,
        canvases: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """patience: seconds that an answer may take. canvases: whether those of the source are this engine's own, to
        the token; otherwise it is asked for drafts alone, which are verified."""
        self.source, self.patience, self.canvases, self.clock = source, patience, canvases, clock
        self.answered = self.missed = 0
        self._keys = secrets.randbits(31) << 32
        self._open: dict[int, Sequence] = {}  # asked and not answered, by key

    def stage(self, mode: Mode) -> Mode:
        """The mode, with its drafts drawn elsewhere if it can do with that."""
        return Staged(mode) if isinstance(mode, Draftable) and (mode.lossless or self.canvases) else mode

    def collect(self, model: ModelConfig) -> None:
        """Hands answers to their sequences and gives up on those that are late."""
        for answer in self.source.poll():
            sequence = self._open.get(answer.key)
            if sequence is None or answer.number != sequence.draft.number:
                continue  # late
            del self._open[answer.key]
            draft = sequence.draft
            assert draft.asked is not None
            if answer.verdict is Verdict.FORGOTTEN:
                draft.told = 0
            if answer.verdict is Verdict.FORGOTTEN and not draft.whole:
                draft.asked = None
            elif _fits(answer, draft.asked[1].block, model):
                draft.answer, draft.missed = answer, 0
                self.answered += 1
            else:
                self._miss(sequence)
        late = self.clock() - self.patience
        for sequence in [sequence for sequence in self._open.values() if sequence.draft.since < late]:
            del self._open[sequence.draft.key]
            self._miss(sequence)

    def ask(self, running: Iterable[Sequence]) -> None:
        """Asks for all that sequences miss, at once."""
        now, asks = self.clock(), []
        for sequence in running:
            if not isinstance(sequence.mode, Staged):
                continue
            draft, position = sequence.draft, len(sequence.tokens)
            if draft.off and now >= draft.off_until:
                draft.off, draft.missed = False, MISSES - 1
            wanted = sequence.mode.missing(sequence)
            if wanted is None:
                continue
            if draft.key < 0:
                draft.key = self._keys + sequence.arrival % 2**32
            draft.number = (draft.number + 1) % 2**32
            draft.asked, draft.answer, draft.since = (position, wanted), None, now
            tokens = tuple(sequence.tokens[draft.told :])
            asks.append(Ask(draft.key, draft.number, position, tokens, wanted, sequence.request.sampling))
            draft.whole, draft.told = not draft.told, position
            self._open[draft.key] = sequence
        if asks:
            self.source.send(asks, ())

    def drop(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        if sequence.draft.key >= 0:
            self._open.pop(sequence.draft.key, None)
            self.source.send((), (sequence.draft.key,))

    def wait(self) -> None:
        """Waits a moment for an answer, if there is any to come."""
        if self._open:
            first = min(sequence.draft.since for sequence in self._open.values())
            left = first + self.patience - self.clock()
            self.source.wait(max(0.0, min(WAIT_SECONDS, left)))

    def _miss(self, sequence: Sequence) -> None:
        draft = sequence.draft
        draft.asked, draft.here = None, len(sequence.tokens)
        draft.missed += 1
        self.missed += 1
        if draft.missed >= MISSES:
            draft.off, draft.off_until = True, self.clock() + OFF_SECONDS


def _fits(answer: Answer, block: int, model: ModelConfig) -> bool:
    """Whether an answer brings what was asked for: as many tokens, and no masks, which would open a canvas again."""
    tokens = answer.tokens
    return (
        answer.verdict is Verdict.DRAWN
        and len(tokens) == block - 1
        and all(0 <= token < model.vocab_size and token != model.mask_id for token in tokens)
    )
