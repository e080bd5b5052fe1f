"""The Triton attention against a dense float64 judge; in the interpreter without a GPU."""

import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

import oracle
from fakes import DEVICE
from kernels.attention import ROWS, Ragged, WorkList, plan_attention, ragged_attention
from kernels.backend import implementation

CAUSAL, CANVAS, QUADRATIC, PADDING = "causal", "canvas", "quadratic", "padding"
PAGE = 32
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
            page = next(ids)
            table[row, column] = page
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
    flat = torch.tensor([t for own in triples for t in own]).to(DEVICE).T.contiguous()
    ragged = Ragged(
        first=(length.cumsum(0) - length).to(DEVICE),
        length=length.to(DEVICE),
        context=torch.tensor([s.context for s in segments]).to(DEVICE),
        row=torch.tensor(rows).to(DEVICE),
        open=torch.tensor([s.kind in (CANVAS, QUADRATIC) for s in segments]).to(DEVICE),
        upto=flat[0],
        lo=flat[1],
        hi=flat[2],
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


@pytest.mark.parametrize("context", [0, PAGE - 1, PAGE, PAGE + 1])
@pytest.mark.parametrize("kind", [CAUSAL, CANVAS, QUADRATIC])
def test_a_context_may_end_anywhere_in_a_page(kind: str, context: int) -> None:
    for block in (1, 4) if kind != QUADRATIC else (2, 4):
        for exact in (False, True):
            check(make_case([Segment(kind, block, context)], seed=context), exact)


@pytest.mark.parametrize("exact", [False, True])
def test_tokens_of_no_segment_disturb_nobody(exact: bool) -> None:
    case = make_case(MIXED[:4])
    want = attend(case, exact)
    ragged, beyond = case.ragged, torch.full((7,), 1 << 20, device=DEVICE)
    assert ragged.lo is not None and ragged.hi is not None
    upto, lo, hi = (torch.cat((x, beyond)) for x in (ragged.upto, ragged.lo, ragged.hi))
    q = torch.cat((case.q, torch.full_like(case.q[:7], float("nan"))))
    padded = Case(ragged._replace(upto=upto, lo=lo, hi=hi), q, case.kv, [])
    assert torch.equal(attend(padded, exact)[: len(want)], want)


def test_a_token_that_sees_no_key_gets_zeros() -> None:
    case = make_case([Segment(CANVAS, 3, 0)])
    blind = case._replace(ragged=case.ragged._replace(upto=torch.zeros_like(case.ragged.upto)))
    assert not attend(blind, exact=False).any()


LONG = [Segment(CAUSAL, 1, 1100), Segment(CANVAS, BLOCK_Q + 4, 600), Segment(CAUSAL, 5, 300)]


@pytest.mark.parametrize("exact", [False, True])
def test_the_pieces_of_long_contexts_merge_to_the_whole(exact: bool) -> None:
    case = make_case(LONG, DTYPES[-1])
    items = plan(case, exact).items[:, 7]  # pieces of the item's tile
    assert items[0] > 1
    check(case, exact)


def test_exact_mode_cuts_keys_at_fixed_places_and_at_most_into_sixteen() -> None:
    for capacity, length in ((0, 512), (16 * 512 - PAGE, 512), (16 * 640 - PAGE, 640)):
        made = plan(make_case(LONG, capacity=capacity), exact=True)
        items = made.items[: int(made.count)]
        assert set((items[:, 4] % length).tolist()) == {0}
        assert int((items[:, 5] - items[:, 4]).max()) == length
    longest = Segment(CAUSAL, 1, 16 * 640 - PAGE - 1)
    made = plan(make_case([longest]), exact=True)
    assert made.items[: int(made.count), 7].tolist() == [16] * 16


def test_every_key_of_every_tile_is_in_one_piece() -> None:
    for exact in (False, True):
        for seed in range(4):
            chance = random.Random(seed)
            segments = [
                Segment(
                    chance.choice([CAUSAL, CANVAS, PADDING]), chance.randint(1, 50), chance.randint(0, 3000)
                )
                for _ in range(chance.randint(1, 9))
            ]
            case = make_case(segments, seed=seed)
            made = plan(case, exact)
            assert int(made.count) <= len(made.items)
            found: dict[int, list[tuple[int, int]]] = {}
            rows: set[int] = set()
            for first, tokens, _, _, low, high, piece, pieces, partial, stride in made.items[
                : int(made.count)
            ].tolist():
                if low >= high:
                    continue
                found.setdefault(first, []).append((low, high))
                if pieces > 1:
                    mine = set(range(partial + piece * stride, partial + piece * stride + tokens))
                    assert not mine & rows and max(mine) * KV_HEADS * GROUPS < len(made.partial), (
                        "partial results collide"
                    )
                    rows |= mine
            want: dict[int, int] = {}
            for index, segment in enumerate(segments):
                first, n = int(case.ragged.first[index]), int(case.ragged.length[index])
                for q0 in range(0, n, BLOCK_Q):
                    last = n if segment.kind == CANVAS else min(q0 + BLOCK_Q, n)
                    want[first + q0] = segment.context + last
            assert found.keys() == want.keys()
            for first, spans in found.items():
                assert [low for low, _ in spans] == [0] + [high for _, high in spans[:-1]]
                assert spans[-1][1] == want[first]


def rounded_once(builder: Any, x: Any, y: Any, z: Any) -> Any:
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


@pytest.mark.parametrize("fused", [False, True])
def test_single_tokens_and_one_verify_of_them_have_the_same_bits_in_exact_mode(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused and DEVICE.type == "cpu":
        # a GPU rounds x * y + z once, the interpreter twice: nothing exact may hang on the second rounding
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", rounded_once)
    context, n = 508, BLOCK_Q + 4  # a piece ends inside the verified tokens
    for dtype in DTYPES:
        whole = make_case([Segment(CAUSAL, n, context)], dtype)
        together = attend(whole, exact=True)
        for i in (0, 3, 4, BLOCK_Q - 1, BLOCK_Q, n - 1):
            one = whole.ragged._replace(
                length=torch.ones_like(whole.ragged.length),
                context=whole.ragged.context + i,
                upto=torch.ones(1, dtype=torch.int64, device=DEVICE),
                lo=torch.zeros(1, dtype=torch.int64, device=DEVICE),
                hi=torch.zeros(1, dtype=torch.int64, device=DEVICE),
            )
            alone = attend(Case(one, whole.q[i : i + 1].clone(), whole.kv, []), exact=True)
            assert torch.equal(alone[0], together[i])


def test_the_neighbours_change_no_bit_in_exact_mode() -> None:
    first_two = [Segment(CAUSAL, 2, 530), Segment(CANVAS, BLOCK_Q + 1, 600)]
    for dtype in DTYPES:
        case = make_case(
            [*first_two, Segment(QUADRATIC, 2, 33), Segment(CAUSAL, 40, 0), Segment(PADDING, 0, 5)], dtype
        )
        together = attend(case, exact=True)
        for index in range(2):
            first, n = int(case.ragged.first[index]), int(case.ragged.length[index])
            tokens = slice(first, first + n)
            one = Ragged(
                first=torch.zeros(1, dtype=torch.int64, device=DEVICE),
                length=case.ragged.length[index : index + 1],
                context=case.ragged.context[index : index + 1],
                row=case.ragged.row[index : index + 1],
                open=case.ragged.open[index : index + 1],
                upto=case.ragged.upto[tokens],
                lo=case.ragged.lo[tokens],  # type: ignore[index]
                hi=case.ragged.hi[tokens],  # type: ignore[index]
                pages=case.ragged.pages,
            )
            assert torch.equal(attend(Case(one, case.q[tokens], case.kv, []), exact=True), together[tokens])


@settings(max_examples=12)
@given(
    st.lists(
        st.builds(
            Segment,
            st.sampled_from([CAUSAL, CANVAS, PADDING]),
            st.integers(1, 2 * BLOCK_Q + 1),
            st.integers(0, 70) | st.integers(500, 600),
        )
        | st.builds(Segment, st.just(QUADRATIC), st.integers(2, 5), st.integers(0, 40)),
        min_size=1,
        max_size=4,
    ).filter(lambda segments: any(s.kind != PADDING for s in segments)),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_batch_attends_as_each_segment_would_alone(
    segments: list[Segment], exact: bool, seed: int
) -> None:
    check(make_case(segments, seed=seed), exact)
