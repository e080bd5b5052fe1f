"""What a step says to the host."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StepOutput(Protocol):
    """What an executed step committed, which may still be on its way."""

    def committed(self) -> list[list[int]]:
        """The committed tokens of each segment; waits for them. Raises RuntimeError if they will never come."""
        ...

    def drawn(self) -> list[list[int]]:
        """What stands behind each segment's seed token after a pass that committed nothing, masks included, and then
        anything; waits and raises as `committed`."""
        ...


@dataclass(frozen=True, slots=True)
class HostOutput:
    """packed: [S, 1 + W] int64 on the host: how many tokens each segment committed, then the tokens, of which so many
    hold. arrived: the event after which it holds all this; None if it does."""

    packed: Tensor
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """The packed tokens, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.packed

    def committed(self) -> list[list[int]]:
        return unpack_committed(self.wait().tolist())

    def drawn(self) -> list[list[int]]:
        return unpack_drawn(self.wait().tolist())


def unpack_committed(packed: list[list[int]]) -> list[list[int]]:
    """The tokens that hold of each row of a packed output."""
    return [row[1 : 1 + row[0]] for row in packed]


def unpack_drawn(packed: list[list[int]]) -> list[list[int]]:
    """What stands behind each segment's seed token, as `StepOutput.drawn`."""
    return [row[1:] for row in packed]


def to_host(packed: Tensor) -> HostOutput:
    """Starts the one copy from the device to the host that a step makes."""
    if not packed.is_cuda:
        return HostOutput(packed)
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return HostOutput(host, arrived)
