"""Expansion and settling as kernels against torch, on random steps of every kind of segment, padded as for a graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import known_layout, padded_layout, unpack_layout
from engine.segment import Pattern, Settle
from engine.state import Tables
from engine.step import AHEAD, BLOCK, LENGTH, ROW, SETTLE, Step
from engine.step import COLUMNS as COLUMNS_OF_SEGMENTS
from fakes import DEVICE
from kernels import expand as expansion
from kernels import settle as settling
from kernels.backend import implementation
from kernels.expand import Expanded, expand
from kernels.settle import settle

ROWS, CANVAS, MASK, PAGE, COLUMNS = 9, 8, 7, 4, 60
SCRATCH_PAGE = 500


@dataclass(frozen=True)
class Kind:
    """What a segment does: pattern, settle operation, and the most it can commit, as a share of its block; with a
    trunk, a segment of the same row before it that keeps the tokens ahead of it."""

    pattern: Pattern
    settle: Settle
    commits: int
    trunk: bool = False


KINDS = (
    Kind(Pattern.CAUSAL, Settle.KEEP, 0),
    Kind(Pattern.CAUSAL, Settle.SAMPLE, 1),
    Kind(Pattern.CANVAS, Settle.DENOISE, 0),
    Kind(Pattern.CANVAS, Settle.DENOISE, 1),
    Kind(Pattern.CANVAS, Settle.DENOISE, 0, trunk=True),
    Kind(Pattern.CANVAS, Settle.DENOISE, 1, trunk=True),
    Kind(Pattern.CAUSAL, Settle.VERIFY, 1),
    Kind(Pattern.QUADRATIC, Settle.VERIFY, 1),
)


def random_tables(seed: int) -> Tables:
    """Rows somewhere in their texts; behind the seed token some drafts, then masks."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator)

    tables = Tables(ROWS, COLUMNS * PAGE, COLUMNS, CANVAS, MASK, SCRATCH_PAGE, torch.device("cpu"))
    tables.pages[:ROWS] = below(SCRATCH_PAGE, ROWS, COLUMNS + 1)
    tables.cached[:ROWS] = below(100, ROWS)
    tables.passes[:ROWS] = below(4, ROWS)
    for row in range(ROWS):
        cached = int(tables.cached[row])
        tables.tokens[row, : cached + 1] = 8 + below(30, cached + 1)
        behind = 8 + below(30, CANVAS)
        kept = below(2, CANVAS).bool() | (below(3, 1) == 0)  # sometimes a canvas without masks
        tables.tokens[row, cached + 1 : cached + 1 + CANVAS] = torch.where(kept, behind, MASK)
    return tables


def random_step(chance: np.random.Generator, kinds: Sequence[Kind]) -> Step:
    segments, thresholds = [], []
    for row, kind in enumerate(kinds):
        block = int(chance.integers(2, CANVAS + 1))
        if kind.settle is Settle.SAMPLE:
            block = int(chance.choice([1, 5]))
        length = block * (block + 1) if kind.pattern is Pattern.QUADRATIC else block
        lora = int(kind.pattern is Pattern.CANVAS and not kind.commits and chance.integers(2))
        steps, restart = int(chance.choice([0, 3])), int(chance.integers(2) and block > 1)
        if kind.pattern is Pattern.CAUSAL and kind.settle is not Settle.VERIFY:
            restart = 0
        ahead = int(chance.integers(1, 6)) if kind.trunk else 0
        if ahead:
            restart = 1  # a block after new tokens begins with masks
            segments.append((row, ahead, ahead, Pattern.CAUSAL, Settle.KEEP, 0, 0, 0, 0, 0))
            thresholds.append(0.0)
        segments.append(
            (row, length, block, kind.pattern, kind.settle, kind.commits * block, steps, lora, restart, ahead)
        )
        thresholds.append(float(chance.choice([0.0, 0.5, 0.9])))
    order = sorted(range(len(segments)), key=lambda i: (segments[i][4], segments[i][5] > 0, segments[i][1]))
    return Step(
        segments=np.array([segments[i] for i in order], np.int64),
        thresholds=np.array([thresholds[i] for i in order]),
        grants=np.zeros((0, 3), np.int64),
        rows=np.zeros((0, 4), np.int64),
        sampling=np.zeros((0, 3)),
        tokens=np.zeros(0, np.int64),
        edits=np.zeros((0, 3), np.int64),
        greedy=True,
        filtered=False,
        confident=False,
    )


