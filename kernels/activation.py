"""The gated activation of the MLP."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * intermediate], gate then up, to silu(gate) * up, [T, intermediate]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
