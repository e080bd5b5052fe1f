"""What a denoising pass commits, and what a verification accepts, against plain loops."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.commit import commit
from kernels.verify import accepted

MASK = 99


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 9))
def test_a_pass_commits_the_confident_and_at_least_the_quota(seed: int, threshold: float, quota: int) -> None:
    chance = random.Random(seed)
    width = chance.randint(2, 9)
    canvas = [chance.choice([MASK, MASK, 5]) for _ in range(width)]
    drawn = [chance.randrange(50) for _ in range(width)]
    sure = [chance.choice([0.1, 0.5, 0.5, 0.9]) for _ in range(width)]
    ranking = sorted((i for i in range(width) if canvas[i] == MASK), key=lambda i: (-sure[i], i))
    want = list(canvas)
    for rank, i in enumerate(ranking):
        if rank < quota or sure[i] >= threshold:
            want[i] = drawn[i]
    got = commit(
        torch.tensor([canvas]),
        torch.tensor([drawn]),
        torch.tensor([sure], dtype=torch.float64),
        torch.tensor([threshold], dtype=torch.float64),
        torch.tensor([quota]),
        MASK,
    )
    assert got[0].tolist() == want


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10**6)), min_size=1, max_size=4))
def test_the_longest_agreeing_prefix_is_accepted_and_a_missing_draft_never(
    rows: list[tuple[int, int]],
) -> None:
    draft, said, want = [], [], []
    for length, seed in rows:
        chance = random.Random(seed)
        draft.append([chance.randrange(2) for _ in range(length)] + [MASK] * (9 - length))
        said.append([chance.randrange(2) for _ in range(9)])
        count = 0
        while said[-1][count] == draft[-1][count]:
            count += 1
        want.append(count)
    assert accepted(torch.tensor(draft), torch.tensor(said)).tolist() == want
