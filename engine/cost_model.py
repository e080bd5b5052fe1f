"""How long a step takes: from its query tokens and the context that it reads, measured, corrected while serving, kept.

Plain values, for the controller and for simulators; what is measured comes through a callable.
"""

import json
import logging
import math
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig, Sizes
from engine.segment import Pattern, Segment, Settle
from engine.step import COLUMNS, Step

logger = logging.getLogger(__name__)

REPEATS = 5  # timings of a point, after one that is not counted
BUDGET_SECONDS = {"cpu": 1.0, "cuda": 10.0}  # of a measurement at start
RATE = 0.05  # of the gap between prediction and observation, closed by one observation
SURPRISE = math.log(1.5)  # the most that one observation can say: a compilation or a pause is no news
SILENCE = 0.02  # a difference that is not worth the arithmetic
BOUND = 4.0  # of all corrections together, as a factor
# settings that change no step's cost
FREE_SETTINGS = ("checkpoint", "cost_file", "default_mode", "diffusion", "kv_tokens", "lag", "ridge_tokens",
                 "rendezvous_port", "rendezvous_seconds", "placement_seconds")  # fmt: skip
# Of the 14B: KV bytes of one token in bf16 (40 layers, 8 KV heads of 128, keys and values), and what an attention
# kernel is assumed to reach of a B200's 8e12 bytes a second.
KV_BYTES_14B = 163_840
KV_BANDWIDTH_B200 = 6.4e12

Key = dict[str, Any]


