"""An engine in a thread of its own, so that whoever serves it never waits for a step."""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

import torch

from engine.asking import Asking
from engine.config import EngineConfig, ModeChoice
from engine.cost_model import (
    BUDGET_SECONDS,
    CostModel,
    StepTimer,
    conditions,
    measure,
    read_or_measure,
    store,
)
from engine.device import use_device
from engine.engine import Engine, EngineStatus
from engine.executor import Executor, LocalExecutor, phase
from engine.request import Delta, EngineError, Request
from engine.sequence import Sequence

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 0.1  # that word of a request on probation has to get out before it runs
OBSERVED = (
    4  # one step in so many corrects the cost model: an observation takes as long as a small model's layer
)


class _Stream:
    """Where the engine's thread leaves deltas for a coroutine."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()

    def put(self, delta: Delta) -> None:
        try:
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, delta)
        except RuntimeError:  # the loop has been closed, so nobody reads any more
            pass


class EngineLoop:
    """Has a checkpoint loaded and serves it until closed. `phases` holds the seconds of each part of the start."""

    def __init__(
        self,
        config: EngineConfig,
        executor_factory: Callable[[EngineConfig], Executor] = LocalExecutor.load,
        asking: Asking | None = None,
    ) -> None:
        """executor_factory: starts what executes the steps. asking: how the engine gets drafts that are drawn
        elsewhere, if at all. Raises CheckpointError if the checkpoint cannot be served, and whatever else the factory
        raises."""
        torch.set_num_threads(config.threads)
        self.device = config.device
        use_device(self.device)
        executor = executor_factory(config)
        self.phases = dict(executor.phases)
        self.engine = Engine(executor.config, executor, asking)
        with phase(self.phases, "measure step costs"):
            self.cost_model = self.engine.cost_model = step_costs(executor)
        self.model = self.engine.model_config
        self.max_model_len = self.engine.max_model_len
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: close
        self._streams: dict[str, _Stream] = {}
        self._error: str | None = None
        self._moving = False
        self._announced: Sequence | None = None  # the one on probation whose start was announced last
        self._round = time.monotonic()  # when the thread last went round; inf while it waits for work
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Delta]:
        """The request's deltas as they are committed, until one has a finish reason. Leaving early aborts it. If a
        request of that id is being served already, because whoever followed it comes back, the new one takes its place.

        Raises ValueError, the parameter's name first, if the request cannot be served, and EngineError if the engine
        dies.
        """
        stream = _Stream()
        self._commands.put(lambda: self._add(request, stream))
        ended = False
        try:
            while not ended:
                delta = await stream.deltas.get()
                ended = delta.finish_reason is not None
                if delta.finish_reason == "refused":
                    raise ValueError(delta.error)
                if delta.finish_reason == "error":
                    raise EngineError(delta.error)
                yield delta
        finally:
            if not ended:
                self._commands.put(lambda: self._leave(request.id, stream))

    def abort(self, request_id: str) -> None:
        """Ends a request, whose stream then says so, and frees what it holds; ignored if it has ended."""
        self._commands.put(lambda: self._abort(request_id))

    def hand_over(self) -> None:
        """Ends all requests with the reason "moved", also those still to come."""
        self._commands.put(self._hand_over)

    def running(self, request_id: str) -> bool:
        """Whether a request takes part in steps; False while it waits, and once it has ended."""
        sequence = self.engine.sequences.get(request_id)
        return sequence is not None and sequence.row >= 0

    def stalled(self) -> float:
        """Seconds that the engine's thread has been inside one step; 0 while there is nothing to do."""
        return max(0.0, time.monotonic() - self._round)

    def switch(self, request_id: str, mode: ModeChoice) -> None:
        """Lets a running request continue in another mode from its next seam on; ignored if it has ended."""
        self._commands.put(lambda: self._switch(request_id, mode))

    def status(self) -> EngineStatus:
        return replace(self.engine.status(), error=self._error)

    def close(self) -> None:
        """Stops the thread and the executor; requests still running get no more tokens."""
        self._commands.put(None)
        self._thread.join()
        self.engine.executor.close()
        store(self.engine.config.cost_file, self.cost_model)

    def _add(self, request: Request, stream: _Stream) -> None:
        if self._error is not None:
            stream.put(Delta((), "error", error=self._error))
            return
        if self._moving:
            stream.put(Delta((), "moved"))
            return
        self._abort(request.id)  # whoever followed it before has left, or is about to
        try:
            self.engine.add(request)
        except ValueError as error:
            stream.put(Delta((), "refused", error=str(error)))
        else:
            self._streams[request.id] = stream

    def _abort(self, request_id: str) -> None:
        if self._error is not None:
            return
        delta = self.engine.abort(request_id)
        if delta is not None:
            self._deliver(request_id, delta)

    def _leave(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:
            self._abort(request_id)

    def _hand_over(self) -> None:
        self._moving = True
        if self._error is not None:
            return
        for request_id in list(self.engine.sequences):
            delta = self.engine.abort(request_id, "moved")
            assert delta is not None
            self._deliver(request_id, delta)

    def _switch(self, request_id: str, mode: ModeChoice) -> None:
        if self._error is None and request_id in self.engine.sequences:
            self.engine.switch(request_id, mode)

    def _obey(self, wait: bool) -> bool:
        """Carries out all commands, waiting for the first if asked to. False when told to close."""
        while True:
            try:
                self._round = math.inf if wait else time.monotonic()
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            finally:
                self._round = time.monotonic()
            if command is None:
                return False
            command()
            wait = False

    def _run(self) -> None:
        before: float | None = None  # when the last report came, unless the engine was idle since
        try:
            use_device(self.device)
            while self._obey(wait=self.engine.idle):
                self._announce()
                before = self._step(before)
        except Exception as error:
            logger.exception("the engine failed")
            self._error = f"the engine failed: {error!r}"
            for request_id in list(self._streams):
                self._deliver(request_id, Delta((), "error", error=self._error))
            while self._obey(wait=True):  # refuses what still comes
                pass

    def _announce(self) -> None:
        """Lets whoever follows a request on probation know that it runs before it can do harm."""
        scheduler = self.engine.scheduler
        if scheduler.running or not scheduler.waiting or not scheduler.waiting[0].request.alone:
            return
        if scheduler.waiting[0] is not self._announced:
            self._announced = scheduler.waiting[0]
            self._deliver(self._announced.request.id, Delta(()))
            time.sleep(NOTICE_SECONDS)

    def _step(self, before: float | None) -> float | None:
        """One step of the engine. Returns when something was reported, None if it was nothing or the engine is idle.

        What a report's steps took is the time since the report before it, shared as predicted. It holds all that the
        host does in between, and at lag 1, where a report is of the steps before, no more than their share of a busy
        device.
        """
        start = time.perf_counter()
        deltas = self.engine.step()
        end = time.perf_counter()
        if before is None and not self.engine.config.lag:
            before = start
        shapes, model = self.engine.reported, self.cost_model
        if before is not None and self.engine.steps % OBSERVED == 0:
            predicted = [model.seconds(*shape) for shape in shapes]
            for shape, seconds in zip(shapes, predicted, strict=True):
                model.observe(*shape, (end - before) * seconds / sum(predicted))
        for request_id, delta in deltas.items():
            self._deliver(request_id, delta)
        return end if shapes and not self.engine.idle else None

    def _deliver(self, request_id: str, delta: Delta) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(delta)
        if delta.finish_reason is not None:
            self._streams.pop(request_id, None)


def step_costs(executor: Executor) -> CostModel:
    """Reads or measures what steps cost on an executor that serves nobody yet."""
    config, model = executor.config, executor.model_config

    def measured() -> CostModel:
        timer = StepTimer(lambda step: executor.run([step]), config, model)
        return measure(timer, *timer.grid(), BUDGET_SECONDS[torch.device(config.device).type], key)

    key = conditions(executor.device_name, config, model)
    return read_or_measure(config.cost_file, key, measured)
