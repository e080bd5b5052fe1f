"""The sequences of one API request: followed together, and never outliving it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from engine.request import DecodeStats
from serve_app.answer import Answer
from serve_app.chunks import Chunk
from serve_app.engine_client import EngineClient
from serve_app.errors import ApiError

STATISTICS_SECONDS = 1.0  # that an answer may wait for how it was decoded

logger = logging.getLogger("ray.serve")  # whose handlers write to the replica's log


@dataclass(frozen=True, slots=True)
class Event:
    """New text of one choice; `finish_reason` comes with its last."""

    choice: int
    text: str
    finish_reason: str | None


class Generation:
    """Runs `answers` from construction on, in chunks per `interval` (seconds). Whoever makes one must `close` it."""

    def __init__(self, engine: EngineClient, answers: Sequence[Answer], interval: float) -> None:
        self.answers = answers
        self._engine = engine
        self._events: asyncio.Queue[Event | ApiError] = asyncio.Queue()
        self._first: Event | None = None
        self._interval = interval
        self._open = len(answers)
        self._on_close: Callable[[], None] = _nothing
        self._tasks = [
            asyncio.create_task(self._follow(choice, answer)) for choice, answer in enumerate(answers)
        ]

    async def settle(self, seconds: float) -> None:
        """Waits until the first event or for `seconds`: a failure until then can still be an HTTP status."""
        self._first = await self._next(seconds)

    async def events(self, quiet_seconds: float | None) -> AsyncIterator[Event | None]:
        """Every event; None after so much silence. Raises ApiError when a sequence fails."""
        if self._first is not None:
            yield self._first
        while self._open:
            yield await self._next(quiet_seconds)

    def on_close(self, act: Callable[[], None]) -> None:
        """Has `act` called once, when the generation is closed."""
        self._on_close = act

    def close(self) -> None:
        """Aborts what still runs. Returns at once."""
        for task in self._tasks:
            task.cancel()
        act, self._on_close = self._on_close, _nothing
        act()

    def usage(self, prompt_tokens: int) -> dict[str, Any]:
        """OpenAI's counters, and under `decode` how the tokens were decoded."""
        completion_tokens = sum(answer.tokens for answer in self.answers)
        # a prompt counts once, however many choices it has: as its first one found it
        cached = {answer.request.prompt: answer.stats.cached_tokens for answer in reversed(self.answers)}
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "decode": _decode_usage([answer.stats for answer in self.answers]),
        }

    async def _next(self, seconds: float | None) -> Event | None:
        try:
            async with asyncio.timeout(seconds):
                event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, ApiError):
            raise event
        self._open -= event.finish_reason is not None
        return event

    async def _follow(self, choice: int, answer: Answer) -> None:
        ended = False
        try:
            async with aclosing(self._engine.stream(answer.request, self._interval)) as chunks:
                async for chunk in chunks:
                    ended = chunk.finish_reason is not None
                    if chunk.finish_reason not in (None, "stop", "length"):
                        raise _failure(chunk.finish_reason, chunk.error)
                    if chunk.stats is not None:
                        answer.stats = DecodeStats(**chunk.stats)
                    text = answer.push(chunk.token_ids, chunk.finish_reason)
                    if answer.finish_reason and not ended:  # a stop string
                        await self._cut(answer, chunks)
                        ended = True
                    if text or ended:
                        self._events.put_nowait(Event(choice, text, answer.finish_reason))
                    if ended:
                        return
        except ApiError as failure:
            self._events.put_nowait(failure)
        except Exception:
            logger.exception("request %s failed", answer.request.id)
            self._events.put_nowait(ApiError("internal server error", status=500))
        finally:
            if not ended:
                self._engine.abort(answer.request.id)

    async def _cut(self, answer: Answer, chunks: AsyncIterator[Chunk]) -> None:
        """Aborts a sequence whose answer is complete, and waits a moment for its statistics."""
        self._engine.abort(answer.request.id)
        with suppress(TimeoutError, ApiError):
            async with asyncio.timeout(STATISTICS_SECONDS):
                async for chunk in chunks:
                    if chunk.stats is not None:
                        answer.stats = DecodeStats(**chunk.stats)
                    if chunk.finish_reason is not None:
                        return


def _nothing() -> None:
    pass


def _failure(finish_reason: str | None, error: str | None) -> ApiError:
    message = error or "the engine ended this request"
    if finish_reason == "refused":
        return ApiError(message, param=message.partition(":")[0], code="invalid_value")
    return ApiError(message, status=500, code="engine_error")


def _decode_usage(stats: Sequence[DecodeStats]) -> dict[str, Any]:
    forwards = sum(each.forwards for each in stats)
    return {
        "mode": sorted({mode for each in stats for mode in each.modes}),
        "forward_passes": forwards,
        "tokens_per_forward": round(sum(each.tokens for each in stats) / forwards, 3) if forwards else 0.0,
        "drafted": sum(each.drafted for each in stats),
        "accepted": sum(each.accepted for each in stats),
        "denoise_passes": sum(each.denoise_passes for each in stats),
        "drafted_elsewhere": sum(each.drafted_elsewhere for each in stats),
        "resumed": sum(each.resumed for each in stats),
    }
