"""An engine and its ranks across process borders: made-up ranks, and real ones that share the bundled model."""

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from cluster.frames import pack_output, unpack_steps
from cluster.group_executor import GroupExecutor
from cluster.link import Hub, Spoke
from cluster.rank import AGREED, FAILED, JOINED, OUTPUT, READY, REPORT, RUN, STOP, Invitation, Rank
from engine.config import (
    CheckpointError,
    DiffusionParams,
    EngineConfig,
    ModeChoice,
    ModelConfig,
    SamplingParams,
)
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.request import Request
from engine.step import padding_step
from fakes import generate

HOST = "127.0.0.1"
TWO = EngineConfig(tensor_parallel=2, rendezvous_seconds=90, max_model_len=512, lag=1)
MODES: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion")


class MadeUp(threading.Thread):
    """A rank without a model, which reports what it is told to and answers every run with one token."""

    def __init__(self, rank: int, invitation: Invitation, **report: Any) -> None:
        super().__init__(daemon=True)
        geometry = ModelConfig.from_json(Path(TWO.checkpoint) / "config.json")
        self.report: dict[str, Any] = {
            "fingerprint": "f",
            "geometry": asdict(geometry),
            "has_adapter": True,
            "kv_tokens": 1000,
        }
        self.report |= {"torch": "2", "device": "none", "failure": None, "joins": True, "first": 1, **report}
        self.rank, self.invitation, self.runs = rank, invitation, 0
        self.agreed: dict[str, int] = {}
        self.start()

    def run(self) -> None:
        spoke = Spoke(self.invitation.address, self.invitation.token, self.rank, listens=True)
        if self.report["joins"]:
            spoke.send(JOINED)
        if self.report["failure"]:
            spoke.send(FAILED, json.dumps({"checkpoint": True, "message": self.report["failure"]}).encode())
        spoke.send(REPORT, json.dumps(self.report).encode())
        while True:
            kind, body = spoke.receive()
            if kind == AGREED:
                self.agreed = json.loads(body)
                spoke.send(READY, b"{}")
            if kind == RUN:
                self.runs += 1
                number, _ = unpack_steps(body)
                if self.rank == 0:
                    packed = np.array([[1, 7, 0]], np.int64)
                    spoke.send(OUTPUT, pack_output(number + self.report["first"] - 1, packed))
            if kind == STOP:
                break
        spoke.close()


@contextmanager
def executor_of(config: EngineConfig = TWO) -> Iterator[tuple[GroupExecutor, list[str]]]:
    """An executor that waits for its ranks, and what it has said of its loss."""
    lost: list[str] = []
    executor = GroupExecutor(config, HOST, lambda: None, lost.append)
    try:
        yield executor, lost
    finally:
        executor.close()


def test_ranks_agree_upon_the_smallest_cache_and_every_one_gets_every_run() -> None:
    with executor_of() as (executor, lost):
        ranks = [MadeUp(rank, executor.invitation, kv_tokens=1000 - rank) for rank in range(2)]
        executor.start()
        assert executor.config.kv_tokens == 999 and executor.has_adapter and executor.device_name == "none"
        outputs = [executor.run([padding_step()]) for _ in range(3)]
        assert [output.committed() for output in outputs] == [[[7]]] * 3
    for rank in ranks:
        rank.join(10)
        assert rank.agreed == {"kv_tokens": 999} and rank.runs == 3
    assert lost == []


def test_ranks_that_do_not_come_are_named() -> None:
    with executor_of(replace(TWO, rendezvous_seconds=0.3)) as (executor, _):
        MadeUp(0, executor.invitation, joins=False)  # it waits for the other
        with pytest.raises(
            RuntimeError, match=r"of 2 ranks, these have not come within 0.3 s \(rendezvous_seconds\): 1$"
        ):
            executor.start()


def test_ranks_that_do_not_find_each_other_are_named() -> None:
    with executor_of(replace(TWO, rendezvous_seconds=0.5)) as (executor, _):
        for rank in range(2):
            MadeUp(rank, executor.invitation, joins=False)
        with pytest.raises(
            RuntimeError, match=r"have all come, .* not found the others within 0.5 s .*: 0, 1$"
        ):
            executor.start()


def test_a_stranger_does_not_keep_a_caller_waiting() -> None:
    hub = Hub(HOST, 1)
    stranger = Spoke(hub.address, "no token", 0, listens=True)
    start = time.monotonic()
    assert hub.receive(20) is None and hub.met == set()  # so that the caller looks at its own deadline
    assert time.monotonic() - start < 10
    stranger.close()
    hub.close()


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"fingerprint": "g"}, "different checkpoints of the name .*: rank 0 has f, rank 1 has g"),
        ({"torch": "3"}, "different releases of torch: rank 0 has 2, rank 1 has 3"),
        ({"failure": "no such checkpoint folder"}, "^no such checkpoint folder$"),
    ],
)
def test_ranks_that_cannot_serve_together_are_refused(report: dict[str, str], sentence: str) -> None:
    with executor_of() as (executor, lost):
        MadeUp(0, executor.invitation)
        MadeUp(1, executor.invitation, **report)
        with pytest.raises(CheckpointError, match=sentence):
            executor.start()
        assert lost == []  # nothing had started


def test_a_replica_with_another_checkpoint_than_its_ranks_is_refused() -> None:
    with executor_of() as (executor, _):
        for rank in range(2):
            MadeUp(rank, executor.invitation, geometry={})
        with pytest.raises(CheckpointError, match="the engine has another .* than its ranks"):
            executor.start()


