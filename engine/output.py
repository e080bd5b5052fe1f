"""What a step says to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepOutput:
    """packed: [S, 1 + W] int64 on the host: how many tokens each segment committed, then the tokens, of which so many
    hold. arrived: the event after which it holds all this; None if it does."""

    packed: Tensor
    arrived: torch.cuda.Event | None = None

    def committed(self) -> list[list[int]]:
        """The committed tokens of each segment; waits for them."""
        return [row[1 : 1 + row[0]] for row in self._rows()]

    def drawn(self) -> list[list[int]]:
        """What stands behind each segment's seed token after a pass that committed nothing, masks included, and then
        anything; waits for it."""
        return [row[1:] for row in self._rows()]

    def _rows(self) -> list[list[int]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        rows: list[list[int]] = self.packed.tolist()
        return rows


def to_host(packed: Tensor) -> StepOutput:
    """Starts the one copy from the device to the host that a step makes."""
    if not packed.is_cuda:
        return StepOutput(packed)
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return StepOutput(host, arrived)
