"""One fault of each kind, on one cluster of two nodes: under load, and every answer is compared with its reference."""

import asyncio
from collections.abc import Iterator

import pytest

from chaos import FAULTS, ChaosCluster, Outcome, Reference, Shape, questions, settled, trial
from chaos import reference as ask

IN_FLIGHT = 20
pytestmark = pytest.mark.timeout(240)  # a busy machine is slow, not wrong


@pytest.fixture(scope="module")
def cluster() -> Iterator[ChaosCluster]:
    with ChaosCluster(Shape(), heartbeat=3.0) as running:
        yield running


@pytest.fixture(scope="module")
def reference(cluster: ChaosCluster) -> Reference:
    return asyncio.run(ask(cluster, questions(IN_FLIGHT + 5, tokens=200), IN_FLIGHT))


def inflict(cluster: ChaosCluster, reference: Reference, fault: str) -> Outcome:
    async def run() -> Outcome:
        await settled(cluster)
        return await trial(cluster, FAULTS[fault], reference, IN_FLIGHT)

    outcome = asyncio.run(run())
    assert outcome.complaints == () and outcome.lost == outcome.wrong == 0
    assert outcome.in_flight >= IN_FLIGHT // 2
    return outcome


def test_a_killed_engine_costs_no_token(cluster: ChaosCluster, reference: Reference) -> None:
    outcome = inflict(cluster, reference, "engine killed")
    assert outcome.on_victim and not outcome.sockets


def test_an_engine_that_is_told_to_end_costs_no_token(cluster: ChaosCluster, reference: Reference) -> None:
    outcome = inflict(cluster, reference, "engine terminated")
    assert outcome.on_victim and not outcome.sockets


def test_a_killed_controller_costs_no_token(cluster: ChaosCluster, reference: Reference) -> None:
    assert not inflict(cluster, reference, "controller killed").sockets


def test_a_killed_ingress_costs_its_own_connections_only(cluster: ChaosCluster, reference: Reference) -> None:
    assert 0 < inflict(cluster, reference, "ingress killed").sockets < IN_FLIGHT


def test_a_hung_engine_costs_no_token(cluster: ChaosCluster, reference: Reference) -> None:
    """It goes on when the others have answered for it, and does no harm then."""
    outcome = inflict(cluster, reference, "engine hung")
    assert outcome.on_victim and not outcome.sockets


def test_a_lost_node_costs_no_token(cluster: ChaosCluster, reference: Reference) -> None:
    """The last one, for nobody brings another node. Its engine may stand on the other one since it was replaced."""
    assert inflict(cluster, reference, "node killed").sockets < IN_FLIGHT
