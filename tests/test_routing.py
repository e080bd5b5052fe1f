"""Which replicas get requests."""

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.config import RequestRouterConfig

from cluster.fleet import Fleet, fleets
from cluster.routing import FreshRouter

ROOT = Path(__file__).parent.parent


def test_a_replica_that_falls_silent_gets_no_requests_until_it_is_heard_again() -> None:
    fleet = Fleet(3)
    fleet.hear("a", 10)
    assert fleet.usable("a", 13)
    assert not fleet.usable("a", 13.1)
    fleet.hear("a", 14)
    assert fleet.usable("a", 15)


def test_a_new_replica_is_usable_and_has_as_long_to_be_heard() -> None:
    fleet = Fleet(3)
    assert fleet.usable("new", 100)
    fleet.meet("new", 100)
    fleet.meet("new", 200)  # it is known already
    assert fleet.usable("new", 103) and not fleet.usable("new", 104)


def test_a_replica_that_leaves_gets_no_requests_however_alive_it_is() -> None:
    fleet = Fleet(3)
    fleet.hear("a", 10, leaving=True)
    fleet.hear("a", 11)
    assert not fleet.usable("a", 11)


def test_replicas_that_are_gone_are_forgotten() -> None:
    fleet = Fleet(3)
    fleet.hear("a", 10, leaving=True)
    fleet.keep({"b"})
    assert fleet.usable("a", 99)


@pytest.mark.parametrize("replicas", [1, 2, 5])
async def test_the_router_chooses_among_usable_replicas_only_unless_there_are_none(
    replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = FreshRouter.__new__(FreshRouter)
    router._deployment_id = cast(Any, SimpleNamespace(name="engine"))
    fleet = Fleet(3)
    monkeypatch.setitem(fleets, "engine", fleet)
    monkeypatch.setattr("cluster.routing.time.monotonic", lambda: 100.0)
    candidates: list[Any] = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=str(i))) for i in range(replicas)
    ]
    random.seed(0)
    [chosen] = await router.choose_replicas(candidates)
    assert len(chosen) == min(2, replicas) and len({id(each) for each in chosen}) == len(chosen)
    for index in range(1, replicas):
        fleet.hear(str(index), 0.0)
    for _ in range(10):
        assert await router.choose_replicas(candidates) == [[candidates[0]]]
    fleet.hear("0", 0.0)
    assert len((await router.choose_replicas(candidates))[0]) == min(2, replicas)


async def test_the_router_believes_what_replicas_say_of_their_load_until_it_has_sent_them_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = FreshRouter.__new__(FreshRouter)
    router._deployment_id = cast(Any, SimpleNamespace(name="engine"))
    fleet = Fleet(3)
    monkeypatch.setitem(fleets, "engine", fleet)
    believed: list[tuple[str, int]] = []
    monkeypatch.setattr(
        router, "on_new_queue_len_info", lambda name, load: believed.append((name.unique_id, load))
    )
    candidates: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "ab"]
    fleet.hear("a", 0, load=7)
    fleet.hear("b", 0)
    await router.choose_replicas(candidates)
    await router.choose_replicas(candidates)
    assert believed == [("a", 7)]
    fleet.hear("a", 1, load=0)
    fleet.hear("b", 1, load=3)
    fleet.keep({"a"})
    await router.choose_replicas(candidates)
    assert believed == [("a", 7), ("a", 0)]


ELSEWHERE = """
import asyncio, sys, time
from types import SimpleNamespace as Some
from ray import cloudpickle
from cluster.fleet import Fleet, fleets
Router = cloudpickle.loads(sys.stdin.buffer.read())
router = Router.__new__(Router)
router._deployment_id = Some(name="engine")
fleet = fleets["engine"] = Fleet(3)
fleet.hear("a", time.monotonic(), leaving=True)
fleet.hear("b", time.monotonic())
replicas = [Some(replica_id=Some(unique_id=name)) for name in "ab"]
[chosen] = asyncio.run(router.choose_replicas(replicas))
print(*(replica.replica_id.unique_id for replica in chosen))
"""


def test_a_router_that_serve_has_sent_elsewhere_sees_the_fleet_there() -> None:
    sent = RequestRouterConfig(
        request_router_class=cast(Any, FreshRouter)
    ).get_serialized_request_router_cls()
    run = subprocess.run([sys.executable, "-c", ELSEWHERE], input=sent, capture_output=True, cwd=ROOT)
    assert (run.returncode, run.stdout.split()) == (0, [b"b"]), run.stderr.decode()
