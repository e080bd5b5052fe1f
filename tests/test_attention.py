"""The attention kernel against a dense judge that shares nothing with it."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from kernels.attention import Ragged, SegmentAttention, plan_attention, ragged_attention

CAUSAL, CANVAS, QUADRATIC = "causal", "canvas", "quadratic"


def visibility(kind: str, block: int) -> list[tuple[int, int, int]]:
    """(upto, lo, hi) of each query token of a segment."""
    if kind == CAUSAL:
        return [(i + 1, 0, 0) for i in range(block)]
    if kind == CANVAS:
        return [(block, 0, 0)] * block
    groups = [(g + 1, block * (g + 1), block * (g + 2)) for g in range(block) for _ in range(block)]
    return [(i + 1, 0, 0) for i in range(block)] + groups


def dense(
    q: Tensor, keys: Tensor, values: Tensor, context: int, triples: list[tuple[int, int, int]]
) -> Tensor:
    visible = torch.zeros(len(triples), context + len(triples), dtype=torch.bool)
    visible[:, :context] = True
    for i, (upto, lo, hi) in enumerate(triples):
        visible[i, context : context + upto] = True
        visible[i, context + lo : context + hi] = True
    return oracle.attend(q, keys, values, visible).flatten(1)


def segment_plan(ragged: Ragged, page_size: int, heads: int = 1, kv_heads: int = 1) -> list[SegmentAttention]:
    """The plan of the torch side."""
    plan = plan_attention(ragged, page_size, heads, kv_heads, 8, torch.float64, exact=False)
    assert isinstance(plan, list)
    return plan


def one_segment(length: int, context: int, table: list[int]) -> Ragged:
    """A segment whose tokens all see each other."""
    zero, upto = torch.zeros(1, dtype=torch.int64), torch.full((length,), length)
    return Ragged(
        zero, zero + length, zero + context, zero, zero == 0, upto, None, None, torch.tensor([table])
    )


def compare(
    shapes: list[tuple[str, int, int]], page_size: int, kv_heads: int, groups: int, seed: int
) -> float:
    """Runs segments (kind, block, context) in one ragged call and alone; returns the largest difference."""
    generator = torch.Generator().manual_seed(seed)
    triples = [visibility(kind, block) for kind, block, _ in shapes]
    lengths = [len(t) for t in triples]
    columns = max(-(-(context + n) // page_size) for (_, _, context), n in zip(shapes, lengths, strict=True))
    pages = list(range(columns * len(shapes)))
    random.Random(seed).shuffle(pages)
    table = torch.tensor(pages).view(len(shapes), columns)
    kv = torch.randn(len(pages), page_size, 2 * kv_heads, 8, generator=generator, dtype=torch.float64)
    q = torch.randn(sum(lengths), kv_heads * groups, 8, generator=generator, dtype=torch.float64)
    upto, lo, hi = torch.tensor([t for segment in triples for t in segment]).unbind(1)
    context = torch.tensor([c for _, _, c in shapes])
    length = torch.tensor(lengths)
    rows = torch.arange(len(shapes))
    open_ = torch.tensor([kind == CANVAS for kind, _, _ in shapes])
    ragged = Ragged(
        length.cumsum(0) - length, length, context, rows, open_, upto, lo, hi, table, lengths=lengths
    )
    plan = segment_plan(ragged, page_size, kv_heads * groups, kv_heads)
    out = ragged_attention(q, kv, plan)
    worst, start = 0.0, 0
    for row, ((_, _, cached), segment) in enumerate(zip(shapes, triples, strict=True)):
        n = len(segment)
        mine = kv[table[row]].flatten(0, 1)[: cached + n]
        want = dense(q[start : start + n], mine[:, :kv_heads], mine[:, kv_heads:], cached, segment)
        worst = max(worst, float((out[start : start + n] - want).abs().max()))
        start += n
    return worst


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([CAUSAL, CANVAS]), st.integers(1, 9), st.integers(0, 21))
        | st.tuples(st.just(QUADRATIC), st.integers(2, 3), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([1, 3, 4, 16]),
    st.sampled_from([(1, 1), (2, 1), (2, 3)]),
    st.integers(0, 1000),
)
def test_any_mix_of_segments_attends_as_each_would_alone(
    shapes: list[tuple[str, int, int]], page_size: int, heads: tuple[int, int], seed: int
) -> None:
    assert compare(shapes, page_size, *heads, seed) < 1e-12


def test_a_single_token_or_an_open_canvas_needs_no_mask() -> None:
    for length in (1, 5):
        assert segment_plan(one_segment(length, 20, list(range(7))), 4)[0].bias is None


def test_consecutive_pages_are_read_in_place_and_others_gathered() -> None:
    for table, in_place in (([3, 4, 5], True), ([3, 5, 4], False), ([5, 4, 3], False), ([3, 4, 0], False)):
        assert isinstance(segment_plan(one_segment(1, 11, table), 4)[0].pages, slice) == in_place
