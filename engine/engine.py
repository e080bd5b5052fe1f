"""The engine: plans a step, has it executed, commits what it brought. Knows neither HTTP nor Ray nor text."""

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.asking import Asking
from engine.config import BLOCK_LENGTHS, EngineConfig, ModeChoice, Sizes
from engine.cost_model import CostModel, shape_of
from engine.modes import MODES
from engine.request import Delta, Request
from engine.scheduler import Scheduler
from engine.segment import Segment, Settled
from engine.sequence import Sequence, stop_ids
from engine.step import Step, pack

if TYPE_CHECKING:  # whoever only plans, as a simulator does, needs no torch
    from engine.executor import Executor
    from engine.output import StepOutput

ROUND = 2  # steps that are executed together at most: a draft and its verification


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A glance at an engine. `error` says why it can serve no longer. `drafts_answered` and `drafts_missed` count asks
    to a draft stage."""

    running: int
    waiting: int
    free_pages: int
    total_pages: int
    steps: int
    error: str | None = None
    drafts_answered: int = 0
    drafts_missed: int = 0


class Engine:
    """Owns the sequences. One thread calls it. `asking` deals with whoever draws drafts for it, if anybody does."""

    def __init__(self, config: EngineConfig, executor: "Executor", asking: Asking | None = None) -> None:
        model = executor.model_config
        self.config = replace(config, draft_lora=config.draft_lora and executor.has_adapter)
        self.executor = executor
        self.model_config = model
        self.sizes = Sizes.of(config, model)
        self.max_model_len = self.sizes.max_model_len
        self.asking = asking
        self.scheduler = Scheduler(self.config, self.sizes.block_length, asking.stage if asking else None)
        self.sequences: dict[str, Sequence] = {}
        self.steps = 0
        self.cost_model: CostModel | None = None
        self.reported: list[tuple[int, int]] = []  # query tokens and context of each step in the last report
        self._in_flight: deque[tuple[list[list[Segment]], StepOutput]] = deque()
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return not self.sequences and not self._in_flight

    def status(self) -> EngineStatus:
        pool = self.scheduler.pool
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        answered, missed = (self.asking.answered, self.asking.missed) if self.asking else (0, 0)
        return EngineStatus(running, waiting, pool.free, pool.total, self.steps, None, answered, missed)

    def add(self, request: Request) -> None:
        """Accepts a request. Raises ValueError with the parameter's name first if it can never be served."""
        self._check(request)
        choice = request.mode or self.config.default_mode
        sequence = Sequence(request, choice, self.model_config.eos_ids, self._arrivals)
        self._arrivals += 1
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str, reason: str = "abort") -> Delta | None:
        """Forgets a request and frees its pages at once. Returns its last delta; None for an id that is not known,
        since it may just have ended."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return None
        sequence.finish_reason = reason
        self._drop(sequence)
        return Delta((), reason, sequence.stats())

    def switch(self, request_id: str, mode: ModeChoice) -> None:
        """Lets a running request continue in another mode from its next seam on. Raises ValueError for no mode."""
        self._check_mode(mode, self.sequences[request_id].request)
        self.sequences[request_id].choice = mode

    def step(self) -> dict[str, Delta]:
        """Plans and executes one step and reports the oldest one that is due: at lag 0 the same one. A step of nothing
        but drafts has nothing to report, so the one after it is planned and executed with it. Returns the new tokens of
        each request that has any, or has ended."""
        self.reported = []
        planned: list[list[Segment]] = []
        steps: list[Step] = []
        if self.asking is not None:
            self.asking.collect(self.model_config)
        while not planned or (len(planned) < ROUND and _only_drafts(planned[-1])):
            segments = self.scheduler.schedule()
            if not segments:
                break
            planned.append(segments)
            steps.append(pack(segments, self.scheduler.started, self.scheduler.granted))
        if self.asking is not None:
            self.asking.ask(self.scheduler.running)
            if not steps and not self._in_flight:
                self.asking.wait()
        if steps:
            self.steps += len(steps)
            self._in_flight.append((planned, self.executor.run(steps)))
        if self._in_flight and (len(self._in_flight) > self.config.lag or not steps):
            return self._report(*self._in_flight.popleft())
        return {}

    def _report(self, planned: list[list[Segment]], output: "StepOutput") -> dict[str, Delta]:
        deltas: dict[str, Delta] = {}
        self.reported = [shape_of(segments) for segments in planned]
        for segments in planned[:-1]:
            for segment in segments:
                self._settle(segment, [], deltas)
        for segment, tokens in zip(planned[-1], output.committed(), strict=True):
            self._settle(segment, tokens, deltas)
        return deltas

    def _settle(self, segment: Segment, tokens: list[int], deltas: dict[str, Delta]) -> None:
        sequence = segment.sequence
        sequence.in_flight -= 1
        sequence.uncertain -= segment.commits
        if sequence.finish_reason is not None:
            return  # ended while this segment was on its way
        if segment.mode is None:
            new = sequence.append(tokens)
        else:
            sequence.forwards += 1
            new = segment.mode.advance(sequence, Settled(segment, tokens))
            sequence.decoded += len(new)
        if sequence.finish_reason is not None:
            self._finish(sequence, new, deltas)
        elif new:
            deltas[sequence.request.id] = Delta(tuple(new))

    def _finish(self, sequence: Sequence, new: list[int], deltas: dict[str, Delta]) -> None:
        self._drop(sequence)
        del self.sequences[sequence.request.id]
        deltas[sequence.request.id] = Delta(tuple(new), sequence.finish_reason, sequence.stats())

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence)
        if self.asking is not None:
            self.asking.drop(sequence)

    def _check(self, request: Request) -> None:
        sampling, vocab_size = request.sampling, self.model_config.vocab_size
        length = len(request.prompt) + sampling.max_tokens
        ids = (*request.prompt, *request.generated)
        if request.id in self.sequences:
            raise ValueError(f"id: {request.id!r} is being served already")
        if not request.prompt:
            raise ValueError("prompt: is empty")
        self._check_mode(request.mode or self.config.default_mode, request)
        if not 0 <= sampling.seed < 2**63:
            raise ValueError(f"seed: {sampling.seed} is not in 0..2**63 - 1")
        if min(ids) < 0 or max(ids) >= vocab_size or self.model_config.mask_id in ids:
            raise ValueError(f"prompt: token ids must lie in 0..{vocab_size - 1} and not be the mask token")
        ended = not stop_ids(sampling, self.model_config.eos_ids).isdisjoint(request.generated)
        if ended or len(request.generated) >= sampling.max_tokens:
            raise ValueError("max_tokens: nothing is left to generate")
        if length > self.max_model_len:
            raise ValueError(
                f"max_tokens: {len(request.prompt)} prompt tokens and {sampling.max_tokens} more exceed the context of "
                f"{self.max_model_len}"
            )
        block_length = request.diffusion.block_length
        if block_length and (block_length not in BLOCK_LENGTHS or block_length > self.sizes.block_length):
            allowed = [block for block in BLOCK_LENGTHS if block <= self.sizes.block_length]
            raise ValueError(f"diffusion.block_length: {block_length} is not one of {allowed}")

    def _check_mode(self, mode: ModeChoice, request: Request) -> None:
        if mode == "auto":
            return
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r} is not one of auto, {', '.join(MODES)}")
        if request.slo.lossless and not MODES[mode].lossless:
            raise ValueError(f"mode: {mode} is not lossless, which this request's tier demands")


def _only_drafts(segments: list[Segment]) -> bool:
    """Whether the host has nothing to learn of a step before it plans the next."""
    return all(segment.mode is not None and not segment.commits for segment in segments)