def on_device(tables: Tables) -> Tables:
    copy = random_tables(0)
    for name in ("tokens", "cached", "passes", "pages"):
        setattr(copy, name, getattr(tables, name).clone().to(DEVICE))
    return copy


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=ROWS),
    st.sampled_from([0, 0, 1, 37]),
)
def test_the_kernels_expand_and_settle_as_torch_does(seed: int, kinds: list[Kind], padding: int) -> None:
    chance = np.random.default_rng(seed)
    step, tables = random_step(chance, kinds), random_tables(seed)
    for row, ahead in step.segments[step.segments[:, AHEAD] > 0][:, [ROW, AHEAD]].tolist():
        tables.tokens[row, int(tables.cached[row]) : int(tables.cached[row]) + ahead + 1] = 9
    for row, block, ahead in step.segments[step.segments[:, SETTLE] != Settle.KEEP][
        :, [ROW, BLOCK, AHEAD]
    ].tolist():
        tables.tokens[row, int(tables.cached[row]) + ahead + block :] = (
            MASK  # nothing is drafted behind a block
        )
    there = on_device(tables)
    query_tokens = int(step.segments[:, LENGTH].sum())
    asked = len(step.segments)
    size, count = query_tokens + padding, asked + (padding > 0)
    plain = known_layout(step, torch.device("cpu"), torch.float32)
    packed = torch.from_numpy(padded_layout(step, size, count, ROWS)).to(DEVICE)
    padded = unpack_layout(packed, size, None, plain.lora)
    gate = torch.float32 if plain.lora else None

    def expanded(of: Tables, which: str) -> Expanded:
        step_layout = plain if which == "torch" else padded
        return expand(
            step_layout.segments, step_layout.known, step_layout.query_tokens, of.tokens, of.cached,
            of.passes, of.pages, PAGE, MASK, CANVAS, gate,
        )  # fmt: skip

    want = expanded(tables, "torch")
    with implementation("triton"):
        got = expanded(there, "triton")
    for name, expected, actual in zip(Expanded._fields, want, got, strict=True):
        if expected is None and name in ("lo", "hi"):
            expected = torch.zeros(query_tokens, dtype=torch.int64)
        if expected is None or actual is None:
            assert actual is expected
            continue
        torch.testing.assert_close(actual[: len(expected)].cpu(), expected, rtol=0, atol=0, msg=name)
    check_tables(there, tables)

    generator = torch.Generator().manual_seed(seed)
    said = 8 + torch.randint(3, (size,), generator=generator)  # few tokens, so that drafts are often right
    sure = torch.randint(5, (size,), generator=generator) / 4  # few values, so that confidences tie
    rows = slice(None) if plain.rows is None else plain.rows
    committed = settle(
        plain.segments, plain.parts, want.context, want.open, said[:query_tokens][rows],
        sure[:query_tokens][rows], tables.tokens, tables.cached, tables.passes, MASK, CANVAS,
    )  # fmt: skip
    with implementation("triton"):
        packed_output = settle(
            padded.segments, None, got.context, got.open, said.to(DEVICE), sure.to(DEVICE), there.tokens,
            there.cached, there.passes, MASK, CANVAS,
        ).cpu()  # fmt: skip
    check_tables(there, tables)
    assert packed_output.shape == (count, 1 + CANVAS)
    assert (packed_output[asked:, 0] == 0).all()
    settles = step.segments[:, [BLOCK, SETTLE]].tolist()
    for (block, of), expected, actual in zip(
        settles, committed.tolist(), packed_output.tolist(), strict=False
    ):
        assert actual[: 1 + actual[0]] == expected[: 1 + expected[0]]
        if of == Settle.DENOISE and not actual[0]:  # the draft, or the canvas as it stands after the pass
            assert actual[1:block] == expected[1:block]


def check_tables(there: Tables, here: Tables) -> None:
    """The same state; what stands in the row of the padding is nobody's."""
    for name in ("tokens", "cached", "passes"):
        actual, expected = getattr(there, name).cpu()[:ROWS], getattr(here, name)[:ROWS]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=name)
    assert int(there.cached[ROWS]) == 0


def test_the_kernels_and_the_planner_mean_the_same_by_their_codes() -> None:
    assert [expansion.CAUSAL, expansion.CANVAS, expansion.QUADRATIC, expansion.PAD] == list(Pattern)
    codes = [settling.KEEP, settling.SAMPLE, settling.DENOISE, settling.VERIFY, settling.NOTHING]
    assert codes == list(Settle)


@pytest.mark.parametrize("padding", [0, 5])
def test_a_step_of_nothing_but_padding_changes_nothing(padding: int) -> None:
    tables = random_tables(1)
    there = on_device(tables)
    empty = Step(
        np.zeros((0, COLUMNS_OF_SEGMENTS), np.int64), np.zeros(0), np.zeros((0, 3), np.int64),
        np.zeros((0, 4), np.int64), np.zeros((0, 3)), np.zeros(0, np.int64), np.zeros((0, 3), np.int64), True, False,
        False,
    )  # fmt: skip
    size = 1 + padding
    padded = unpack_layout(
        torch.from_numpy(padded_layout(empty, size, 3, ROWS)).to(DEVICE), size, None, False
    )
    with implementation("triton"):
        got = expand(
            padded.segments, None, size, there.tokens, there.cached, there.passes, there.pages, PAGE, MASK,
            CANVAS, None,
        )  # fmt: skip
        assert (got.slots == SCRATCH_PAGE * PAGE).all()
        said = torch.full((size,), 9, device=DEVICE)
        output = settle(
            padded.segments, None, got.context, got.open, said, said.float(), there.tokens, there.cached,
            there.passes, MASK, CANVAS,
        )  # fmt: skip
    assert (output[:, 0] == 0).all()
    check_tables(there, tables)
