"""What an engine replica executes its steps on: its own process, or ranks that it starts and dies with."""

import logging
import os
import threading

from engine.config import EngineConfig
from engine.executor import Executor, LocalExecutor
from serve_app.engine_replica import FAILED_SECONDS

logger = logging.getLogger(__name__)


def make_executor(config: EngineConfig) -> Executor:
    """Starts what executes the steps. Raises what `LocalExecutor.load` and `start_group` do."""
    if config.tensor_parallel == 1:
        return LocalExecutor.load(config)
    from cluster.worker_group import start_group  # not at the top: most replicas have no ranks

    return start_group(config, _die)


def _die(reason: str) -> None:
    """Ends this process once its requests have been told, so that Serve replaces it, idle or not."""
    logger.error("the replica ends: %s", reason)
    threading.Timer(FAILED_SECONDS, os._exit, (1,)).start()
