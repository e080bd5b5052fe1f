"""Errors in OpenAI's shape: the SDKs read `code`, `param` and `type` from it."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from serve_app import limits

TAG = "~"  # starts the names of union branches, which no client should see


class ApiError(Exception):
    """An answer that is not a completion. `param` names the request's field at fault, as `messages[0].content`."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message[: limits.ERROR_CHARACTERS]
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request; more of them would only amplify a bad one."""
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = path_of(detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {message}" if param else message, param=param, code="invalid_value")


def path_of(location: Sequence[int | str]) -> str | None:
    """("messages", 0, "content") is `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(TAG):
            path += f".{part[: limits.NAME_CHARACTERS]}" if path else part
    return path or None
