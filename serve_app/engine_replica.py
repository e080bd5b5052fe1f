"""The deployment that holds an engine. Plain lists go in and out; nothing of torch is imported outside a replica."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from ray import serve

from engine.config import DiffusionParams, EngineConfig, SamplingParams
from engine.request import Delta, EngineError, Request, Slo

# Token ids, finish reason, decode statistics, error. Besides the engine's finish reasons there is "refused", whose
# error starts with the parameter at fault.
Chunk = tuple[list[int], str | None, dict[str, Any] | None, str | None]


class EngineReplica:
    """One engine behind a Serve replica; unhealthy once it has died, or runs for `patience` seconds without a step.

    Raises CheckpointError if the checkpoint cannot be served.
    """

    def __init__(self, config: EngineConfig, patience: float) -> None:
        # Not at the top: the ingress and the command line import this module and must not pay for torch.
        from engine.loop import EngineLoop

        self._engine = EngineLoop(config)
        self._progress = Progress(patience)

    async def stream(self, packed: dict[str, Any], interval: float) -> AsyncGenerator[Chunk, None]:
        """The answer to a packed request, a chunk per `interval` (seconds). Leaving the stream aborts the sequence."""
        async with aclosing(_coalesced(self._engine.stream(unpack(packed)), interval)) as deltas:
            try:
                async for delta in deltas:
                    stats = None if delta.stats is None else dataclasses.asdict(delta.stats)
                    yield list(delta.token_ids), delta.finish_reason, stats, delta.error
            except ValueError as error:
                yield [], "refused", None, str(error)
            except EngineError as error:
                yield [], "error", None, str(error)

    async def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    async def status(self) -> dict[str, Any]:
        """Counters of the engine, and what never changes: Serve's name for this replica, the context length and the
        start-up times."""
        status = dataclasses.asdict(self._engine.status())
        return status | {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "max_model_len": self._engine.max_model_len,
            "phases": dict(self._engine.phases),
        }

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        status = self._engine.status()
        if status.error is not None:
            raise RuntimeError(f"the engine has stopped: {status.error}")
        if self._progress.stuck(status.steps, busy=status.running > 0, now=time.monotonic()):
            raise RuntimeError("the engine makes no step")


class Progress:
    """Notices that steps have stopped coming although there is work."""

    def __init__(self, patience: float) -> None:
        self._patience = patience  # seconds
        self._steps = -1
        self._since = 0.0

    def stuck(self, steps: int, *, busy: bool, now: float) -> bool:
        if steps != self._steps or not busy:
            self._steps, self._since = steps, now
        return now - self._since > self._patience


def pack(request: Request) -> dict[str, Any]:
    return dataclasses.asdict(request)


def unpack(packed: dict[str, Any]) -> Request:
    return Request(
        **{
            **packed,
            "sampling": SamplingParams(**packed["sampling"]),
            "diffusion": DiffusionParams(**packed["diffusion"]),
            "slo": Slo(**packed["slo"]),
        }
    )


async def _coalesced(deltas: AsyncIterator[Delta], interval: float) -> AsyncGenerator[Delta, None]:
    """The same tokens in fewer deltas: at most one per `interval` (seconds), the first and the last at once."""
    waiting: list[Delta] = []
    arrived, ended = asyncio.Event(), asyncio.Event()

    async def collect() -> None:
        try:
            async for delta in deltas:
                waiting.append(delta)
                arrived.set()
        finally:
            ended.set()
            arrived.set()

    collector = asyncio.create_task(collect())
    try:
        while waiting or not ended.is_set():
            await arrived.wait()
            arrived.clear()
            if waiting:
                tokens = tuple(token for delta in waiting for token in delta.token_ids)
                joined = dataclasses.replace(waiting[-1], token_ids=tokens)
                waiting.clear()
                yield joined
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await ended.wait()
        await collector  # raises what ended the stream, if anything did
    finally:
        collector.cancel()
        await asyncio.gather(collector, return_exceptions=True)
