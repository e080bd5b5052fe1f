"""The ranks of one model as Ray actors: placed together, watched, and ended together. Steps do not go through Ray."""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.group_executor import GroupExecutor
from cluster.placement import Node, Placement, PlacementError, place
from cluster.rank import Invitation, Rank
from engine.config import EngineConfig

logger = logging.getLogger(__name__)

CPU_RANK = {"CPU": 0.5}  # what a rank asks Ray for
GPU_RANK = {"GPU": 1.0}
RETRY_SECONDS = 0.5  # nodes may still be joining
# A rank sees all GPUs of its node and uses its own: where each sees but one, all call theirs the first, and torch takes
# them for the same one and refuses them symmetric memory.
SEE_ALL = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


class RankWorker:
    """The process of one rank, whose steps run in a thread. Nothing but `watch` is ever called."""

    def __init__(self, config: EngineConfig, rank: int, invitation: Invitation) -> None:
        if config.device == "cuda":
            (own,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            config = replace(config, device=f"cuda:{ordinal(own, os.environ.get('CUDA_VISIBLE_DEVICES'))}")
        self._rank, self._ended = Rank(config, rank, invitation), threading.Event()
        threading.Thread(target=self._run, name=f"rank {rank}", daemon=True).start()

    def watch(self) -> None:
        """Returns when the rank has ended, and fails when its process has."""
        self._ended.wait()

    def _run(self) -> None:
        try:
            self._rank.run()
        except Exception:
            logger.exception("rank %d failed", self._rank.rank)
        finally:
            self._ended.set()


def start_group(config: EngineConfig, lost: Callable[[str], None]) -> GroupExecutor:
    """Starts the ranks of `config.tensor_parallel` and returns when they are ready. They end with this process.

    lost: called once, with a sentence, when a rank ends by itself or fails, in whatever thread notices. Raises
    PlacementError if the cluster has no room for them in `placement_seconds`, and what `GroupExecutor` raises.
    """
    group = _reserve(config)
    workers: list[Any] = []
    closing = threading.Event()

    def release() -> None:
        closing.set()
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)

    try:
        executor = GroupExecutor(config, _own_address(), release, lost)
    except BaseException:
        release()
        raise

    def watch() -> None:
        refs = [worker.watch.remote() for worker in workers]
        ended, _ = ray.wait(refs, num_returns=1)
        if closing.is_set():
            return
        reason = f"rank {refs.index(ended[0])} of {len(refs)} has ended"
        try:
            ray.get(ended[0])
        except ray.exceptions.RayError as error:
            reason += f": {str(error).strip().splitlines()[-1].strip()}"  # Ray's last line says why
        executor.lose(reason)

    try:
        bundle = bundle_of(config)
        for rank in range(config.tensor_parallel):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options: dict[str, Any] = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
            if "GPU" in bundle:
                options["runtime_env"] = SEE_ALL
            actor = ray.remote(RankWorker).options(scheduling_strategy=where, **options)
            workers.append(actor.remote(config, rank, executor.invitation))
        threading.Thread(target=watch, name="watch", daemon=True).start()
        executor.start()
    except BaseException:
        executor.close()
        raise
    return executor


def bundle_of(config: EngineConfig) -> dict[str, float]:
    """What one rank takes of a node."""
    return dict(GPU_RANK if config.device.startswith("cuda") else CPU_RANK)


def ordinal(gpu: str, visible: str | None) -> int:
    """The number that CUDA gives to a GPU of Ray's. visible: CUDA_VISIBLE_DEVICES, whose names Ray takes over."""
    return visible.split(",").index(gpu) if visible else int(gpu)


def _reserve(config: EngineConfig) -> PlacementGroup:
    """Room for all ranks. Raises PlacementError if there is none in time."""
    deadline = time.monotonic() + config.placement_seconds
    bundle = bundle_of(config)
    placement = _placement(config, bundle, deadline)
    how: dict[str, Any] = {"strategy": placement.strategy}
    if placement.topology:
        how = {"topology_strategy": placement.topology}
    group: PlacementGroup = placement_group(placement.bundles, **how)
    if group.wait(max(1.0, deadline - time.monotonic())):
        return group
    remove_placement_group(group)
    one = " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    raise PlacementError(
        f"tensor_parallel: no room for {config.tensor_parallel} ranks of {one} each came free together within "
        f"{config.placement_seconds:g} s (placement_seconds)"
    )


def _placement(config: EngineConfig, bundle: dict[str, float], deadline: float) -> Placement:
    while True:
        nodes = [Node(node["Labels"], node["Resources"]) for node in _nodes() if node["Alive"]]
        try:
            return place(config.tensor_parallel, bundle, nodes)
        except PlacementError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_SECONDS)


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
