"""The engine of a draft stage: draws drafts and canvases for sequences that others own.

It keeps causal KV of the tokens that it is told, and answers an ask by one forward, where a canvas does not need more:
the new tokens run causally, and the block behind them bidirectionally. It commits nothing: what becomes of a block it
learns from the next ask.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.config import EngineConfig, Sizes
from engine.drafts import Answer, Ask, Verdict
from engine.pages import PagePool
from engine.request import Request
from engine.segment import Pattern, Segment, Settle
from engine.sequence import Sequence
from engine.step import pack

if TYPE_CHECKING:
    from engine.executor import Executor

Name = tuple[bytes, int]  # who asks, and which of their sequences it is about


@dataclass(slots=True, eq=False)
class _Followed:
    """A sequence that somebody else owns. The device's tables hold its first `written` tokens, and causal KV of the
    first `cached`. `passes` counts those of an open canvas."""

    name: Name
    sequence: Sequence
    ask: Ask
    written: int = 0
    cached: int = 0
    passes: int = 0

    @property
    def missing(self) -> int:
        """Tokens to run causally before the block."""
        return self.ask.position - 1 - self.cached


@dataclass(frozen=True, slots=True)
class DrafterStatus:
    """A glance at a drafter. Pages and rows that it holds for sequences nobody asks about just now count as held."""

    followed: int
    asks: int
    free_pages: int
    total_pages: int
    steps: int
    drawn: int
    declined: int


class Drafter:
    """Batches the asks of any number of engines. One thread calls it."""

    def __init__(self, config: EngineConfig, executor: "Executor") -> None:
        model = executor.model_config
        self.config = replace(config, draft_lora=config.draft_lora and executor.has_adapter)
        self.executor, self.model_config = executor, model
        sizes = Sizes.of(config, model)
        self.pool = PagePool(config.kv_tokens // config.page_size, config.page_size)
        self.steps = self.drawn = self.declined = 0
        self._longest, self._canvas = sizes.max_model_len, sizes.block_length
        self._rows = list(range(config.max_running - 1, -1, -1))
        self._followed: OrderedDict[Name, _Followed] = OrderedDict()  # asked about longest ago first
        self._asked: dict[Name, _Followed] = {}  # with an ask to answer, in their order
        self._answers: list[tuple[bytes, Answer]] = []

    @property
    def idle(self) -> bool:
        return not self._asked and not self._answers

    def status(self) -> DrafterStatus:
        return DrafterStatus(
            len(self._followed),
            len(self._asked),
            self.pool.free,
            self.pool.total,
            self.steps,
            self.drawn,
            self.declined,
        )

    def add(self, peer: bytes, ask: Ask) -> None:
        """Accepts an ask of `peer`; a later one about the same sequence takes its place."""
        name = (peer, ask.key)
        if not self._can(ask):
            self.drop(*name)
            self._refuse(peer, ask, Verdict.DECLINED)
            return
        followed = self._followed.get(name)
        if followed is not None and not _follows(ask, followed.sequence):
            self.drop(*name)
            followed = None
        if followed is None:
            if len(ask.tokens) < ask.position:
                self._refuse(peer, ask, Verdict.FORGOTTEN)
                return
            request = Request("", ask.tokens, ask.sampling)
            followed = _Followed(name, Sequence(request, "auto", (), 0), ask)
            self._followed[name] = followed
        else:
            known = len(followed.sequence.tokens)
            followed.sequence.tokens += ask.tokens[len(ask.tokens) - (ask.position - known) :]
            followed.ask, followed.passes = ask, 0
        self._followed.move_to_end(name)
        self._asked[name] = followed

    def drop(self, peer: bytes, key: int) -> None:
        """Forgets a sequence of `peer`, if it is known."""
        followed = self._followed.pop((peer, key), None)
        self._asked.pop((peer, key), None)
        if followed is not None and followed.sequence.row >= 0:
            self._rows.append(followed.sequence.row)
            self.pool.release(followed.sequence.pages)

    def step(self) -> list[tuple[bytes, Answer]]:
        """One forward for as many asks as it has room for. Returns the answers that are ready, and to whom they go."""
        started: list[Sequence] = []
        granted: list[tuple[int, int, int]] = []
        edits: list[tuple[int, int, int]] = []
        segments: list[Segment] = []
        drawing: list[_Followed] = []
        for followed, room in self._turns():
            room = min(room, self.config.max_batch_tokens - sum(s.query_tokens for s in segments))
            rows = self.config.max_running - len(segments)  # a step has no more segments than that
            if room <= 0 or rows <= 0:
                continue
            block = followed.ask.wanted.block
            trunk = min(followed.missing, room)
            whole = trunk == followed.missing and trunk + block <= room and rows > (trunk > 0)
            if not trunk and not whole:
                continue
            if not self._place(followed, started, granted, edits):
                continue
            sequence = followed.sequence
            if trunk:
                segments.append(Segment(sequence, None, trunk, Pattern.CAUSAL, Settle.KEEP, commits=0))
                followed.cached += trunk
            if whole:
                segments.append(self._block(followed, trunk))
                drawing.append(followed)
        if segments:
            segments.sort(key=lambda s: (s.settle, s.commits > 0, s.query_tokens))
            drawn = self.executor.run([pack(segments, started, granted, edits)]).drawn()
            self.steps += 1
            of = {
                s.sequence: tokens
                for s, tokens in zip(segments, drawn, strict=True)
                if s.settle is Settle.DENOISE
            }
            for followed in drawing:
                self._read(followed, of[followed.sequence])
        answers, self._answers = self._answers, []
        return answers

    def _turns(self) -> list[tuple[_Followed, int]]:
        """Asks with the query tokens that each may take at most: first those that need one forward. Of long contexts
        that are new here, some are run in every step.

        Beyond the ridge, where more tokens take more time, a step serves half of the sequences at most, so that the
        others' engines verify meanwhile: served all at once, both stages would wait for each other in turns.
        """
        budget = self.config.max_batch_tokens
        short: list[_Followed] = []
        long: list[_Followed] = []
        for followed in self._asked.values():
            fits = followed.missing + followed.ask.wanted.block <= budget // 4
            (short if fits else long).append(followed)
        kept = budget // 4 if long else 0
        half = -(-len(self._followed) // 2)
        turns: list[tuple[_Followed, int]] = []
        room = budget - kept
        for followed in short:
            own = followed.missing + followed.ask.wanted.block
            if own <= room and (len(turns) < half or budget - kept - room + own <= self.config.ridge_tokens):
                turns.append((followed, own))
                room -= own
        return turns + [(followed, budget) for followed in long]

    def _place(
        self,
        followed: _Followed,
        started: list[Sequence],
        granted: list[tuple[int, int, int]],
        edits: list[tuple[int, int, int]],
    ) -> bool:
        """Gives a sequence a row, the pages for all that it has been asked for, and its new tokens. Makes room by
        forgetting those asked about longest ago; if all are being asked about, this ask is declined."""
        sequence, wanted = followed.sequence, followed.ask.position - 1 + followed.ask.wanted.block
        missing = self.pool.missing(len(sequence.pages), wanted)
        while self.pool.free < missing or (sequence.row < 0 and not self._rows):
            victim = next((name for name in self._followed if name not in self._asked), None)
            if victim is None:
                self.drop(*followed.name)
                self._refuse(followed.name[0], followed.ask, Verdict.DECLINED)
                return False
            self.drop(*victim)
        if sequence.row < 0:
            sequence.row = self._rows.pop()
            started.append(sequence)
        else:
            fresh = enumerate(sequence.tokens[followed.written :], followed.written)
            edits += [(sequence.row, column, token) for column, token in fresh]
        followed.written = len(sequence.tokens)
        home = sequence.row * self.pool.total // self.config.max_running
        column = len(sequence.pages)
        pages = self.pool.grant(sequence.pages, missing, home)
        granted += [(sequence.row, column + offset, page) for offset, page in enumerate(pages)]
        return True

    def _block(self, followed: _Followed, ahead: int) -> Segment:
        wanted = followed.ask.wanted
        return Segment(
            followed.sequence,
            None,
            wanted.block,
            Pattern.CANVAS,
            Settle.DENOISE,
            commits=wanted.block if wanted.canvas else 0,
            restart=not followed.passes,
            threshold=wanted.threshold,
            steps=wanted.steps,
            lora=self.config.draft_lora and not wanted.canvas,
            ahead=ahead,
        )

    def _read(self, followed: _Followed, drawn: list[int]) -> None:
        ask = followed.ask
        tokens = tuple(drawn[: ask.wanted.block - 1])
        followed.passes += ask.wanted.canvas
        if self.model_config.mask_id in tokens:
            return
        del self._asked[followed.name]
        self.drawn += 1
        answer = Answer(ask.key, ask.number, Verdict.DRAWN, tokens, followed.passes)
        self._answers.append((followed.name[0], answer))
        followed.passes = 0

    def _refuse(self, peer: bytes, ask: Ask, verdict: Verdict) -> None:
        self.declined += verdict is Verdict.DECLINED
        self._answers.append((peer, Answer(ask.key, ask.number, verdict)))

    def _can(self, ask: Ask) -> bool:
        """Whether an ask could ever be answered here."""
        model = self.model_config
        return (
            2 <= ask.wanted.block <= self._canvas
            # a restart voids a whole canvas behind the seed token, however short its block
            and 1 <= ask.position <= self._longest
            and all(0 <= token < model.vocab_size and token != model.mask_id for token in ask.tokens)
        )


def _follows(ask: Ask, sequence: Sequence) -> bool:
    """Whether an ask goes on from what is known of its sequence."""
    known, first = sequence.tokens, ask.position - len(ask.tokens)
    same = first <= len(known) <= ask.position and ask.sampling == sequence.request.sampling
    return same and tuple(known[first:]) == ask.tokens[: len(known) - first]


def load_drafter(config: EngineConfig, executor_factory: Callable[[EngineConfig], "Executor"]) -> Drafter:
    """A drafter on what the factory starts, whose exceptions it raises."""
    import torch

    from engine.device import use_device

    torch.set_num_threads(config.threads)
    use_device(config.device)
    executor = executor_factory(config)
    return Drafter(executor.config, executor)
