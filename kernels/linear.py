"""Matrix products of activations and weights."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    exact: bool = False,
) -> Tensor:
    out = F.linear(x, weight)
    return out if out_dtype is None else out.to(out_dtype)
