"""Continuous batching: which sequences have a segment in the next step, and which pages they hold.

Obeys the controller, asks modes for segments, counts query tokens, grants pages, preempts. Knows no mode by name.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Collection

from engine.config import EngineConfig, ModeName
from engine.controller import decide
from engine.modes import MODES, Mode
from engine.pages import PagePool
from engine.segment import Pattern, Segment, Settle
from engine.sequence import Sequence


class Scheduler:
    """Waiting sequences in order of arrival, running ones with those first that the last step did not serve."""

    def __init__(
        self, config: EngineConfig, block_length: int, stage: Callable[[Mode], Mode] | None = None
    ) -> None:
        """stage: what to make of every mode, if anything."""
        self.config, self.block_length, self.stage = config, block_length, stage
        self.pool = PagePool(config.kv_tokens // config.page_size, config.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.started: list[Sequence] = []  # rows to fill on the device before this step
        self.granted: list[tuple[int, int, int]] = []  # (row, column, page) new in the page tables
        self._rows = list(range(config.max_running - 1, -1, -1))
        self._looked_up: tuple[Sequence | None, int, list[int], int] = (
            None,
            0,
            [],
            0,
        )  # see `_start_waiting`

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out. What still runs for it on the device runs before its pages and
        its row can be used again, since steps execute in order."""
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Segment]:
        """The next step's segments, in the order of their settle operations."""
        self.started, self.granted = [], []
        planned: dict[Sequence, Segment] = {}
        self._start_waiting()
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            (decoding if sequence.decoding else prefilling).append(sequence)
        kept_for_prefill = self._choose_modes(decoding, bool(prefilling))
        budget = self.config.max_batch_tokens - kept_for_prefill
        for sequence in decoding:
            if sequence.row < 0:
                continue  # preempted by one served before it
            segment = self._plan(sequence)
            if segment is not None and segment.query_tokens <= budget and self._cover(segment, planned):
                budget -= segment.query_tokens
                planned[sequence] = segment
        budget += kept_for_prefill
        for sequence in prefilling:
            if sequence.row < 0 or not budget:
                continue
            segment = self._chunk(sequence, budget)  # whose pages it has had since it started
            budget -= segment.query_tokens
            planned[sequence] = segment
        for segment in planned.values():
            self._launch(segment)
        if len(planned) < len(self.running):
            self.running.sort(key=planned.__contains__)
        return sorted(planned.values(), key=lambda s: (s.settle, s.commits > 0, s.query_tokens))

    def _choose_modes(self, decoding: list[Sequence], prefill_waits: bool) -> int:
        decision = decide(decoding, prefill_waits, self.config, self.block_length)
        for sequence, decided in zip(decoding, decision.modes, strict=True):
            if decided == sequence.decided:
                continue
            name, block_length = sequence.decided = decided
            mode = self._mode(name, sequence, block_length)
            sequence.wanted = None if mode == sequence.mode else mode
        return decision.prefill_tokens

    def _mode(self, name: ModeName, sequence: Sequence, block_length: int) -> Mode:
        mode: Mode = MODES[name].of(sequence, self.config, block_length)
        return mode if self.stage is None else self.stage(mode)

    def _start_waiting(self) -> None:
        wanted = -1  # by the running sequences; summed up only for one that would fit without them
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            if sequence.in_flight:
                return  # preempted with a step on its way, which may still bring tokens
            if self.running and (sequence.request.alone or self.running[0].request.alone):
                return
            if self._looked_up[:2] != (sequence, self.pool.version):  # a long prompt may wait for many steps
                found = self._find(sequence)
                self._looked_up = (sequence, self.pool.version, found, self.pool.idle(found))
            found, idle = self._looked_up[2:]
            room = self.pool.free - idle - self._wanting(sequence, len(found))
            if room >= 0 and wanted < 0:
                wanted = sum(self._wanting(s, len(s.pages)) for s in self.running)
            # a sequence that starts without room for its first segment beside the others' next would be preempted
            if self.running and room < max(wanted, 0):
                return
            self.waiting.popleft()
            self._looked_up = (None, 0, [], 0)
            self.pool.share(sequence.pages, found, len(sequence.tokens))
            sequence.start(self._rows.pop(), len(found) * self.pool.page_size)
            sequence.registered = len(found)
            self.granted += [(sequence.row, column, page) for column, page in enumerate(found)]
            # all at once, so that no sequence that decodes already takes what was counted for this one
            self._grant(sequence, self.pool.missing(len(found), sequence.prefill_target))
            wanted += self._wanting(sequence, len(sequence.pages))
            self.running.append(sequence)
            self.started.append(sequence)

    def _find(self, sequence: Sequence) -> list[int]:
        """The pages of the cache that a sequence may begin with. Its last token always remains to be run."""
        if not self.config.prefix_cache:
            return []
        size = self.pool.page_size
        count = (len(sequence.tokens) - 1) // size
        return self.pool.find(sequence.page_key(index, size) for index in range(count))

    def _register(self, sequence: Sequence) -> None:
        """Lets others begin with the pages of a sequence that are full and final."""
        if not self.config.prefix_cache:
            return
        size = self.pool.page_size
        final = sequence.final_context // size
        for index in range(sequence.registered, final):
            self.pool.register(sequence.pages[index], sequence.page_key(index, size))
        sequence.registered = final

    def _wanting(self, sequence: Sequence, held: int) -> int:
        """Pages that a sequence that holds so many lacks for its prefill and the segment after it."""
        mode, segment = sequence.mode, sequence.last  # the next is like the last
        if mode is None:
            name, block_length = decide([sequence], False, self.config, self.block_length).modes[0]
            mode, segment = self._mode(name, sequence, block_length), None
        if segment is None:
            segment = mode.plan(sequence)
        own = segment.query_tokens if segment else self.block_length  # of one that waits for its drafts
        upto = max(len(sequence.tokens), sequence.max_context) + own
        return self.pool.missing(held, upto)

    def _plan(self, sequence: Sequence) -> Segment | None:
        wanted = sequence.wanted
        if wanted is not None and (sequence.mode is None or sequence.mode.at_seam(sequence)):
            sequence.switch(wanted)
        assert sequence.mode is not None
        return sequence.mode.plan(sequence)

    def _chunk(self, sequence: Sequence, budget: int) -> Segment:
        length = min(budget, sequence.prefill_target - sequence.prefilled)
        last = sequence.prefilled + length == sequence.prefill_target
        emits = last and sequence.prefill_target == len(sequence.tokens)
        settle = Settle.SAMPLE if emits else Settle.KEEP
        return Segment(sequence, None, length, Pattern.CAUSAL, settle, commits=int(emits))

    def _cover(self, segment: Segment, planned: Collection[Sequence]) -> bool:
        """Grants the pages that a segment may write, preempting the newest unplanned sequences if the pool is dry.
        False if the sequence itself had to go, or to wait, so that an older one never gives way to a newer."""
        sequence = segment.sequence
        missing = self.pool.missing(len(sequence.pages), sequence.max_context + segment.query_tokens)
        while missing > self.pool.free:
            victim = max((s for s in self.running if s not in planned), key=lambda s: s.arrival)
            if victim is sequence and any(other.arrival > victim.arrival for other in planned):
                return False  # it is the first to be served in the next step
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing:
            self._grant(sequence, missing)
        return True

    def _grant(self, sequence: Sequence, count: int) -> None:
        column = len(sequence.pages)
        home = sequence.row * self.pool.total // self.config.max_running
        for offset, page in enumerate(self.pool.grant(sequence.pages, count, home)):
            self.granted.append((sequence.row, column + offset, page))

    def _launch(self, segment: Segment) -> None:
        sequence = segment.sequence
        sequence.in_flight += 1
        sequence.uncertain += segment.commits
        if segment.mode is None:
            sequence.prefilled += segment.block
        else:
            sequence.last, sequence.restart = segment, False
        self._register(sequence)
        sequence.check()

    def _preempt(self, sequence: Sequence) -> None:
        """Gives up a sequence's pages; it is prefilled again later and its unfinished round drawn again."""
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def _release(self, sequence: Sequence) -> None:
        if sequence in self.started:
            self.started.remove(sequence)
            self.granted = [grant for grant in self.granted if grant[0] != sequence.row]
        self._register(sequence)
        self.pool.release(sequence.pages)
        sequence.registered = 0
        self._rows.append(sequence.row)
        sequence.row, sequence.decided, sequence.mode, sequence.wanted = -1, None, None, None
