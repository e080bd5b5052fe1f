"""The longest prefix of a draft that the causal pass would have said itself."""

from torch import Tensor


def accepted(draft: Tensor, said: Tensor, length: Tensor) -> Tensor:
    """How many drafted tokens stand.

    draft, said: [S, W] int64; draft[:, 0] is the seed token and said[:, j] the causal choice after draft[:, j], so
    draft j + 1 stands while said j equals it. length: [S], tokens of the block with its seed. Returns [S] int64.
    """
    if draft.shape[1] == 1:
        return length.new_zeros(length.shape)
    agree = (said[:, :-1] == draft[:, 1:]) & (length.new_ones(draft.shape[1] - 1).cumsum(0) < length[:, None])
    return agree.long().cumprod(-1).sum(-1)
