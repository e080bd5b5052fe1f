"""Which replica a request goes to: the less busy of two, among those that have been heard of lately.

Serve sends the router, and whatever this module defines, to other processes as a copy. So `fleets`, which it must share
with the rest of a process, stands in a module of its own and is only ever reached through that.
"""

import random
import time

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from cluster import fleet as known


class FreshRouter(FIFOMixin, RequestRouter):
    """Power of two choices among usable replicas; among all, if none is.

    Counts of requests come from the replicas. Serve's own go wrong where there are several callers: an answer to one
    counts the requests of all, of which it then sees only its own end; and looking after the replicas keeps such a
    count from expiring.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        now, fleet = time.monotonic(), known.fleets.get(self._deployment_id.name)
        for replica in candidate_replicas:
            load = None if fleet is None else fleet.take_load(replica.replica_id.unique_id)
            if load is not None:
                self.on_new_queue_len_info(replica.replica_id, load)
        fresh = [
            replica
            for replica in candidate_replicas
            if fleet is None or fleet.usable(replica.replica_id.unique_id, now)
        ] or candidate_replicas
        return [random.sample(fresh, min(2, len(fresh)))]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        fleet, now = known.fleets.get(self._deployment_id.name), time.monotonic()
        if fleet is not None:
            fleet.keep({replica.replica_id.unique_id for replica in replicas})
            for replica in replicas:
                fleet.meet(replica.replica_id.unique_id, now)
