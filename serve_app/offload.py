"""Work that grows with what a client sends: on the event loop while small, in a thread when large."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from serve_app import limits

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


async def run(
    size: int, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """`function(*args)`; `size` (bytes or characters) decides where."""
    if size <= limits.INLINE_SIZE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