class CostModel:
    """Seconds of one step, over a grid of (query tokens, context).

    Query tokens are those of all segments together. The context is the sum, over the step's segments, of the cached
    tokens that each reads, its own query tokens not counted: what attention fetches from memory. Two steps that agree
    in both numbers may still differ, since one long sequence splits otherwise than many short ones; what that comes to
    on a given load is left to `observe`.

    Between grid points seconds are bilinear, below the first as at the first (there the weights' bytes decide, not the
    tokens), beyond the last they grow as over the axis' upper half. They never fall in either argument.
    """

    def __init__(
        self, query_tokens: Seq[float], context: Seq[float], seconds: Seq[Seq[float]], key: Key | None = None
    ) -> None:
        """query_tokens: [Q] and context: [C], ascending. seconds: [Q, C]. An axis of one value counts as flat. key:
        what the seconds were measured on, in JSON's types. Raises ValueError if these make no grid."""
        grid = np.array(seconds, dtype=np.float64)
        axes = [np.array(axis, dtype=np.float64) for axis in (query_tokens, context)]
        if grid.ndim != 2 or grid.shape != (axes[0].size, axes[1].size) or not grid.size:
            raise ValueError(f"seconds must be [{axes[0].size}, {axes[1].size}], not {list(grid.shape)}")
        if any((np.diff(axis) <= 0).any() or axis[0] < 0 or not np.isfinite(axis).all() for axis in axes):
            raise ValueError("query_tokens and context must ascend from 0 or above")
        if not np.isfinite(grid).all() or (grid <= 0).any():
            raise ValueError("seconds must be positive")
        self.key: Key = json.loads(json.dumps(key or {}))
        self._measured = _monotone(grid)
        self._queries, self._contexts = axes[0].tolist(), axes[1].tolist()
        self._octaves = np.log2(np.maximum(axes[0], 1.0))
        self._correct(self._measured)

    def seconds(self, query_tokens: float, context: float) -> float:
        """Seconds of a step."""
        row, x, beyond_q = _place(self._queries, query_tokens)
        column, y, beyond_c = _place(self._contexts, context)
        low, high = self._rows[row], self._rows[row + 1]
        low_seconds = low[column] + (low[column + 1] - low[column]) * y
        high_seconds = high[column] + (high[column + 1] - high[column]) * y
        within = low_seconds + (high_seconds - low_seconds) * x
        return within + beyond_q * self._query_slope + beyond_c * self._context_slope

    def curve(self, query_tokens: NDArray[Any], context: NDArray[Any] | float) -> NDArray[np.float64]:
        """`seconds` of many steps at once; the arguments broadcast."""
        row, x, beyond_q = _places(self._queries, np.asarray(query_tokens, np.float64))
        column, y, beyond_c = _places(self._contexts, np.asarray(context, np.float64))
        table = self._table
        low = table[row, column] + (table[row, column + 1] - table[row, column]) * y
        high = table[row + 1, column] + (table[row + 1, column + 1] - table[row + 1, column]) * y
        seconds = low + (high - low) * x + beyond_q * self._query_slope + beyond_c * self._context_slope
        return np.asarray(seconds, np.float64)

    def observe(self, query_tokens: float, context: float, seconds: float) -> None:
        """Moves the prediction a little towards what a step took, and those nearby with it: by half as much per
        doubling of the query tokens and per interval of the context."""
        if not 0 < seconds < math.inf:
            return
        surprise = math.log(seconds / self.seconds(query_tokens, context))
        if abs(surprise) < SILENCE:
            return
        step = RATE * max(-SURPRISE, min(SURPRISE, surprise))
        index, part, _ = _place(self._contexts, context)
        octaves = np.abs(self._octaves - math.log2(max(query_tokens, 1.0)))
        intervals = np.abs(np.arange(len(self._contexts)) - (index + part))
        near = np.exp2(-octaves)[:, None] * np.exp2(-intervals)
        near /= near.max()  # beyond the grid its edge is what can move
        moved = self._corrected * np.exp(step * near)
        # what was seen last is not to be contradicted: more than a slow step is as slow, less than a fast one as fast
        moved = _monotone(moved) if step > 0 else _monotone_from_above(moved)
        self._correct(np.minimum(np.maximum(moved, self._measured / BOUND), self._measured * BOUND))

    def to_json(self) -> str:
        """The key, the grid as measured and as corrected."""
        return json.dumps(
            {
                "key": self.key,
                "query_tokens": self._queries,
                "context": self._contexts,
                "seconds": self._measured.tolist(),
                "corrected": self._corrected.tolist(),
            }
        )

    @staticmethod
    def from_json(text: str) -> "CostModel":
        """Raises ValueError if the text is no cost model."""
        try:
            raw = json.loads(text)
            model = CostModel(raw["query_tokens"], raw["context"], raw["seconds"], raw["key"])
            corrected = CostModel(raw["query_tokens"], raw["context"], raw["corrected"])._measured
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a cost model: {error!r}") from error
        model._correct(corrected)
        return model

    @staticmethod
    def from_sweep(
        rows: Iterable[Mapping[str, str]],
        kv_bytes: float = KV_BYTES_14B,
        bandwidth: float = KV_BANDWIDTH_B200,
        key: Key | None = None,
    ) -> "CostModel":
        """A model from a published sweep of forwards, for planning without the hardware.

        rows: with columns query_tokens, concurrency, mean_history (cached tokens of each sequence) and mean_ms, as
        in perf/data/b200_14b_forward_sweep.csv. kv_bytes of one context token over bandwidth, in bytes a second, give
        what the context costs, which such a sweep hardly varies: it is taken out of every row, the median over the
        rows with equal query tokens is taken, and it is added again, linearly. A step of fewer tokens than any row's,
        as of AR, costs what the smallest row does, but for its context.
        """
        kv_seconds, longest = kv_bytes / bandwidth, 0.0
        without_context: dict[int, list[float]] = {}
        for row in rows:
            context = int(row["concurrency"]) * float(row["mean_history"])
            seconds = float(row["mean_ms"]) / 1000 - context * kv_seconds
            without_context.setdefault(int(row["query_tokens"]), []).append(seconds)
            longest = max(longest, context)
        queries = sorted(without_context)
        medians = [statistics.median(without_context[tokens]) for tokens in queries]
        return CostModel(queries, [0.0, longest], [[s, s + longest * kv_seconds] for s in medians], key)

    def _correct(self, table: NDArray[np.float64]) -> None:
        """Takes a monotone [Q, C] table for what steps cost now."""
        self._corrected = table
        # One slope for all beyond the grid: with one of each row's own, two rows could cross.
        self._query_slope = _last_slope(self._queries, table)
        self._context_slope = _last_slope(self._contexts, table.T)
        # the last row and column once more, so that a place at the end has a neighbour too
        rows, columns = len(self._queries), len(self._contexts)
        self._table = table[np.minimum(np.arange(rows + 1), rows - 1)][
            :, np.minimum(np.arange(columns + 1), columns - 1)
        ]
        self._rows: list[list[float]] = self._table.tolist()


