"""What crosses between an engine and its ranks in every step: packed arrays, a small header in front.

Both ends are of one release and one byte order (little-endian). All numbers are of eight bytes, so that arrays can be
read in place. A frame that is not what it says raises ValueError.
"""

import sys
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from engine.step import COLUMNS, ROW_COLUMNS, Step

STEPS, OUTPUT = 0x5453_5445_5053_0001, 0x5453_4F55_5450_0001  # what a frame starts with: its kind and version
MAX_STEPS = 16
MAX_ROWS = 1 << 24  # of any array; 2**24 tokens are the longest prompt

# rows of each array of a step, in the order of its header and of its data
_COUNTS = 6  # segments, grants, rows, tokens, edits, flags
_GREEDY, _FILTERED, _CONFIDENT = 1, 2, 4

assert sys.byteorder == "little"


def pack_steps(number: int, steps: Seq[Step]) -> bytes:
    """Frames what is to be executed as the run of that number."""
    header: list[int] = [STEPS, number, len(steps)]
    arrays: list[bytes] = []
    for step in steps:
        flags = _GREEDY * step.greedy + _FILTERED * step.filtered + _CONFIDENT * step.confident
        counts = map(len, (step.segments, step.grants, step.rows, step.tokens, step.edits))
        header += (*counts, flags)
        arrays += (
            step.segments.tobytes(),
            step.thresholds.tobytes(),
            step.grants.tobytes(),
            step.rows.tobytes(),
            step.sampling.tobytes(),
            step.tokens.tobytes(),
            step.edits.tobytes(),
        )
    return b"".join((np.array(header, np.int64).tobytes(), *arrays))


def unpack_steps(frame: bytes) -> tuple[int, list[Step]]:
    """The number of the run and its steps, whose arrays may be written to."""
    words = _words(frame, STEPS, 3)
    number, count = int(words[1]), int(words[2])
    if not 1 <= count <= MAX_STEPS or len(words) < 3 + count * _COUNTS:
        raise ValueError(f"a frame of {len(frame)} bytes cannot hold {count} steps")
    counts = words[3 : 3 + count * _COUNTS].reshape(count, _COUNTS)
    if counts.min() < 0 or counts.max() > MAX_ROWS:
        raise ValueError("a step has a count out of bounds")
    segments, grants, rows, tokens, edits, _ = counts.T
    columns = segments * (COLUMNS + 1) + grants * 3 + rows * (ROW_COLUMNS + 3) + tokens + edits * 3
    if len(words) != 3 + count * _COUNTS + int(columns.sum()):
        raise ValueError(f"a frame of {len(frame)} bytes does not hold what its header says")
    at = 3 + count * _COUNTS

    def take(length: int, width: int) -> NDArray[np.int64]:
        nonlocal at
        part = words[at : at + length * width].reshape(length, width)
        at += length * width
        return part

    steps = []
    for segments_, grants_, rows_, tokens_, edits_, flags in counts.tolist():
        steps.append(
            Step(
                segments=take(segments_, COLUMNS),
                thresholds=take(segments_, 1)[:, 0].view(np.float64),
                grants=take(grants_, 3),
                rows=take(rows_, ROW_COLUMNS),
                sampling=take(rows_, 3).view(np.float64),
                tokens=take(tokens_, 1)[:, 0],
                edits=take(edits_, 3),
                greedy=bool(flags & _GREEDY),
                filtered=bool(flags & _FILTERED),
                confident=bool(flags & _CONFIDENT),
            )
        )
    return number, steps


def pack_output(number: int, packed: NDArray[np.int64]) -> bytes:
    """Frames the output of the run of that number: [S, 1 + W], how many tokens each segment committed, then those."""
    return np.array([OUTPUT, number, *packed.shape], np.int64).tobytes() + packed.tobytes()


def unpack_output(frame: bytes) -> tuple[int, NDArray[np.int64]]:
    """The number of the run and its output."""
    words = _words(frame, OUTPUT, 4)
    number, rows, columns = (int(word) for word in words[1:4])
    if not (0 <= rows <= MAX_ROWS and 1 <= columns <= MAX_ROWS and len(words) == 4 + rows * columns):
        raise ValueError(f"a frame of {len(frame)} bytes does not hold an output of {rows} by {columns}")
    return number, words[4:].reshape(rows, columns)


def _words(frame: bytes, kind: int, least: int) -> NDArray[np.int64]:
    if len(frame) % 8 or len(frame) < 8 * least:
        raise ValueError(f"a frame of {len(frame)} bytes is none")
    words = np.frombuffer(bytearray(frame), np.int64)
    if words[0] != kind:
        raise ValueError("a frame of another kind or release")
    return words
