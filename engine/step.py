"""A step as packed arrays: all that crosses from the process that plans to the ranks that execute."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.segment import Segment, Settle
from engine.sequence import Sequence

# columns of Step.segments
ROW, LENGTH, BLOCK, PATTERN, SETTLE, COMMITS, STEPS, LORA, RESTART, AHEAD = range(10)
COLUMNS = 10
# columns of Step.rows and Step.sampling
ROW_ID, ROW_TOKENS, ROW_SEED, ROW_TOP_K, ROW_CACHED = range(5)
ROW_COLUMNS = 5
TEMPERATURE, TOP_P, MIN_P = range(3)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of every rank.

    segments: [S, 10] int64, one row a segment, in order of settle operation, whether they may commit, and
    length; columns as named above.
    thresholds: [S] float64. grants: [G, 3] int64, (row, column, page). rows: [N, 5] int64 and sampling: [N, 3] float64,
    sequences that start in a row; tokens: their prompts, one after the other. edits: [E, 3] int64, (row, column,
    token): what the host writes into the tables, after those prompts. greedy, filtered: whether all rows of the batch
    are greedy, and whether any has a filter; confident: whether any segment commits by confidence.
    """

    segments: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    grants: NDArray[np.int64]
    rows: NDArray[np.int64]
    sampling: NDArray[np.float64]
    tokens: NDArray[np.int64]
    edits: NDArray[np.int64]
    greedy: bool
    filtered: bool
    confident: bool


def padding_step() -> Step:
    """A step without segments."""
    return pack([], [], [])


def pack(
    segments: Seq[Segment],
    started: Seq[Sequence],
    granted: Seq[tuple[int, int, int]],
    edits: Seq[tuple[int, int, int]] = (),
) -> Step:
    """Packs what was planned. The drafts that segments bring along are edits too."""
    params = [s.sequence.request.sampling for s in segments]
    edited = [edit for s in segments if s.drafts for edit in s.edits()]
    return Step(
        segments=np.array(
            [
                (
                    s.sequence.row,
                    s.query_tokens,
                    s.block,
                    s.pattern,
                    s.settle,
                    s.commits,
                    s.steps,
                    s.lora,
                    s.restart,
                    s.ahead,
                )
                for s in segments
            ],
            dtype=np.int64,
        ).reshape(-1, COLUMNS),
        thresholds=np.array([s.threshold for s in segments], dtype=np.float64),
        grants=np.array(granted, dtype=np.int64).reshape(-1, 3),
        rows=np.array(
            [
                (s.row, len(s.tokens), s.request.sampling.seed, s.request.sampling.top_k, s.found)
                for s in started
            ],
            dtype=np.int64,
        ).reshape(-1, ROW_COLUMNS),
        sampling=np.array(
            [(p.temperature, p.top_p, p.min_p) for p in (s.request.sampling for s in started)],
            dtype=np.float64,
        ).reshape(-1, 3),
        tokens=np.array([t for s in started for t in s.tokens], dtype=np.int64),
        edits=np.array([*edits, *edited], dtype=np.int64).reshape(-1, 3),
        greedy=all(p.temperature == 0 for p in params),
        filtered=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
        confident=any(s.settle is Settle.DENOISE and s.commits for s in segments),
    )
