"""One question to every replica of a deployment, where some may not answer."""

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle


async def ask_all(
    handle: DeploymentHandle[Any], method: str, *arguments: Any, seconds: float, rest: float
) -> list[Any]:
    """What the replicas answer within `seconds`, and, once one has, within `rest` seconds more; without those that
    fail. Raises DeploymentUnavailableError if Serve knows of none."""
    try:
        async with asyncio.timeout(seconds):
            # Ray's public way to the answers is to wait for all of them, hung replicas included
            calls = await handle.broadcast(method, *arguments)._fetch_replica_results_async()
    except TimeoutError:
        return []
    answers = [asyncio.ensure_future(call.get_async()) for call in calls]  # type: ignore[no-untyped-call]
    if not answers:
        return []
    try:
        await asyncio.wait(answers, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if any(answer.done() for answer in answers):
            await asyncio.wait(answers, timeout=rest)
    finally:
        for answer in answers:
            answer.cancel()  # those that are late; whoever asked may have left, too
    done = [answer for answer in answers if answer.done() and not answer.cancelled()]
    return [answer.result() for answer in done if answer.exception() is None]
