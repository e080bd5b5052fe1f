"""The longest prefix of a draft that the causal pass would have said itself."""

import triton
import triton.language as tl
from torch import Tensor


def accepted(draft: Tensor, said: Tensor) -> Tensor:
    """How many drafted tokens stand.

    draft, said: [S, W] int64: what was drafted for W positions and what the causal pass says there, each given all
    drafts before. Positions without a draft hold the mask token, which is never said. Returns [S] int64.
    """
    return (said == draft).long().cumprod(-1).sum(-1)


@triton.jit
def accepts(draft, said, block):
    """How many tokens one verification commits inside a kernel: draft, said [W] int64, of which `block` count, to the
    accepted drafts and the token after them."""
    column = tl.arange(0, draft.shape[0])
    # the last position has no draft
    wrong = (column >= block - 1) | (draft != said)
    return tl.min(tl.where(wrong, column, block), 0).to(tl.int64) + 1
