"""Responses on the wire: whole bodies, and server-sent events framed the way the SDKs read them."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.errors import ApiError
from serve_app.generation import Event, Generation

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every body and chunk of one response repeats."""

    id: str
    created: int  # Unix seconds
    model: str
    chat: bool

    def whole(self, generation: Generation, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a response that does not stream."""
        choices = [
            self._whole_choice(index, answer.text, answer.finish_reason)
            for index, answer in enumerate(generation.answers)
        ]
        return self._fields("chat.completion") | {"choices": choices, "usage": dict(usage)}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """A chat choice's first chunk, which names its role."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None) if self.chat else None

    def piece(self, event: Event) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": event.text} if event.text else {}
        return self._chunk(event.choice, delta if self.chat else event.text, event.finish_reason)

    def totals(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The chunk that carries the usage and no choice."""
        return self._fields("chat.completion.chunk") | {"choices": [], "usage": dict(usage)}

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _whole_choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, index: int, new: Any, finish_reason: str | None) -> dict[str, Any]:
        key = "delta" if self.chat else "text"
        choice = {"index": index, key: new, "logprobs": None, "finish_reason": finish_reason}
        return self._fields("chat.completion.chunk") | {"choices": [choice]}


class EventStream(StreamingResponse):
    """A stream whose generation ends with it, whichever of the two is cut first."""

    def __init__(
        self, frames: AsyncIterator[bytes], generation: Generation, headers: Mapping[str, str]
    ) -> None:
        super().__init__(frames, media_type="text/event-stream", headers={**HEADERS, **headers})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def frames(
    envelope: Envelope, generation: Generation, quiet_seconds: float, prompt_tokens: int, include_usage: bool
) -> AsyncIterator[bytes]:
    """The response as SSE frames. A failure becomes an error event, because the status is long sent."""
    # OpenAI's clients expect the key in every chunk once they have asked for the totals.
    extra = {"usage": None} if include_usage else {}
    try:
        for choice in range(len(generation.answers)):
            opening = envelope.opening(choice)
            if opening is not None:
                yield _frame(opening | extra)
        async for event in generation.events(quiet_seconds):
            yield KEEP_ALIVE if event is None else _frame(envelope.piece(event) | extra)
        if include_usage:
            yield _frame(envelope.totals(generation.usage(prompt_tokens)))
    except ApiError as error:
        yield _frame(error.body())
    yield DONE


def _frame(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