def _monotone(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running maximum over both axes."""
    return np.maximum.accumulate(np.maximum.accumulate(grid, 0), 1)


def _monotone_from_above(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running minimum over both axes, from their ends."""
    return np.minimum.accumulate(np.minimum.accumulate(grid[::-1, ::-1], 0), 1)[::-1, ::-1]


def _last_slope(axis: list[float], table: NDArray[np.float64]) -> float:
    """How much the [N, M] table, monotone over an axis of N values, rises over the axis' upper half; median of M."""
    if len(axis) == 1:
        return 0.0
    half = max(axis[-1] / 2, axis[0])
    index, part, _ = _place(axis, half)
    rises = table[-1] - (table[index] + (table[index + 1] - table[index]) * part)
    return float(np.median(rises)) / (axis[-1] - half)


def _place(axis: list[float], value: float) -> tuple[int, float, float]:
    """The grid index at or before a value, how far to the next one, and by how much the value lies beyond the last."""
    if value >= axis[-1]:
        return len(axis) - 1, 0.0, value - axis[-1]
    if value <= axis[0]:
        return 0, 0.0, 0.0
    index = bisect_right(axis, value) - 1
    return index, (value - axis[index]) / (axis[index + 1] - axis[index]), 0.0


def _places(
    axis: list[float], value: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """`_place` of every value."""
    points = np.append(axis, math.inf)
    within = np.clip(value, axis[0], axis[-1])
    index = np.searchsorted(points, within, side="right") - 1
    return (
        index,
        (within - points[index]) / (points[index + 1] - points[index]),
        np.maximum(value - axis[-1], 0.0),
    )


def measure(
    run: Callable[[int, int], float],
    query_tokens: Seq[int],
    context: Seq[int],
    budget: float,
    key: Key | None = None,
) -> CostModel:
    """Times every point of the grid, in rounds, until each has REPEATS timings or the budget, in seconds, is spent.

    run(query tokens, context) returns the seconds of one such step; nan where there can be none. The first round
    compiles and warms up and counts only where nothing follows it. Points are taken in order of their context, then of
    their tokens; rows and columns that the budget does not reach are left to extrapolation, and single points to the
    sum of what their row and their column add.
    """
    start = last = time.perf_counter()
    points = [(i, j) for j in range(len(context)) for i in range(len(query_tokens))]
    timings: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    done = 0
    for done in range((1 + REPEATS) * len(points)):
        now = time.perf_counter()
        if done and now - start > budget:
            break
        if now - last > 2:
            last = now
            logger.info("measuring step costs: %d s of at most %d s", now - start, budget)
        i, j = point = points[done % len(points)]
        seconds = run(query_tokens[i], context[j])
        if not math.isnan(seconds):
            timings[point].append(seconds)
    if done < len(points):
        logger.info("%d of %d step costs measured within %.1f s", done, len(points), budget)
    grid = np.full((len(query_tokens), len(context)), np.nan)
    for point, seconds_of_point in timings.items():
        if seconds_of_point:
            grid[point] = statistics.median(seconds_of_point[1:] or seconds_of_point)
    reached = ~np.isnan(grid)
    rows = np.flatnonzero(reached[:, 0]).tolist()
    columns = np.flatnonzero(reached[rows].any(0)).tolist()
    grid = grid[np.ix_(rows, columns)]
    added = np.maximum(np.nanmedian(grid - grid[:, :1], axis=0), 0.0)
    grid = np.where(np.isnan(grid), grid[:, :1] + added, grid)
    return CostModel([query_tokens[i] for i in rows], [context[j] for j in columns], grid.tolist(), key)


class Output(Protocol):
    """What a step returns."""

    def committed(self) -> list[list[int]]:
        """Waits until the step has been executed."""
        ...


class StepTimer:
    """Times steps of made-up sequences, from the packed step to the copy of what it committed.

    As many sequences as there can be share the tokens evenly, each a verified block; where that would make a block too
    long, a prefill chunk takes the rest. Meant for an executor that serves nobody yet: it uses the rows and pages that
    sequences get later, which fill what they use when they start.
    """

    def __init__(self, run: Callable[[Step], Output], config: EngineConfig, model: ModelConfig) -> None:
        """run: executes a step."""
        self.run, self.config, self.sizes = run, config, Sizes.of(config, model)
        self.token = model.bos_id

    def grid(self) -> tuple[list[int], list[int]]:
        """Query tokens and contexts that such steps can have: powers of two up to the largest step, and a sixteenth, a
        quarter and all of the memory that it leaves."""
        config = self.config
        largest = config.max_batch_tokens
        free = config.kv_tokens - largest - config.max_running * config.page_size
        most = min(free, config.max_running * self.sizes.max_model_len - largest)
        queries = [2**power for power in range(largest.bit_length()) if 2**power < largest]
        return [*queries, largest], [0, *(most // part for part in (16, 4, 1) if most >= 16)]

    def __call__(self, query_tokens: int, context: int) -> float:
        """Seconds of one step; nan if the memory or the model's length does not allow it."""
        rows = min(query_tokens, self.config.max_running)
        shares = _shares(query_tokens, rows)
        if shares[0] > self.sizes.block_length:
            shares = [self.sizes.block_length] * (rows - 1)
            shares.insert(0, query_tokens - sum(shares))
        cached = [max(1, tokens) for tokens in _shares(context, rows)]
        pages = [
            -(-(before + own) // self.config.page_size) for before, own in zip(cached, shares, strict=True)
        ]
        if sum(pages) > self.config.kv_tokens // self.config.page_size:
            return math.nan
        if max(before + own for before, own in zip(cached, shares, strict=True)) > self.sizes.max_model_len:
            return math.nan
        # a context is only claimed, as a hit of the prefix cache is, whatever its KV holds
        segments: list[tuple[int, ...]] = [(row, 1, 1, Pattern.CAUSAL, Settle.KEEP, 0) for row in range(rows)]
        started = list(zip(cached, pages, strict=True))
        self.run(self._step(segments, started)).committed()
        settles = [Settle.KEEP if own > self.sizes.block_length else Settle.VERIFY for own in shares]
        segments = [
            (row, own, own, Pattern.CAUSAL, settle, 0 if settle is Settle.KEEP else own)
            for row, (own, settle) in enumerate(zip(shares, settles, strict=True))
        ]
        step = self._step(sorted(segments, key=lambda s: (s[4], s[5] > 0, s[1])), [])
        start = time.perf_counter()
        self.run(step).committed()
        return time.perf_counter() - start

    def _step(self, segments: Seq[tuple[int, ...]], started: list[tuple[int, int]]) -> Step:
        """started: the context that each row is to have after this step, and how many pages it gets, if they start."""
        packed = np.zeros((len(segments), COLUMNS), np.int64)
        packed[:, : len(segments[0])] = segments
        columns = [(row, column) for row, (_, pages) in enumerate(started) for column in range(pages)]
        return Step(
            segments=packed,
            thresholds=np.zeros(len(segments)),
            grants=np.array([(*place, page) for page, place in enumerate(columns)], np.int64).reshape(-1, 3),
            rows=np.array(
                [(row, 1, 0, 0, context - 1) for row, (context, _) in enumerate(started)], np.int64
            ).reshape(-1, 5),
            sampling=np.array([(0.0, 1.0, 0.0)] * len(started)).reshape(-1, 3),
            tokens=np.full(len(started), self.token, np.int64),
            edits=np.zeros((0, 3), np.int64),
            greedy=True,
            filtered=False,
            confident=False,
        )


def _shares(total: int, parts: int) -> list[int]:
    """The total in equal parts, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def shape_of(segments: Iterable[Segment]) -> tuple[int, int]:
    """Query tokens and context of a step, as the host knows them when its report comes, before it is taken in."""
    query_tokens = context = 0
    for segment in segments:
        sequence = segment.sequence
        query_tokens += segment.query_tokens
        cached = len(sequence.tokens) - 1 if segment.mode else sequence.prefilled - segment.block
        context += max(0, cached)
    return query_tokens, context


def conditions(device: str, config: EngineConfig, model: ModelConfig) -> Key:
    """What a measurement depends on; one of anything else is to be made anew. device: the name of its maker's."""
    versions = {}
    for package in ("torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    return {"device": device, **versions, "settings": settings, "model": asdict(model)}


def read_or_measure(path: str, key: Key, measured: Callable[[], CostModel]) -> CostModel:
    """The model stored at the path if it was measured under the same conditions, else a new one, which is stored
    there. With an empty path nothing is read or stored."""
    if not path:
        return measured()
    file = Path(path)
    try:
        stored = CostModel.from_json(file.read_text())
        if stored.key == json.loads(json.dumps(key)):
            return stored
        logger.info("%s was measured under other conditions; measuring anew", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used (%s); measuring anew", file, error)
    model = measured()
    store(path, model)
    return model


def store(path: str, model: CostModel) -> None:
    """Keeps a model, corrections included, at the path; with an empty path nothing is stored."""
    if not path:
        return
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # replicas that end together each write a file of their own, and the last one stays
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
            temporary.write(model.to_json())
        Path(temporary.name).replace(file)
    except OSError as error:
        logger.warning("the step costs could not be stored: %s", error)
