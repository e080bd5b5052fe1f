"""One answer over engines that die, hang, leave or fail: what the client is shown."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from engine.request import Request
from serve_app.chunks import Chunk
from serve_app.engine_client import EngineClient
from serve_app.engine_replica import unpack
from serve_app.errors import ApiError

REQUEST = Request("r", (1, 2, 3))
ACCEPTED, END = Chunk(), Chunk([9], "stop", {})
HANG = 60.0

Script = list[Chunk | float | Exception]


class Call:
    """Plays chunks, pauses (seconds) and exceptions."""

    def __init__(self, script: Script) -> None:
        self.chunks, self.cancelled = self._play(script), False

    async def _play(self, script: Script) -> AsyncIterator[Chunk]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield item

    def __anext__(self) -> Any:
        return self.chunks.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment whose n-th call plays the n-th script."""

    deployment_name = "engine"

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.asked: list[Request] = []
        self.calls: list[Call] = []

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, packed: dict[str, Any], interval: float) -> Call:
        self.asked.append(unpack(packed))
        self.calls.append(Call(self.scripts.pop(0)))
        return self.calls[-1]

    def broadcast(self, *_: Any) -> Any:
        raise DeploymentUnavailableError(DeploymentID("engine", "app"))


async def answer(handle: Handle, heartbeat: float = 0.2, patience: float = 5.0) -> list[int]:
    client = EngineClient(cast(Any, handle), heartbeat, patience)
    tokens: list[int] = []
    try:
        async for chunk in client.stream(REQUEST, 0.0):
            assert chunk.token_ids or chunk.finish_reason == "stop", (
                "signs of life are not the client's business"
            )
            tokens += chunk.token_ids
        return tokens
    finally:
        for task in client._background:
            task.cancel()
        assert all(call.cancelled for call in handle.calls)


async def test_an_answer_goes_on_where_a_dead_engine_left_it() -> None:
    handle = Handle([ACCEPTED, Chunk([4, 5]), RayActorError()], [ACCEPTED, Chunk([6]), END])
    assert await answer(handle) == [4, 5, 6, 9]
    assert [request.generated for request in handle.asked] == [(), (4, 5)]


async def test_an_engine_that_gives_no_sign_of_life_is_left() -> None:
    handle = Handle([ACCEPTED, Chunk([4]), HANG], [ACCEPTED, END])
    assert await answer(handle) == [4, 9]


async def test_signs_of_life_keep_a_request_where_it_waits() -> None:
    waits: Script = [ACCEPTED]
    for _ in range(8):
        waits += [0.1, Chunk()]
    assert await answer(Handle([*waits, END])) == [9]


async def test_an_engine_that_leaves_hands_its_answer_over_however_often() -> None:
    scripts: list[Script] = [[ACCEPTED, Chunk([i], "moved", {})] for i in range(4)]
    handle = Handle(*scripts, [ACCEPTED, END])
    assert await answer(handle) == [0, 1, 2, 3, 9]
    assert not handle.asked[-1].alone


async def test_an_engine_that_fails_loses_nobodys_answer() -> None:
    failed = Chunk(finish_reason="error", error="out of memory", running=True)
    assert await answer(Handle([ACCEPTED, Chunk([4]), failed], [ACCEPTED, END])) == [4, 9]


async def test_a_request_that_kills_every_engine_is_isolated_and_then_given_up() -> None:
    kills: Script = [ACCEPTED, Chunk(running=True), RayActorError()]
    handle = Handle(*[list(kills) for _ in range(9)])
    with pytest.raises(ApiError, match="given up") as caught:
        await answer(handle)
    assert caught.value.status == 500 and caught.value.code == "engine_died"
    assert [request.alone for request in handle.asked] == [False, False, True]


async def test_a_full_pool_refuses_new_requests_but_never_one_that_it_has_had() -> None:
    full = BackPressureError(1, 1)
    with pytest.raises(ApiError) as caught:
        await answer(Handle([full]))
    assert caught.value.status == 503
    handle = Handle([ACCEPTED, Chunk([4]), RayActorError()], [full], [full], [ACCEPTED, END])
    assert await answer(handle) == [4, 9]


async def test_a_request_that_finds_no_engine_for_too_long_is_told_so() -> None:
    scripts: list[Script] = [[HANG] for _ in range(20)]
    with pytest.raises(ApiError, match="no engine replica answers") as caught:
        await answer(Handle(*scripts), heartbeat=0.05, patience=0.3)
    assert caught.value.status == 503
