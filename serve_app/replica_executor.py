"""What an engine replica executes its steps on: its own process, or ranks that it starts and dies with."""

import logging
import os

from engine.config import EngineConfig
from engine.executor import Executor, LocalExecutor

logger = logging.getLogger(__name__)


def make_executor(config: EngineConfig) -> Executor:
    """Starts what executes the steps. Raises what `LocalExecutor.load` and `start_group` do."""
    if config.tensor_parallel == 1:
        return LocalExecutor.load(config)
    from cluster.worker_group import start_group  # not at the top: most replicas have no ranks

    return start_group(config, _die)


def _die(reason: str) -> None:
    """Ends this process at once, so that Serve replaces it and whoever follows an answer continues it elsewhere; an
    error in the answer would end it instead."""
    logger.error("the replica ends: %s", reason)
    os._exit(1)
