"""Steps and outputs survive their way as bytes, and what is no frame is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.frames import MAX_STEPS, pack_output, pack_steps, unpack_output, unpack_steps
from engine.step import COLUMNS, ROW_COLUMNS, Step, padding_step

numbers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)


def tables(columns: int) -> st.SearchStrategy[NDArray[np.int64]]:
    rows = st.lists(st.lists(numbers, min_size=columns, max_size=columns), max_size=4)
    return rows.map(lambda values: np.array(values, np.int64).reshape(-1, columns))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    segments, rows = draw(tables(COLUMNS)), draw(tables(ROW_COLUMNS))
    amounts = draw(st.lists(floats, min_size=4 * 4 + 4, max_size=4 * 4 + 4))
    return Step(
        segments=segments,
        thresholds=np.array(amounts[: len(segments)]),
        grants=draw(tables(3)),
        rows=rows,
        sampling=np.array(amounts[4 : 4 + 3 * len(rows)]).reshape(-1, 3),
        tokens=np.array(draw(st.lists(numbers, max_size=6)), np.int64),
        edits=draw(tables(3)),
        greedy=draw(st.booleans()),
        filtered=draw(st.booleans()),
        confident=draw(st.booleans()),
    )


@given(st.integers(0, 2**62), st.lists(steps(), min_size=1, max_size=3))
def test_steps_arrive_as_they_were_sent(number: int, sent: list[Step]) -> None:
    arrived, got = unpack_steps(pack_steps(number, sent))
    assert arrived == number and len(got) == len(sent)
    for one, other in zip(sent, got, strict=True):
        for field in dataclasses.fields(Step):
            before, after = getattr(one, field.name), getattr(other, field.name)
            if isinstance(before, np.ndarray):
                assert before.dtype == after.dtype and before.shape == after.shape and after.flags.writeable
                assert before.tobytes() == after.tobytes()
            else:
                assert before == after


@given(st.integers(0, 2**62), tables(3))
def test_an_output_arrives_as_it_was_sent(number: int, packed: NDArray[np.int64]) -> None:
    arrived, got = unpack_output(pack_output(number, packed))
    assert arrived == number and np.array_equal(got, packed)


@given(st.lists(steps(), min_size=1, max_size=2), st.data())
def test_a_frame_of_another_length_or_kind_is_refused(sent: list[Step], data: st.DataObject) -> None:
    frame = pack_steps(1, sent)
    cut = data.draw(st.integers(0, len(frame) - 1))
    for wrong in (
        frame[:cut],
        frame + bytes(8),
        b"x" + frame[1:],
        pack_output(1, np.zeros((1, 2), np.int64)),
    ):
        with pytest.raises(ValueError):
            unpack_steps(wrong)
    with pytest.raises(ValueError):
        unpack_output(frame)


@pytest.mark.parametrize("count", [-1, 2**25, 2**62])
@pytest.mark.parametrize("place", [2, 3, 4, 5, 6])
def test_a_header_that_promises_too_much_is_refused(place: int, count: int) -> None:
    words = np.frombuffer(bytearray(pack_steps(1, [padding_step()])), np.int64)
    words[place] = count
    with pytest.raises(ValueError):
        unpack_steps(words.tobytes())


@pytest.mark.parametrize("shape", [(-1, 1), (1, 0), (2**62, 4), (3, 2)])
def test_an_output_of_an_impossible_shape_is_refused(shape: tuple[int, int]) -> None:
    words = np.frombuffer(bytearray(pack_output(1, np.zeros((2, 2), np.int64))), np.int64)
    words[2:4] = shape
    with pytest.raises(ValueError):
        unpack_output(words.tobytes())


def test_a_frame_holds_a_bounded_number_of_steps() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        unpack_steps(pack_steps(1, [padding_step()] * (MAX_STEPS + 1)))
