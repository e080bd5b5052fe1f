"""The ingress's view of the engine replicas."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, cast

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.fleet import Fleet, fleets
from engine.request import EngineError, Request
from serve_app.broadcast import ask_all
from serve_app.chunks import Chunk
from serve_app.engine_replica import pack
from serve_app.errors import ApiError
from serve_app.journal import Journal

WATCHES = 5  # looks at every replica in the time after which an engine counts as hung
SILENT = 0.6  # of that time, after which no new request is sent to an engine
RETRY_SECONDS = 0.1  # before a request that was handed over, or found nobody, is sent again
LEFT = ("moved", "error")  # finish reasons after which another engine goes on
LOST = (RayActorError, AioRpcError)  # a call breaks, as Serve tells it, or where it lets gRPC tell it

logger = logging.getLogger("ray.serve")  # whose handlers write to the replica's log


class Silence(Exception):
    """An engine has given no sign of life for too long."""


class EngineClient:
    """Streams, aborts and status over a deployment handle. Failures are ApiErrors with a 5xx status.

    heartbeat: seconds of silence after which an engine counts as hung. patience: seconds that a request waits for any
    engine at all.
    """

    def __init__(self, handle: DeploymentHandle[Any], heartbeat: float, patience: float) -> None:
        self._handle = handle
        self._stream = handle.options(method_name="stream", stream=True)
        self._heartbeat, self._patience = heartbeat, patience
        self._fleet = fleets[handle.deployment_name] = Fleet(SILENT * heartbeat)
        self._background: set[asyncio.Task[None]] = set()
        self._watched = False

    async def stream(self, request: Request, interval: float) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks, one per `interval` (seconds). When its engine dies, hangs or leaves, another one
        continues the answer where it stood, and the client sees nothing of it."""
        self._watch()
        journal = Journal(request)
        alone = time.monotonic()  # since when no engine has been heard
        while True:
            try:
                async with aclosing(self._alive(self._call(journal.request(), interval))) as chunks:
                    async for chunk in chunks:
                        alone = time.monotonic()
                        shown = journal.record(chunk)
                        if chunk.finish_reason in LEFT:
                            if chunk.token_ids:
                                yield Chunk(chunk.token_ids)
                            break
                        if chunk.token_ids or chunk.finish_reason is not None:
                            yield shown
                        if chunk.finish_reason is not None:
                            return
                    else:
                        raise EngineError("the engine ended an answer without saying why")
                if chunk.finish_reason == "error":
                    raise EngineError(chunk.error)
                journal.moved()
                logger.warning("request %s was handed over and goes on elsewhere", request.id)
            except (*LOST, EngineError, Silence) as error:
                if not journal.lost():
                    raise _failure(
                        "this request was given up: the engines that served it died, the last one while it served "
                        "nothing else",
                        code="engine_died",
                    ) from error
                if journal.accepted:
                    why = str(error).strip().partition("\n")[0] or type(error).__name__
                    logger.warning("request %s lost its engine and goes on elsewhere: %s", request.id, why)
            except (BackPressureError, DeploymentUnavailableError) as error:
                if not journal.accepted:
                    raise _failure(f"the engine takes no requests: {error}", status=503) from error
            if time.monotonic() - alone > self._patience:
                raise _failure("no engine replica answers", status=503)
            await asyncio.sleep(RETRY_SECONDS)

    async def _alive(self, response: DeploymentResponseGenerator[Chunk]) -> AsyncGenerator[Chunk, None]:
        """The chunks of one call. Raises Silence where they stop coming."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._heartbeat):
                        chunk = await anext(response)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise Silence from error
                yield chunk
        finally:
            response.cancel()  # type: ignore[no-untyped-call]

    def _call(self, request: Request, interval: float) -> DeploymentResponseGenerator[Chunk]:
        return cast(DeploymentResponseGenerator[Chunk], self._stream.remote(pack(request), interval))

    def abort(self, request_id: str) -> None:
        """Frees a sequence wherever it is; returns at once. Serve's own cancellation does the same, when it arrives."""
        self._start(self._abort(request_id))

    async def status(self) -> list[dict[str, Any]]:
        """One per replica that answers. Raises ApiError (503) if none does in time."""
        self._watch()
        replicas = await self._ask_all("status", seconds=self._heartbeat)
        if not replicas:
            raise _failure("no engine replica answers", status=503)
        return replicas

    def serving(self, status: dict[str, Any]) -> bool:
        """Whether a replica of that status takes requests and makes steps."""
        return not status["error"] and not status["leaving"] and status["stalled"] < self._heartbeat

    async def _abort(self, request_id: str) -> None:
        await self._ask_all("abort", request_id, seconds=self._heartbeat)

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._start(self._keep_watching())

    async def _keep_watching(self) -> None:
        """Tells the router which replicas are alive, and which are about to leave."""
        while True:
            try:
                for reply in await self._ask_all("status", seconds=self._heartbeat / WATCHES):
                    if not reply["error"]:
                        # what counts is when the engine last made a step, not when its process said so
                        heard, load = time.monotonic() - reply["stalled"], reply["running"] + reply["waiting"]
                        self._fleet.hear(reply["replica"], heard, reply["leaving"], load)
            except Exception:
                logger.exception("cannot look after the engines")  # the next look may
            await asyncio.sleep(self._heartbeat / WATCHES)

    async def _ask_all(self, method: str, *arguments: Any, seconds: float) -> list[Any]:
        rest = min(seconds, self._heartbeat / WATCHES)
        try:
            return await ask_all(self._handle, method, *arguments, seconds=seconds, rest=rest)
        except DeploymentUnavailableError:
            return []

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _failure(message: str, status: int = 500, code: str | None = None) -> ApiError:
    code = code or ("engine_unavailable" if status == 503 else "engine_error")
    return ApiError(message, status=status, code=code)
