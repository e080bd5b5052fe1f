"""One rank of a model that several share: joins the others, loads its share, and executes what the engine sends.

Knows nothing of Ray; whoever starts the ranks' processes gives each an invitation.
"""

import json
import queue
import threading
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, but not for type checkers

from cluster.frames import pack_output, unpack_steps
from cluster.link import Spoke
from engine.checkpoint import fingerprint, local_folder
from engine.config import CheckpointError, EngineConfig
from engine.device import device_name, kv_tokens, use_device
from engine.executor import make_ready
from engine.output import HostOutput
from engine.runner import Runner, load_model
from engine.tp import Distributed

# what a rank says, in this order, and what it is told
JOINED, REPORT, READY, OUTPUT, FAILED = b"joined", b"report", b"ready", b"output", b"failed"
AGREED, RUN, STOP = b"agreed", b"run", b"stop"

COLLECTIVE_SECONDS = 1800  # what a rank waits for another in a sum: as long as compiling all kernels may take


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where a rank finds its engine and the other ranks. token: the group's, which it presents to the engine."""

    address: str
    token: str
    rendezvous_host: str
    rendezvous_port: int


class Rank:
    """One of `config.tensor_parallel` ranks, in a process of its own."""

    def __init__(self, config: EngineConfig, rank: int, invitation: Invitation) -> None:
        self.config, self.rank, self.invitation = config, rank, invitation

    def run(self) -> None:
        """Serves until the engine says stop. Tells the engine of what goes wrong, and raises it."""
        spoke = self._spoke(listens=True)
        try:
            self._serve(spoke)
        except Exception as error:
            spoke.send(FAILED, _told(error))
            raise
        finally:
            spoke.close()

    def _serve(self, spoke: Spoke) -> None:
        torch.set_num_threads(self.config.threads)
        use_device(self.config.device)
        group = self._join()
        spoke.send(JOINED)
        runner = self._set_up(spoke, group)
        outputs: queue.SimpleQueue[tuple[int, HostOutput] | None] = queue.SimpleQueue()
        sender = threading.Thread(target=self._send, args=(outputs,), name="outputs", daemon=True)
        sender.start()
        while True:
            kind, body = spoke.receive()
            if kind == STOP:
                break
            if kind != RUN:
                raise ValueError(f"rank {self.rank} was told {kind!r}")
            number, steps = unpack_steps(body)
            output = runner.run(steps)
            if self.rank == 0:
                outputs.put((number, output))
        outputs.put(None)
        sender.join()
        dist.destroy_process_group()

    def _join(self) -> Distributed:
        """Finds the other ranks. Raises RuntimeError if they do not come in time."""
        config, invitation = self.config, self.invitation
        store = TCPStore(
            invitation.rendezvous_host,
            invitation.rendezvous_port,
            is_master=False,
            timeout=timedelta(seconds=config.rendezvous_seconds),
        )
        device = torch.device(config.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=config.tensor_parallel,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
        assert dist.group.WORLD is not None
        return Distributed(dist.group.WORLD, getattr(torch, config.dtype), device, config.exact)

    def _set_up(self, spoke: Spoke, group: Distributed) -> Runner:
        """Loads the rank's share, and agrees with the others upon the size of the cache."""
        config = self.config
        model = load_model(config, group)
        folder = local_folder(config.checkpoint, weights=config.load_format != "dummy")
        report = {
            "fingerprint": fingerprint(folder),
            "geometry": asdict(model.config),
            "has_adapter": model.has_adapter,
            "kv_tokens": kv_tokens(config, model.config),
            "torch": str(torch.__version__),
            "device": device_name(config.device),
        }
        spoke.send(REPORT, json.dumps(report).encode())
        kind, body = spoke.receive()
        if kind != AGREED:
            raise ValueError(f"rank {self.rank} was told {kind!r} instead of the size of the cache")
        runner = Runner(model, replace(config, kv_tokens=int(json.loads(body)["kv_tokens"])))
        make_ready(runner)
        spoke.send(READY)
        return runner

    def _send(self, outputs: "queue.SimpleQueue[tuple[int, HostOutput] | None]") -> None:
        """Sends outputs as they arrive from the device, while the next step is being launched."""
        spoke = self._spoke(listens=False)
        try:
            while (item := outputs.get()) is not None:
                number, output = item
                spoke.send(OUTPUT, pack_output(number, output.wait().numpy()))
        except Exception as error:
            spoke.send(FAILED, _told(error))
            raise
        finally:
            spoke.close()

    def _spoke(self, listens: bool) -> Spoke:
        return Spoke(self.invitation.address, self.invitation.token, self.rank, listens)


def _told(error: Exception) -> bytes:
    """What the engine is told of an error."""
    return json.dumps({"checkpoint": isinstance(error, CheckpointError), "message": str(error)}).encode()
