"""A low-rank addition for the tokens that ask for it."""

import torch.nn.functional as F
from torch import Tensor


def gated_lora_add(out: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """out + gate * (x A^T B^T): out [T, n], x [T, k], a [r, k], b [n, r] with the scale folded in, gate [T, 1]."""
    return out.addcmul_(F.linear(F.linear(x, a), b), gate)
