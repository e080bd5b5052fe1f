"""The ingress's view of the engine replicas."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, cast

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engine.request import Request
from serve_app.engine_replica import Chunk, pack
from serve_app.errors import ApiError

RESUMES = 3  # replicas that one request may outlive


class EngineClient:
    """Streams, aborts and status over a deployment handle. Failures are ApiErrors with a 5xx status."""

    def __init__(self, handle: DeploymentHandle[Any], patience: float) -> None:
        self._handle = handle
        self._stream = handle.options(method_name="stream", stream=True)
        self._patience = patience  # seconds for a status
        self._background: set[asyncio.Task[None]] = set()

    async def stream(self, request: Request, interval: float) -> AsyncGenerator[Chunk, None]:
        """The answer's chunks, one per `interval` (seconds). When its replica dies, another continues the answer."""
        tokens = list(request.generated)
        for resumes_left in reversed(range(RESUMES + 1)):
            response = self._call(dataclasses.replace(request, generated=tuple(tokens)), interval)
            try:
                async for chunk in response:
                    tokens += chunk[0]
                    yield chunk
                    if chunk[1] is not None:
                        return
                raise _failure("the engine ended an answer without saying why")
            except RayActorError as error:
                if not resumes_left:
                    raise _failure("the engine replica was lost", status=503) from error
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise _failure(f"the engine takes no requests: {error}", status=503) from error
            finally:
                response.cancel()  # type: ignore[no-untyped-call]

    def _call(self, request: Request, interval: float) -> DeploymentResponseGenerator[Chunk]:
        return cast(DeploymentResponseGenerator[Chunk], self._stream.remote(pack(request), interval))

    def abort(self, request_id: str) -> None:
        """Frees a sequence wherever it is; returns at once. Serve's own cancellation does the same, when it arrives."""
        self._start(self._abort(request_id))

    async def status(self) -> list[dict[str, Any]]:
        """One per replica that answers. Raises ApiError (503) if none does in time."""
        replicas = [reply for reply in await self._broadcast("status") if isinstance(reply, dict)]
        if not replicas:
            raise _failure("no engine replica answers", status=503)
        return replicas

    async def _abort(self, request_id: str) -> None:
        await self._broadcast("abort", request_id)

    async def _broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """What every replica answers, exceptions included; nothing, if there is none or time runs out."""
        try:
            async with asyncio.timeout(self._patience):
                response = self._handle.broadcast(method, *arguments)
                return list(await response.results_async(return_exceptions=True))
        except (TimeoutError, DeploymentUnavailableError):
            return []

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _failure(message: str, status: int = 500) -> ApiError:
    return ApiError(message, status=status, code="engine_unavailable" if status == 503 else "engine_error")
