"""Steps without an engine, for benchmarks of what executes them."""

import numpy as np
import torch

from engine.runner import Runner
from engine.segment import Pattern, Settle
from engine.step import COLUMNS, Step


def verify_step(rows: int, block: int) -> Step:
    """Verifies `block` - 1 drafts of each row; a block of 1 is a step of AR decoding."""
    return _step(rows, block, Pattern.CAUSAL, Settle.VERIFY, commits=block)


def draft_step(rows: int, block: int, lora: bool) -> Step:
    """Drafts `block` - 1 tokens of each row, whatever stands there."""
    return _step(rows, block, Pattern.CANVAS, Settle.DENOISE, commits=0, lora=lora, restart=True)


def denoise_step(rows: int, block: int) -> Step:
    """One pass over a canvas of each row."""
    return _step(rows, block, Pattern.CANVAS, Settle.DENOISE, commits=block)


def _step(
    rows: int,
    block: int,
    pattern: Pattern,
    settle: Settle,
    commits: int,
    lora: bool = False,
    restart: bool = False,
) -> Step:
    segments = np.zeros((rows, COLUMNS), np.int64)
    for row in range(rows):
        segments[row] = (row, block, block, pattern, settle, commits, 0, lora, restart, 0)
    nothing = np.empty((0, 0), np.int64)
    return Step(
        segments=segments,
        thresholds=np.full(rows, 0.9),
        grants=nothing,
        rows=nothing,
        sampling=np.empty((0, 0), np.float64),
        tokens=np.empty(0, np.int64),
        edits=nothing,
        greedy=True,
        filtered=False,
        confident=settle is Settle.DENOISE and commits > 0,
    )


def occupy(runner: Runner, rows: int, context: int, room: int) -> None:
    """Gives each of the rows its own pages for context + room tokens, and a context of random tokens, keys and values.
    Raises ValueError if there are not as many pages."""
    tables = runner.tables
    columns = -(-(context + room) // runner.page_size)
    available = runner.kv.shape[1] - 1  # the last page is the padding's
    if rows * columns > available:
        raise ValueError(f"{rows} rows of {columns} pages do not fit into {available}")
    tables.pages[:rows, :columns] = torch.randperm(rows * columns, device=tables.device).view(rows, columns)
    low = tables.mask_id + 1
    vocab = runner.model.config.vocab_size
    tables.tokens[:rows] = tables.mask_id
    tables.tokens[:rows, : context + 1] = torch.randint(low, vocab, (rows, context + 1), device=tables.device)
    tables.cached[:rows] = context
    tables.passes[:rows] = 0
    for layer in runner.kv:
        layer[: rows * columns].normal_()


def rewind(runner: Runner, rows: int, context: int) -> None:
    """Lets the rows stand at the end of the context again."""
    runner.tables.cached[:rows] = context
