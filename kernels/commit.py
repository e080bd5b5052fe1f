"""One denoising pass's decision: which masked positions of a canvas take the token drawn for them."""

import torch
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
