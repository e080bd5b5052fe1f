"""The Triton attention against a dense float64 judge; in the interpreter without a GPU."""

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import oracle
from fakes import DEVICE
from kernels.attention import ROWS, Ragged, WorkList, plan_attention, ragged_attention
from kernels.backend import implementation

CAUSAL, CANVAS, QUADRATIC, PADDING = "causal", "canvas", "quadratic", "padding"
PAGE = 16
KV_HEADS, GROUPS, HEAD_DIM = 2, 4, 16
BLOCK_Q = ROWS // GROUPS
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Segment(NamedTuple):
    kind: str
    block: int
    context: int

    def visibility(self) -> list[tuple[int, int, int]]:
        """(upto, lo, hi) of each query token."""
        if self.kind == PADDING:
            return []
        if self.kind == CAUSAL:
            return [(i + 1, 0, 0) for i in range(self.block)]
        if self.kind == CANVAS:
            return [(self.block, 0, 0)] * self.block
        anchors = [(i + 1, 0, 0) for i in range(self.block)]
        return anchors + [
            (g + 1, self.block * (g + 1), self.block * (g + 2))
            for g in range(self.block)
            for _ in range(self.block)
        ]


class Case(NamedTuple):
    """A batch, the memory it reads, and which tokens see which keys."""

    ragged: Ragged
    q: Tensor
    kv: Tensor
    visible: list[Tensor]  # of each segment, [length, context + length]


def make_case(
    segments: list[Segment], dtype: torch.dtype = torch.float32, seed: int = 0, capacity: int = 0
) -> Case:
    """Random queries and keys on shuffled pages; what no segment may read is nan. capacity: of the page table, in
    tokens, where it is to be larger than the segments need."""
    generator = torch.Generator().manual_seed(seed)
    triples = [segment.visibility() for segment in segments]
    lengths = [len(t) for t in triples]
    keys = [s.context + n if n else 0 for s, n in zip(segments, lengths, strict=True)]
    columns = -(-max([*keys, capacity]) // PAGE) + 1
    table = torch.zeros(len(segments) + 1, columns, dtype=torch.int64)
    rows = random.Random(seed).sample(range(len(segments) + 1), len(segments))
    count = sum(-(-n // PAGE) for n in keys)
    ids = iter(random.Random(seed).sample(range(1, count + 1), count))
    kv = torch.full((count + 1, PAGE, 2 * KV_HEADS, HEAD_DIM), float("nan"))
    for row, n in zip(rows, keys, strict=True):
        for column in range(-(-n // PAGE)):
            page = table[row, column] = next(ids)
            held = min(n - column * PAGE, PAGE)
            kv[page, :held] = torch.randn(held, 2 * KV_HEADS, HEAD_DIM, generator=generator)
    q = torch.randn(sum(lengths), KV_HEADS * GROUPS, HEAD_DIM, generator=generator)
    visible = []
    for segment, own in zip(segments, triples, strict=True):
        seen = torch.ones(len(own), segment.context + len(own), dtype=torch.bool)
        seen[:, segment.context :] = False
        for i, (upto, lo, hi) in enumerate(own):
            seen[i, segment.context :][:upto] = True
            seen[i, segment.context :][lo:hi] = True
        visible.append(seen)
    length = torch.tensor(lengths)
    upto, lo, hi = torch.tensor([t for own in triples for t in own] or [(0, 0, 0)]).unbind(1)
    ragged = Ragged(
        first=(length.cumsum(0) - length).to(DEVICE),
        length=length.to(DEVICE),
        context=torch.tensor([s.context for s in segments]).to(DEVICE),
        row=torch.tensor(rows).to(DEVICE),
        open=torch.tensor([s.kind in (CANVAS, QUADRATIC) for s in segments]).to(DEVICE),
        upto=upto.to(DEVICE, copy=True),
        lo=lo.to(DEVICE, copy=True),
        hi=hi.to(DEVICE, copy=True),
        pages=table.to(DEVICE),
    )
    return Case(ragged, q.to(DEVICE, dtype), kv.to(DEVICE, dtype), visible)


def plan(case: Case, exact: bool) -> WorkList:
    with implementation("triton"):
        made = plan_attention(case.ragged, PAGE, KV_HEADS * GROUPS, KV_HEADS, HEAD_DIM, case.q.dtype, exact)
    assert isinstance(made, WorkList)
    return made


def attend(case: Case, exact: bool) -> Tensor:
    made = plan(case, exact)
    with implementation("triton"):
        out = ragged_attention(case.q, case.kv, made)
    assert not made.arrived.any(), "the counters are not ready for the next layer"
    return out.cpu()


def expected(case: Case) -> Tensor:
    """[T, heads * head_dim] float64."""
    ragged, parts = case.ragged, []
    for index, visible in enumerate(case.visible):
        first, n = int(ragged.first[index]), len(visible)
        if n == 0:
            continue
        held = case.kv[ragged.pages[ragged.row[index]]].flatten(0, 1)[: visible.shape[1]].double().cpu()
        q = case.q[first : first + n].double().cpu()
        parts.append(oracle.attend(q, held[:, :KV_HEADS], held[:, KV_HEADS:], visible).flatten(1))
    return torch.cat(parts)


def check(case: Case, exact: bool) -> None:
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(attend(case, exact).double(), expected(case), rtol=tolerance, atol=tolerance)


MIXED = [
    Segment(CAUSAL, 1, 37),
    Segment(PADDING, 0, 99),
    Segment(CANVAS, 8, 50),
    Segment(QUADRATIC, 4, 33),
    Segment(CAUSAL, 2 * BLOCK_Q + 5, 0),
    Segment(CANVAS, BLOCK_Q + 1, 20),
    Segment(CAUSAL, 9, 600),
    Segment(PADDING, 0, 0),
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixed_batch_attends_as_each_segment_would_alone(dtype: torch.dtype, exact: bool) -> None:
    check(make_case(MIXED, dtype), exact)


def test_x():
    pass
