"""RMS norm with the residual addition that precedes it."""

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum.

    x, residual: [T, hidden]; no residual means that x starts the stream. Returns (normalised, new residual).
    """
    residual = x if residual is None else residual + x
    return F.rms_norm(residual, (residual.shape[-1],), weight, eps), residual
