"""An executor whose ranks are processes, on this node or others: plans go out as packed arrays, outputs come back."""

import json
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, but not for type checkers

from cluster.frames import pack_steps, unpack_output
from cluster.link import Hub
from cluster.rank import AGREED, FAILED, JOINED, OUTPUT, READY, REPORT, RUN, STOP, Invitation
from engine.checkpoint import local_folder
from engine.config import CheckpointError, EngineConfig, ModelConfig
from engine.executor import phase
from engine.output import unpack_committed, unpack_drawn
from engine.shapes import check_ranks
from engine.step import Step

NOTICE_SECONDS = 0.01  # until whoever waits for a rank notices that one is lost


@dataclass(frozen=True, slots=True)
class GroupOutput:
    """The output of a run, which rank 0 sends. Outputs must be asked for in their order."""

    executor: "GroupExecutor"
    number: int

    def committed(self) -> list[list[int]]:
        return unpack_committed(self.executor.output_of(self.number))

    def drawn(self) -> list[list[int]]:
        return unpack_drawn(self.executor.output_of(self.number))


class GroupExecutor:
    """Meets the ranks that were given its `invitation`, and executes steps on them. One thread at a time may use it,
    but any may call `lose`."""

    def __init__(
        self, config: EngineConfig, host: str, release: Callable[[], None], lost: Callable[[str], None]
    ) -> None:
        """host: this node's address, for its ranks. release: ends the ranks' processes; called once, by `close`. lost:
        called once, with a sentence, when a group that had started has lost a rank, before anybody else is told. Raises
        CheckpointError for a checkpoint that the ranks cannot share, and ValueError for a taken port."""
        folder = local_folder(config.checkpoint, weights=False)
        self.config, self.model_config = config, ModelConfig.from_json(folder / "config.json")
        try:
            check_ranks(self.model_config, config.tensor_parallel)
        except CheckpointError as error:
            raise CheckpointError(f"tensor_parallel: {error}") from error
        self.has_adapter, self.device_name, self.phases = False, "", dict[str, float]()
        self._runs = 0
        self._said: dict[tuple[bytes, int], bytes] = {}  # by kind and rank: one rank may be ahead of another
        self._lost, self._started = "", False
        self._losing = threading.Lock()
        self._tell_lost = lost
        self._release: Callable[[], None] | None = release
        self._store = _rendezvous(host, config)
        self._hub = Hub(host, config.tensor_parallel)
        self.invitation = Invitation(self._hub.address, self._hub.token, host, self._store.port)

    def start(self) -> None:
        """Waits until the ranks are ready. Raises RuntimeError if one is missing or fails, and CheckpointError if they
        have none, or different ones."""
        with phase(self.phases, "gather the ranks"):
            self._collect(JOINED, self.config.rendezvous_seconds)
        with phase(self.phases, "load the checkpoint"):
            reports = self._collect(REPORT)
        self._agree([json.loads(report) for report in reports])
        self._hub.send(AGREED, json.dumps({"kv_tokens": self.config.kv_tokens}).encode())
        with phase(self.phases, "check and capture the kernels"):
            self._collect(READY)
        with self._losing:
            self._started = not self._lost
        if not self._started:
            raise RuntimeError(self._lost)

    def run(self, steps: Seq[Step]) -> GroupOutput:
        self._runs += 1
        if not self._lost:
            try:
                self._hub.send(RUN, pack_steps(self._runs, steps))
            except ConnectionError as error:
                self.lose(str(error))
        if self._lost:
            raise RuntimeError(self._lost)
        return GroupOutput(self, self._runs)

    def output_of(self, number: int) -> list[list[int]]:
        """The packed output of a run; waits for it. Raises RuntimeError if a rank fails or is lost."""
        try:
            _, kind, body = self._receive(None)
            if kind != OUTPUT:
                raise RuntimeError(f"rank 0 said {kind!r} instead of what run {number} brought")
            said, packed = unpack_output(body)
            if said != number:
                raise RuntimeError(f"rank 0 sent the output of run {said} instead of {number}")
        except (RuntimeError, ValueError) as error:
            self.lose(str(error))
            raise RuntimeError(self._lost) from error
        rows: list[list[int]] = packed.tolist()
        return rows

    def lose(self, reason: str) -> None:
        """Says that a rank is lost, and with it the group: whoever waits for it gets a RuntimeError with the reason."""
        with self._losing:
            if self._lost:
                return
            self._lost = reason
        if self._started:
            self._tell_lost(reason)

    def close(self) -> None:
        """Ends the ranks."""
        if self._release is None:
            return
        try:
            self._hub.send(STOP)
        except (ConnectionError, KeyError):  # one is gone, or never came
            pass
        self._hub.close()
        self._release()
        self._release = None

    def _collect(self, kind: bytes, seconds: float | None = None) -> list[bytes]:
        """What every rank says of a kind, once."""
        deadline = None if seconds is None else time.monotonic() + seconds
        ranks = self.config.tensor_parallel
        while missing := [rank for rank in range(ranks) if (kind, rank) not in self._said]:
            try:
                rank, found, body = self._receive(deadline)
            except TimeoutError:
                # who has come waits for those who have not, and is missing too
                absent = [rank for rank in missing if rank not in self._hub.met]
                what = (
                    "these have not come"
                    if absent
                    else "which have all come, these have not found the others"
                )
                raise RuntimeError(
                    f"of {ranks} ranks, {what} within {seconds:g} s (rendezvous_seconds): "
                    + ", ".join(map(str, absent or missing))
                ) from None
            self._said[found, rank] = body
        return [self._said[kind, rank] for rank in range(ranks)]

    def _receive(self, deadline: float | None) -> tuple[int, bytes, bytes]:
        """The next message of a rank. Raises TimeoutError at the deadline (monotonic seconds), RuntimeError when a rank
        is lost or fails, and CheckpointError if that is why."""
        while (message := self._hub.receive(NOTICE_SECONDS)) is None:
            if self._lost:
                raise RuntimeError(self._lost)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
        rank, kind, body = message
        if kind == FAILED:
            told = json.loads(body)
            if told["checkpoint"]:
                raise CheckpointError(told["message"])
            raise RuntimeError(f"rank {rank}: {told['message']}")
        return message

    def _agree(self, reports: list[dict[str, Any]]) -> None:
        """Takes what all ranks have in common."""
        for key, what in (("fingerprint", "checkpoints"), ("torch", "releases of torch")):
            found = [str(report[key]) for report in reports]
            if len(set(found)) > 1:
                each = ", ".join(f"rank {rank} has {one}" for rank, one in enumerate(found))
                name = f" of the name {self.config.checkpoint}" if key == "fingerprint" else ""
                raise CheckpointError(f"the ranks have different {what}{name}: {each}")
        if reports[0]["geometry"] != json.loads(json.dumps(asdict(self.model_config))):
            raise CheckpointError(f"the engine has another {self.config.checkpoint} than its ranks")
        self.has_adapter, self.device_name = bool(reports[0]["has_adapter"]), str(reports[0]["device"])
        self.config = replace(self.config, kv_tokens=min(int(report["kv_tokens"]) for report in reports))


def _rendezvous(host: str, config: EngineConfig) -> TCPStore:
    """Where the ranks find each other: listens on the host's address only. Raises ValueError if the port is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, config.rendezvous_port))
        listener.listen()
    except OSError as error:
        listener.close()
        port = config.rendezvous_port
        raise ValueError(
            f"rendezvous_port: {port} cannot be had on {host}: {error.strerror}; 0 takes any that is free"
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=config.rendezvous_seconds),
        master_listen_fd=listener.detach(),
    )
