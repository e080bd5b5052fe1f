"""The server of one machine: how it waits for its last answers."""

from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.local_server import wait_until_drained


class Ingress:
    """A deployment that says each of `replies` in turn."""

    def __init__(self, *replies: list[int | Exception] | Exception) -> None:
        self.replies = list(replies)

    def broadcast(self, method: str) -> "Ingress":
        assert method == "drain"
        return self

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[int | Exception]:
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        assert return_exceptions or not any(isinstance(one, Exception) for one in reply)
        return reply


def drained(ingress: Ingress, seconds: float = 60.0) -> int:
    return wait_until_drained(cast(Any, ingress), seconds)


@pytest.mark.parametrize(
    "replies",
    [
        [[2, 1], [1, 0], [0, 0]],
        [[1, RayActorError()], [0]],  # one has died, and its answers with it
        [[0, TimeoutError()], TimeoutError(), [0, 0]],  # one that is silent may still have some
        [[1], DeploymentUnavailableError(DeploymentID("ingress", "app"))],
    ],
)
def test_a_server_waits_for_the_answers_of_every_ingress_that_lives(
    replies: list[list[int | Exception] | Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.local_server.POLL_SECONDS", 0.0)
    ingress = Ingress(*replies)
    assert drained(ingress) == 0
    assert not ingress.replies


def test_a_server_waits_no_longer_than_it_is_allowed_to() -> None:
    assert drained(Ingress([3, 2]), seconds=0.0) == 5
    assert drained(Ingress(TimeoutError()), seconds=0.0) == 0
