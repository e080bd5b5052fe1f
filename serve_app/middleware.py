"""The last resort of every HTTP exchange: an unforeseen failure still gets an answer in OpenAI's shape.

Request ids need nothing here: Serve echoes the client's x-request-id or makes one, on every response.
"""

import logging

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ApiError

logger = logging.getLogger("ray.serve")  # whose handlers write to the replica's log


class LastResort:
    """Turns an exception that nobody handled into a 500, and logs it under the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if scope["type"] != "http" or started:
                raise
            logger.exception("request %s failed", Headers(scope=scope).get("x-request-id"))
            error = ApiError("internal server error", status=500)
            await JSONResponse(error.body(), error.status)(scope, receive, send)
