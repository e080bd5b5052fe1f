"""Continuous batching: which sequences have a segment in the next step, and which pages they hold.

Obeys the controller, asks modes for segments, counts query tokens, grants pages, preempts. Knows no mode by name.
"""

from collections import deque

from engine.config import EngineConfig
from engine.controller import decide
from engine.modes import MODES, Mode
from engine.pages import PagePool
from engine.segment import Pattern, Segment, Settle
from engine.sequence import Sequence


class Scheduler:
    """Waiting sequences in order of arrival, running ones in the order in which they were served."""

    def __init__(self, config: EngineConfig, block_length: int) -> None:
        self.config, self.block_length = config, block_length
        self.pool = PagePool(config.kv_tokens // config.page_size, config.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.started: list[Sequence] = []  # rows to fill on the device before this step
        self.granted: list[tuple[int, int, int]] = []  # (row, column, page) new in the page tables
        self._rows = list(range(config.max_running - 1, -1, -1))

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
        planned: list[Segment] = []
        self._start_waiting()
        prefilling = [s for s in self.running if not s.decoding]
        kept_for_prefill = self._choose_modes(bool(prefilling))
        budget = self.config.max_batch_tokens - kept_for_prefill
        for sequence in [s for s in self.running if s.decoding]:
            if sequence.row < 0:
                continue  # preempted by one served before it
            segment = self._plan(sequence)
            if segment is not None and segment.query_tokens <= budget and self._cover(segment, planned):
                budget -= segment.query_tokens
                planned.append(segment)
        budget += kept_for_prefill
        for sequence in prefilling:
            if sequence.row < 0 or not budget:
                continue
            segment = self._chunk(sequence, budget)
            if self._cover(segment, planned):
                budget -= segment.query_tokens
                planned.append(segment)
        for segment in planned:
            self._launch(segment)
        served = {id(segment.sequence) for segment in planned}
        self.running = deque(sorted(self.running, key=lambda s: id(s) in served))
        return sorted(planned, key=lambda s: (s.settle, s.commits > 0, s.query_tokens))

    def _choose_modes(self, prefill_waits: bool) -> int:
        decoding = [s for s in self.running if s.decoding]
        decision = decide(decoding, prefill_waits, self.config, self.block_length)
        for sequence, (name, block_length) in zip(decoding, decision.modes, strict=True):
            mode: Mode = MODES[name].of(sequence, self.config, block_length)
            sequence.wanted = None if mode == sequence.mode else mode
        return decision.prefill_tokens

    def _start_waiting(self) -> None:
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            if sequence.in_flight:
                return  # preempted with a step on its way, which may still bring tokens
            # a sequence that starts without room for its first segment beside the others' next would be preempted
            if self.running and sum(map(self._wanting, [*self.running, sequence])) > self.pool.free:
                return
            self.waiting.popleft()
            sequence.start(self._rows.pop())
            self.running.append(sequence)
            self.started.append(sequence)

    def _wanting(self, sequence: Sequence) -> int:
        """Pages that a sequence lacks for its prefill and the segment after it."""
        mode = sequence.mode
        if mode is None:
            name, block_length = decide([sequence], False, self.config, self.block_length).modes[0]
            mode = MODES[name].of(sequence, self.config, block_length)
        segment = mode.plan(sequence)
        upto = max(len(sequence.tokens), sequence.max_context) + (segment.query_tokens if segment else 0)
        return self.pool.missing(len(sequence.pages), upto)

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

    def _cover(self, segment: Segment, planned: list[Segment]) -> bool:
        """Grants the pages that a segment may write, preempting the newest unplanned sequences if the pool is dry.
        False if the sequence itself had to go."""
        sequence = segment.sequence
        missing = self.pool.missing(len(sequence.pages), sequence.max_context + segment.query_tokens)
        while missing > self.pool.free:
            busy = {id(s.sequence) for s in planned}
            victim = max((s for s in self.running if id(s) not in busy), key=lambda s: s.arrival)
            self._preempt(victim)
            if victim is sequence:
                return False
        column = len(sequence.pages)
        home = sequence.row * self.pool.total // self.config.max_running
        for offset, page in enumerate(self.pool.grant(sequence.pages, missing, home)):
            self.granted.append((sequence.row, column + offset, page))
        return True

    def _launch(self, segment: Segment) -> None:
        sequence = segment.sequence
        sequence.in_flight += 1
        sequence.uncertain += segment.commits
        if segment.mode is None:
            sequence.prefilled += segment.block
        else:
            sequence.last, sequence.restart = segment, False
        sequence.check()

    def _preempt(self, sequence: Sequence) -> None:
        """Gives up a sequence's pages; it is prefilled again later and its unfinished round drawn again."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence in self.started:
            self.started.remove(sequence)
        self.pool.release(sequence.pages)
        self._rows.append(sequence.row)
        sequence.row, sequence.mode, sequence.wanted = -1, None, None
