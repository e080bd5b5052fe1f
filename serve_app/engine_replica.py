"""The deployment that holds an engine. Plain lists go in and out; nothing of torch is imported outside a replica."""

import asyncio
import dataclasses
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from ray import serve

from engine.asking import Asking
from engine.config import DiffusionParams, EngineConfig, SamplingParams
from engine.request import Delta, EngineError, Request, Slo
from serve_app.chunks import Chunk
from serve_app.termination import on_sigterm

BEATS = 4  # signs of life in the time after which an engine counts as hung
FAILED_SECONDS = 0.2  # from an engine's end to that of its process: its requests are told first
LEAVE_SECONDS = 10.0  # that handing requests over may take


class EngineReplica:
    """One engine behind a Serve replica.

    Its heartbeat is the engine's steps, not the process: without a step for `heartbeat` seconds, with work to do, its
    streams fall silent, so that their requests go on elsewhere; after `patience` seconds Serve replaces it. SIGTERM
    makes it hand its requests over and exit.

    Raises CheckpointError if the checkpoint cannot be served.
    """

    def __init__(
        self, config: EngineConfig, heartbeat: float, patience: float, asking: Asking | None = None
    ) -> None:
        """asking: how the engine gets drafts that are drawn elsewhere, if at all."""
        # Not at the top: the ingress and the command line import this module and must not pay for torch.
        from engine.loop import EngineLoop
        from serve_app.replica_executor import make_executor

        self._engine = EngineLoop(config, make_executor, asking)
        self._heartbeat, self._patience = heartbeat, patience
        self._name = serve.get_replica_context().replica_id.unique_id
        self._streams = 0
        self._leaving = False
        on_sigterm(partial(_call_in, asyncio.get_running_loop(), self._leave))

    async def stream(self, packed: dict[str, Any], interval: float) -> AsyncGenerator[Chunk, None]:
        """The answer to a packed request, a chunk per `interval` (seconds) at most, after one that says that it is
        here, unless the engine hangs: then it is not to count as another one that died. Leaving the stream aborts the
        sequence."""
        request = unpack(packed)
        self._streams += 1
        try:
            if (error := self._engine.status().error) is not None:
                # One that comes back here, before the process has ended, has not died twice.
                yield Chunk(finish_reason="moved", error=error)
                return
            if self._engine.stalled() < self._heartbeat:
                yield Chunk()
            deltas = _coalesced(self._engine.stream(request), interval, self._heartbeat / BEATS)
            async with aclosing(deltas):
                async for delta in deltas:
                    if delta is None:
                        if self._engine.stalled() < self._heartbeat:
                            yield Chunk(running=self._engine.running(request.id))
                        continue
                    stats = None if delta.stats is None else dataclasses.asdict(delta.stats)
                    yield Chunk(list(delta.token_ids), delta.finish_reason, stats, delta.error, running=True)
        except ValueError as error:
            yield Chunk(finish_reason="refused", error=str(error))
        except EngineError as error:
            asyncio.get_running_loop().call_later(FAILED_SECONDS, os._exit, 1)
            running = self._engine.running(request.id)
            yield Chunk(finish_reason="error" if running else "moved", error=str(error), running=running)
        finally:
            self._streams -= 1

    async def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    async def status(self) -> dict[str, Any]:
        """Counters of the engine, seconds since its last step if it has work, whether it is about to leave, and what
        never changes: its context length and its start-up times."""
        status = dataclasses.asdict(self._engine.status())
        return status | {
            "replica": self._name,
            "stalled": self._engine.stalled(),
            "leaving": self._leaving,
            "max_model_len": self._engine.max_model_len,
            "phases": dict(self._engine.phases),
        }

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        status = self._engine.status()
        if status.error is not None:
            raise RuntimeError(f"the engine has stopped: {status.error}")
        if self._engine.stalled() > self._patience:
            raise RuntimeError("the engine makes no step")

    def _leave(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._departure = asyncio.create_task(self._depart())

    async def _depart(self) -> None:
        """Hands all requests over, and ends the process once they know."""
        self._engine.hand_over()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await asyncio.sleep(self._heartbeat / BEATS)  # until the ingresses have heard of it
                while self._streams:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(FAILED_SECONDS)  # what streams said last is on its way
        os._exit(0)


def _call_in(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(act)


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


async def _coalesced(
    deltas: AsyncIterator[Delta], interval: float, silence: float
) -> AsyncGenerator[Delta | None, None]:
    """The same tokens in fewer deltas: at most one per `interval` (seconds), the first and the last at once. None
    after every `silence` seconds without one."""
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
            try:
                async with asyncio.timeout(silence):
                    await arrived.wait()
            except TimeoutError:
                yield None
                continue
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
