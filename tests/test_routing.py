"""Which replicas get requests."""

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import routing
from cluster.routing import Fleet, FreshRouter


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
    monkeypatch.setitem(routing.fleets, "engine", fleet)
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
