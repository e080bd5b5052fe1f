"""The deployments of a staged application: verify replicas own the sequences, and draft replicas draw for them.

Serve's handle tells the verifiers which drafters there are; asks and answers go over the exchange between the engines.
"""

import asyncio
import dataclasses
import logging
import time
from typing import Any

import ray
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from engine.config import EngineConfig
from serve_app.broadcast import ask_all
from serve_app.engine_replica import EngineReplica

LOOK_SECONDS = 1.0  # between looks at which drafters there are

logger = logging.getLogger("ray.serve")  # whose handlers write to the replica's log


def _own_address() -> str:
    """At which other nodes reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class DraftStage:
    """One drafter behind a Serve replica. Raises CheckpointError if the checkpoint cannot be served."""

    def __init__(self, config: EngineConfig, patience: float) -> None:
        """patience: seconds that a step may take, after which the replica is replaced."""
        # Not at the top: the builder imports this module and must not pay for torch.
        from cluster.draft_server import DraftServer
        from engine.drafter import load_drafter
        from serve_app.replica_executor import make_executor

        self._server = DraftServer(load_drafter(config, make_executor), _own_address())
        self._patience = patience

    async def endpoint(self) -> tuple[str, str]:
        """Where verifiers ask, and the key without which nobody can."""
        return dataclasses.astuple(self._server.endpoint)

    async def status(self) -> dict[str, Any]:
        return dataclasses.asdict(self._server.status()) | {"malformed": self._server.malformed}

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._server.error is not None:
            raise RuntimeError(self._server.error)
        if time.monotonic() - self._server.beat > self._patience:
            raise RuntimeError("the drafter makes no step")


class VerifyStage(EngineReplica):
    """An engine replica whose drafts are drawn by the draft pool, while there is one that answers in time."""

    def __init__(
        self,
        config: EngineConfig,
        heartbeat: float,
        patience: float,
        drafts: DeploymentHandle[Any],
        draft_patience: float,
        canvases: bool,
    ) -> None:
        """draft_patience and canvases: as for Asking."""
        from cluster.remote_drafts import RemoteDrafts
        from engine.asking import Asking

        self._source, self._drafts = RemoteDrafts(), drafts
        self._looking: asyncio.Task[None] | None = None
        super().__init__(config, heartbeat, patience, Asking(self._source, draft_patience, canvases))

    async def check_health(self) -> None:
        """Serve calls it first when it starts the replica, and then again and again."""
        await super().check_health()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        """Keeps up with the drafters that there are."""
        from cluster.draft_server import Endpoint

        while True:
            try:
                there = await ask_all(self._drafts, "endpoint", seconds=self._heartbeat, rest=self._heartbeat)
                if there:
                    self._source.use(Endpoint(*answer) for answer in there)
                else:
                    logger.warning("no drafter said within %.1f s that it is there", self._heartbeat)
            except DeploymentUnavailableError:
                self._source.use(())
            await asyncio.sleep(LOOK_SECONDS)
