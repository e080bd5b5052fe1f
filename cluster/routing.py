"""Which replica a request goes to: the less busy of two, among those that have been heard of lately."""

import random
import time

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class Fleet:
    """What this process has heard of a deployment's replicas, by their unique ids. Times in seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._heard: dict[str, float] = {}
        self._leaving: set[str] = set()

    def hear(self, replica: str, now: float, leaving: bool = False) -> None:
        """A replica whose engine makes steps, or has none to make, has said so; or that it is about to leave."""
        self._heard[replica] = now
        if leaving:
            self._leaving.add(replica)

    def meet(self, replica: str, now: float) -> None:
        """A replica exists; its silence counts from the first time on."""
        self._heard.setdefault(replica, now)

    def keep(self, replicas: set[str]) -> None:
        """Forgets all others."""
        self._heard = {replica: heard for replica, heard in self._heard.items() if replica in replicas}
        self._leaving &= replicas

    def usable(self, replica: str, now: float) -> bool:
        """Whether to send requests there."""
        return replica not in self._leaving and now - self._heard.get(replica, now) <= self._patience


fleets: dict[
    str, Fleet
] = {}  # of this process, by deployment: Serve makes the routers, and shows them to nobody


class FreshRouter(FIFOMixin, RequestRouter):
    """Power of two choices among usable replicas; among all, if none is."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        now, fleet = time.monotonic(), fleets.get(self._deployment_id.name)
        fresh = [
            replica
            for replica in candidate_replicas
            if fleet is None or fleet.usable(replica.replica_id.unique_id, now)
        ] or candidate_replicas
        return [random.sample(fresh, min(2, len(fresh)))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        fleet, now = fleets.get(self._deployment_id.name), time.monotonic()
        if fleet is not None:
            fleet.keep({replica.replica_id.unique_id for replica in replicas})
            for replica in replicas:
                fleet.meet(replica.replica_id.unique_id, now)
