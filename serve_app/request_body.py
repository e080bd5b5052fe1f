"""A request's body: bounded while it arrives, parsed as strict JSON, validated."""

import json
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from serve_app import offload
from serve_app.errors import ApiError, from_validation
from serve_app.schemas import GenerationRequest

Model = TypeVar("Model", bound=GenerationRequest)


async def read(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The body as `model`. Raises ApiError: 413 before more than `max_bytes` are held, 400 for what is not valid."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            f"content-type must be application/json, not {kind or 'missing'}", code="invalid_content_type"
        )
    body = await _receive(request, max_bytes)
    return await offload.run(len(body), _parse, body, model)


async def _receive(request: Request, max_bytes: int) -> bytes:
    refusal = ApiError(f"the body exceeds {max_bytes} bytes", status=413, code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise refusal
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise refusal
    return bytes(body)


def _parse(body: bytes, model: type[Model]) -> Model:
    try:
        raw = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise from_validation(error) from None
