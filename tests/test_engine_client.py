"""One answer over engines that die, hang, leave or fail: what the client is shown."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
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


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
async def test_a_call_that_grpc_breaks_off_is_a_dead_engines(code: grpc.StatusCode) -> None:
    broken = AioRpcError(code, Metadata(), Metadata())
    assert await answer(Handle([ACCEPTED, Chunk([4]), broken], [ACCEPTED, END])) == [4, 9]


async def test_an_answer_that_stops_short_goes_on_elsewhere() -> None:
    assert await answer(Handle([ACCEPTED, Chunk([4])], [ACCEPTED, END])) == [4, 9]


async def test_an_engine_that_gives_no_sign_of_life_is_left() -> None:
    handle = Handle([ACCEPTED, Chunk([4]), HANG], [ACCEPTED, END])
    assert await answer(handle) == [4, 9]


async def test_signs_of_life_keep_a_request_where_it_waits() -> None:
    waits: Script = [ACCEPTED]
    for _ in range(12):
        waits += [0.1, Chunk()]
    assert await answer(Handle([*waits, END]), heartbeat=1.0) == [9]


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


class Pool(Handle):
    """A deployment whose replicas say each of `statuses` in turn, or nothing at all for None."""

    def __init__(self, *statuses: dict[str, Any] | None) -> None:
        super().__init__()
        self.statuses, self.asked_all, self.left = statuses, 0, 0

    def broadcast(self, *_: Any) -> Any:
        self.asked_all += 1
        if self.asked_all == 1:
            raise RuntimeError("something that nobody foresaw")
        calls = [
            SimpleNamespace(get_async=lambda status=status: self._say(status)) for status in self.statuses
        ]

        async def fetch() -> list[Any]:
            return calls

        return SimpleNamespace(_fetch_replica_results_async=fetch)

    async def _say(self, status: dict[str, Any] | None) -> dict[str, Any]:
        try:
            if status is None:
                await asyncio.sleep(HANG)
                raise AssertionError
            return status
        except asyncio.CancelledError:
            self.left += 1
            raise


def status_of(replica: str, stalled: float = 0.0, error: str | None = None) -> dict[str, Any]:
    loads = {"running": 1, "waiting": 0}
    return {"replica": replica, "stalled": stalled, "error": error, "leaving": False, **loads}


async def test_what_counts_of_an_engine_are_its_steps_and_looking_goes_on_whatever_happens() -> None:
    pool = Pool(
        status_of("well"), status_of("slow", 2.0), status_of("hung", 4.0), status_of("failed", 0.0, "oops")
    )
    client = EngineClient(cast(Any, pool), heartbeat=5.0, patience=60.0)
    client._heartbeat = 0.05  # looks often, but judges as before
    now = time.monotonic()
    for replica in ("well", "slow", "hung", "failed"):
        client._fleet.meet(replica, now - 3.5)
    client._watch()
    async with asyncio.timeout(10):
        while pool.asked_all < 3:
            await asyncio.sleep(0.01)
    usable = [name for name in ("well", "slow", "hung", "failed") if client._fleet.usable(name, now + 0.1)]
    assert usable == ["well", "slow"]
    for task in client._background:
        task.cancel()


async def test_nobody_waits_for_hung_engines_and_no_call_to_them_is_left() -> None:
    pool = Pool(None, None)
    pool.asked_all = 1
    client = EngineClient(cast(Any, pool), heartbeat=0.5, patience=60.0)
    client._watched = True
    with pytest.raises(ApiError, match="no engine replica answers"):
        await client.status()
    asking = asyncio.create_task(client.status())
    await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.sleep(0)
    assert pool.left == 4
