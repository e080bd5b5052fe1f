"""An engine in a thread of its own, so that whoever serves it never waits for a step."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

import torch

from engine.config import EngineConfig, ModeChoice
from engine.device import kv_tokens
from engine.engine import Engine, EngineStatus
from engine.executor import LocalExecutor
from engine.request import Delta, EngineError, Request
from engine.runner import load_model

logger = logging.getLogger(__name__)


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
    """Loads a checkpoint and serves it until closed. `phases` holds the seconds of each part of the start."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises CheckpointError if the checkpoint cannot be served."""
        torch.set_num_threads(config.threads)
        start = time.perf_counter()
        model = load_model(config)
        loaded = time.perf_counter()
        config = replace(config, kv_tokens=kv_tokens(config, model.config))
        executor = LocalExecutor(model, config)
        self.engine = Engine(config, executor)
        ready = time.perf_counter()
        executor.runner.capture()
        self.phases = {
            "load the checkpoint": loaded - start,
            "set up the engine": ready - loaded,
            "capture graphs": time.perf_counter() - ready,
        }
        self.model = self.engine.model_config
        self.max_model_len = self.engine.max_model_len
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: close
        self._streams: dict[str, _Stream] = {}
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Delta]:
        """The request's deltas as they are committed, until one has a finish reason. Leaving early aborts it.

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
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """Ends a request, whose stream then says so, and frees what it holds; ignored if it has ended."""
        self._commands.put(lambda: self._abort(request_id))

    def switch(self, request_id: str, mode: ModeChoice) -> None:
        """Lets a running request continue in another mode from its next seam on; ignored if it has ended."""
        self._commands.put(lambda: self._switch(request_id, mode))

    def status(self) -> EngineStatus:
        return replace(self.engine.status(), error=self._error)

    def close(self) -> None:
        """Stops the thread; requests still running get no more tokens."""
        self._commands.put(None)
        self._thread.join()

    def _add(self, request: Request, stream: _Stream) -> None:
        if self._error is not None:
            stream.put(Delta((), "error", error=self._error))
            return
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

    def _switch(self, request_id: str, mode: ModeChoice) -> None:
        if self._error is None and request_id in self.engine.sequences:
            self.engine.switch(request_id, mode)

    def _obey(self, wait: bool) -> bool:
        """Carries out all commands, waiting for the first if asked to. False when told to close."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _run(self) -> None:
        try:
            while self._obey(wait=self.engine.idle):
                for request_id, delta in self.engine.step().items():
                    self._deliver(request_id, delta)
        except Exception as error:
            logger.exception("the engine failed")
            self._error = f"the engine failed: {error!r}"
            for request_id in list(self._streams):
                self._deliver(request_id, Delta((), "error", error=self._error))
            while self._obey(wait=True):  # refuses what still comes
                pass

    def _deliver(self, request_id: str, delta: Delta) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(delta)
        if delta.finish_reason is not None:
            self._streams.pop(request_id, None)
