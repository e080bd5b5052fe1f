"""Ranks as Ray actors, on a made-up cluster of two NVLink domains."""

import logging
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.placement import DOMAIN_LABELS, PlacementError
from cluster.worker_group import SEE_ALL, RankWorker, ordinal, start_group
from conftest import MARK, marked_processes
from engine.config import EngineConfig, SamplingParams
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.request import Request
from fakes import TOY, generate, write_checkpoint

MEMORY = 80 * 2**20  # of a node's object store, the least that Ray takes


@pytest.fixture(scope="module")
def domains() -> Iterator[dict[str, str]]:
    """A cluster whose nodes have room for one rank each: one of domain a, two of domain b. Gives each node's domain."""
    os.environ[MARK] = uuid.uuid4().hex
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "num_gpus": 2,
            "include_dashboard": False,
            "object_store_memory": MEMORY,
        },
    )
    for domain in ("a", "b", "b"):
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY, labels={DOMAIN_LABELS[0]: domain})
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    yield {node["NodeID"]: node["Labels"].get(DOMAIN_LABELS[0], "") for node in nodes}
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    del os.environ[MARK]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr("cluster.worker_group.CPU_RANK", {"CPU": 1.0})
    write_checkpoint(tmp_path, TOY)
    return EngineConfig(
        str(tmp_path),
        page_size=4,
        kv_tokens=512,
        max_batch_tokens=160,
        tensor_parallel=2,
        placement_seconds=60,
    )


def test_ranks_stand_in_one_domain_and_the_loss_of_one_is_told(
    config: EngineConfig, domains: dict[str, str]
) -> None:
    lost: list[str] = []
    told = threading.Event()

    def tell(reason: str) -> None:
        lost.append(reason)
        told.set()

    executor = start_group(config, tell)
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert [domains[node] for node in groups[0]["bundles_to_node_id"].values()] == ["b", "b"]
    request = Request("0", (5, 9, 11), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    alone = LocalExecutor.load(replace(config, tensor_parallel=1))
    assert generate(Engine(config, executor), [request]) == generate(Engine(config, alone), [request])
    victim = random.choice(rank_processes())
    os.kill(victim, signal.SIGKILL)
    assert told.wait(10) and len(lost) == 1
    executor.close()
    deadline = time.monotonic() + 10
    while rank_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rank_processes() == []


@pytest.mark.usefixtures("domains")
def test_ranks_without_room_are_refused_in_time_with_what_is_missing(config: EngineConfig) -> None:
    start = time.monotonic()
    with pytest.raises(PlacementError, match="3 ranks of 1 CPU each .* the largest domain, .*=b, for 2"):
        start_group(replace(config, tensor_parallel=3, placement_seconds=1), print)
    assert time.monotonic() - start < 5


def rank_processes() -> list[int]:
    """The ranks that this process has started, by process id."""
    return [
        number
        for number, command in marked_processes(os.environ[MARK]).items()
        if "ray::RankWorker" in command
    ]


def test_a_rank_finds_its_own_gpu_among_those_of_its_node() -> None:
    assert ordinal("3", None) == 3
    assert ordinal("5", "4,5,6") == 1
    assert ordinal("GPU-b", "GPU-a,GPU-b") == 1


@pytest.mark.usefixtures("domains")
def test_a_rank_sees_all_gpus_and_is_told_which_is_its_own() -> None:
    def seen() -> tuple[list[str], str | None]:
        own = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return own, os.environ.get("CUDA_VISIBLE_DEVICES")

    own, visible = ray.get(ray.remote(seen).options(num_cpus=0, num_gpus=1, runtime_env=SEE_ALL).remote())
    assert len(own) == 1 and ordinal(own[0], visible) in (0, 1)
    assert visible is None or len(visible.split(",")) == 2


@pytest.mark.usefixtures("domains")
def test_a_rank_that_cannot_begin_says_why(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(RankWorker):
        def __init__(self, *arguments: Any) -> None:
            raise ValueError("'GPU-a' is not in list")

    monkeypatch.setattr("cluster.worker_group.RankWorker", Broken)
    with pytest.raises(RuntimeError, match="rank . of 2 has ended: ValueError: 'GPU-a' is not in list"):
        start_group(config, print)
