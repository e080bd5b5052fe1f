"""One denoising pass's decision: which masked positions of a canvas take the token drawn for them."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def commit(
    canvas: Tensor, drawn: Tensor, confidence: Tensor, threshold: Tensor, quota: Tensor, mask_id: int
) -> Tensor:
    """The canvas after a pass.

    canvas, drawn: [S, W] int64. confidence: [S, W]. Every masked position with confidence >= threshold [S] is
    committed, and at least the quota [S] most confident ones, ties to the left. Returns the new canvas, [S, W].
    """
    masked = canvas == mask_id
    ranked = confidence.masked_fill(~masked, -1.0)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    take = masked & ((confidence >= threshold[:, None]) | (rank < quota[:, None]))
    return torch.where(take, drawn, canvas)


@triton.jit
def commits(masked, confidence, threshold, quota):
    """The same decision on one canvas inside a kernel: masked, confidence [W] to the positions taken, [W] bool."""
    column = tl.arange(0, masked.shape[0])
    ranked = tl.where(masked, confidence, -1.0)
    above = ranked[None, :] > ranked[:, None]
    tied = (ranked[None, :] == ranked[:, None]) & (column[None, :] < column[:, None])
    rank = tl.sum((above | tied).to(tl.int32), 1)
    return masked & ((confidence >= threshold) | (rank < quota))