def test_what_cannot_be_shared_out_is_refused_before_any_rank_starts() -> None:
    with pytest.raises(
        CheckpointError, match="tensor_parallel: 8 ranks cannot share out num_key_value_heads 4 evenly"
    ):
        GroupExecutor(replace(TWO, tensor_parallel=8), HOST, lambda: None, print)


def test_a_taken_port_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"rendezvous_port: {port} cannot be had on {HOST}: Address already in use"
        ):
            GroupExecutor(replace(TWO, rendezvous_port=port), HOST, lambda: None, print)


def test_whoever_does_not_know_the_token_is_not_heard() -> None:
    with executor_of(replace(TWO, rendezvous_seconds=0.5)) as (executor, _):
        stranger = MadeUp(1, replace(executor.invitation, token="0" * 64))
        MadeUp(0, executor.invitation)
        with pytest.raises(RuntimeError, match=r"\(rendezvous_seconds\): 1"):
            executor.start()
        assert stranger.agreed == {}


def test_a_lost_rank_ends_a_wait_and_is_told_of_once() -> None:
    with executor_of() as (executor, lost):
        ranks = [MadeUp(rank, executor.invitation) for rank in range(2)]
        executor.start()
        executor.run([padding_step()]).committed()
        threading.Timer(0.1, executor.lose, ["rank 1 of 2 has ended"]).start()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="rank 1 of 2 has ended"):
            executor.output_of(2)
        assert time.monotonic() - start < 5
        executor.lose("again")
        with pytest.raises(RuntimeError, match="rank 1 of 2 has ended"):
            executor.run([padding_step()])
        assert lost == ["rank 1 of 2 has ended"] and ranks[0].runs == 1


def test_a_rank_that_is_lost_as_the_start_ends_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with executor_of() as (executor, lost):
        for rank in range(2):
            MadeUp(rank, executor.invitation)
        collect = executor._collect

        def collected(kind: bytes, seconds: float | None = None) -> list[bytes]:
            said = collect(kind, seconds)
            if kind == READY:
                executor.lose("rank 1 of 2 has ended")
            return said

        monkeypatch.setattr(executor, "_collect", collected)
        with pytest.raises(RuntimeError, match="rank 1 of 2 has ended"):
            executor.start()
        assert lost == []


@pytest.mark.parametrize("host", [HOST, "::1"])
def test_a_rank_is_met_under_addresses_of_both_families(host: str) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    hub = Hub(host, 1)
    spoke = Spoke(hub.address, hub.token, 0, listens=True)
    spoke.send(JOINED)
    deadline = time.monotonic() + 10
    while (message := hub.receive(0.1)) is None:
        assert time.monotonic() < deadline
    assert message == (0, JOINED, b"") and hub.met == {0}
    hub.send(STOP)
    assert spoke.receive() == (STOP, b"")
    spoke.close()
    hub.close()


def test_outputs_in_the_wrong_order_are_noticed() -> None:
    with executor_of() as (executor, lost):
        for rank in range(2):
            MadeUp(rank, executor.invitation, first=5)
        executor.start()
        with pytest.raises(RuntimeError, match="rank 0 sent the output of run 5 instead of 1"):
            executor.run([padding_step()]).committed()
        assert len(lost) == 1


def work(config: EngineConfig, rank: int, invitation: Invitation) -> None:
    Rank(config, rank, invitation).run()


@contextmanager
def real_ranks(config: EngineConfig) -> Iterator[tuple[GroupExecutor, list[BaseProcess], list[str]]]:
    """A group of processes that has started, and what it has said of its loss."""
    spawn = multiprocessing.get_context("spawn")
    lost: list[str] = []

    def release() -> None:
        for process in processes:
            process.join(10)
            process.kill()

    processes: list[BaseProcess] = []
    executor = GroupExecutor(config, HOST, release, lost.append)
    for rank in range(config.tensor_parallel):
        processes.append(spawn.Process(target=work, args=(config, rank, executor.invitation), daemon=True))
        processes[-1].start()
    try:
        executor.start()
        yield executor, processes, lost
    finally:
        executor.close()


def test_two_processes_say_what_one_says_until_one_is_killed() -> None:
    alone = LocalExecutor.load(replace(TWO, tensor_parallel=1))
    chance = random.Random(1)
    sampled = SamplingParams(temperature=0.9, seed=3, max_tokens=8, ignore_eos=True)
    samplings = (sampled, replace(sampled, top_k=9, top_p=0.8))
    requests = [
        Request(
            f"{mode} {index}",
            tuple(chance.randrange(200, 1500) for _ in range(chance.randint(1, 40))),
            sampling,
            mode=mode,
            diffusion=DiffusionParams(threshold=0.5, block_length=8),
        )
        for mode in MODES
        for index, sampling in enumerate(samplings)
    ]
    expected = generate(Engine(alone.config, alone), requests)
    with real_ranks(TWO) as (executor, processes, lost):
        assert executor.model_config == alone.model_config and executor.has_adapter == alone.has_adapter
        lags: tuple[Literal[0, 1], ...] = (0, 1)
        for lag in lags:
            assert generate(Engine(replace(executor.config, lag=lag), executor), requests) == expected
        engine = Engine(executor.config, executor)
        engine.add(requests[0])
        engine.step()
        assert processes[1].pid is not None
        os.kill(processes[1].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError):
            for _ in range(100):
                engine.step()
        assert len(lost) == 1
