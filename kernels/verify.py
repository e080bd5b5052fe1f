"""The longest prefix of a draft that the causal pass would have said itself."""

from torch import Tensor


def accepted(draft: Tensor, said: Tensor) -> Tensor:
    """How many drafted tokens stand.

    draft, said: [S, W] int64: what was drafted for W positions and what the causal pass says there, each given all
    drafts before. Positions without a draft hold the mask token, which is never said. Returns [S] int64.
    """
    return (said == draft).long().cumprod(-1).sum(-1)
