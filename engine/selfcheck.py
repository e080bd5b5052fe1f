"""The kernels against torch, and the graphs against the kernels, on the device at hand, before it serves anybody:
compilers have their bugs too.

Uses rows and pages that sequences get later, which fill what they use when they start. Where ops run in torch there is
nothing to check.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.batch import known_layout
from engine.runner import Runner
from engine.segment import Pattern, Settle
from engine.step import Step, padding_step
from kernels.backend import implementation, on_triton

CONTEXT = 150  # tokens that each row has before the steps that are compared
BLOCK = 4  # of the segments that are compared with torch
DRAFTED = 8  # block of the round that is compared with its graph
# What rounding may do to logits, relative to their norm, where products are summed in another order. Two ways through
# 40 layers of random weights differ by 0.026 in bfloat16; what is wrong differs by about 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.15}


@torch.inference_mode()
def check_kernels(runner: Runner) -> None:
    """Runs a causal, a canvas and a quadratic segment in one step: twice through the kernels, which must give the same
    bits, and once through torch, which must give the same logits but for rounding. Raises RuntimeError."""
    if not on_triton(runner.kv):
        return
    first, second = _logits(runner), _logits(runner)
    if not torch.equal(first, second):
        raise RuntimeError(f"{_device(runner)}: the kernels give different logits for the same input")
    with implementation("torch"):
        expected = _logits(runner)
    error = float((first - expected).norm() / expected.norm())
    if not error < TOLERANCE[runner.model.dtype]:  # so that nan fails
        raise RuntimeError(f"{_device(runner)}: the kernels' logits are off by {error:.1e} of their norm")


@torch.inference_mode()
def check_graphs(runner: Runner) -> None:
    """Runs a draft and its verification without graphs, as two graphs and as one: the device tables and what was
    committed must be the same. Raises RuntimeError."""
    graphs = runner.graphs
    if graphs is None:
        return
    runner.graphs = None
    try:
        expected = _round(runner, together=False)
    finally:
        runner.graphs = graphs
    for together in (False, True):
        for name, value, right in zip(
            ("tokens", "contexts"), _round(runner, together), expected, strict=True
        ):
            if not torch.equal(value, right):
                raise RuntimeError(f"{_device(runner)}: captured graphs bring other {name} than the kernels")


def _logits(runner: Runner) -> Tensor:
    """Logits of a step on up to three rows of made-up text, [R, vocab]."""
    own = BLOCK * (BLOCK + 1)
    rows = _fill(runner, 3, own)
    mixed = [
        (0, 1, 1, Pattern.CAUSAL, Settle.SAMPLE, 1, 0, 0, 0, 0),
        (1, BLOCK, BLOCK, Pattern.CANVAS, Settle.DENOISE, 0, 0, int(runner.adapter), 0, 0),
        (2, own, BLOCK, Pattern.QUADRATIC, Settle.VERIFY, BLOCK, 0, 0, 0, 0),
    ]
    return _forward(runner, _step(mixed[:rows])).clone()


def _round(runner: Runner, together: bool) -> tuple[Tensor, Tensor]:
    """The tables' tokens and contexts, of up to two rows, after a round and a draft more."""
    block = min(DRAFTED, runner.canvas)
    rows = _fill(runner, 2, 3 * block)
    lora = int(runner.adapter)
    draft = _step(
        [(row, block, block, Pattern.CANVAS, Settle.DENOISE, 0, 0, lora, 1, 0) for row in range(rows)]
    )
    verify = _step(
        [(row, block, block, Pattern.CAUSAL, Settle.VERIFY, block, 0, 0, 0, 0) for row in range(rows)]
    )
    for steps in ([draft, verify],) if together else ([draft], [verify]):
        runner.run(steps).committed()
    runner.run([draft]).committed()
    return runner.tables.tokens[:rows].clone(), runner.tables.cached[:rows].clone()


def _fill(runner: Runner, wanted: int, own: int) -> int:
    """Gives up to `wanted` rows a context of made-up tokens and room for `own` more; returns how many."""
    tables, config = runner.tables, runner.model.config
    pool, needed = runner.kv.shape[1] - 1, own // runner.page_size + 1
    rows = max(1, min(wanted, len(tables.cached) - 1, pool // needed))
    held = min(tables.pages.shape[1] - 1, pool // rows)  # pages of each row
    context = min(CONTEXT, held * runner.page_size - own, tables.tokens.shape[1] - own - runner.canvas)
    row, column = np.mgrid[:rows, :held].reshape(2, -1)
    text = np.random.default_rng(0).integers(0, config.vocab_size - 1, (rows, context + 1))
    text[text == config.mask_id] = config.vocab_size - 1
    prefill = [(row, context, context, Pattern.CAUSAL, Settle.KEEP, 0, 0, 0, 0, 0) for row in range(rows)]
    filling = replace(
        _step(prefill),
        grants=np.column_stack((row, column, row * held + column)),
        rows=np.array([(row, context + 1, 0, 0, 0) for row in range(rows)], np.int64),
        sampling=np.array([(0.0, 1.0, 0.0)] * rows),
        tokens=text.ravel(),
    )
    tables.update(filling)
    _forward(runner, filling)
    tables.cached[:rows] = context
    return rows


def _forward(runner: Runner, step: Step) -> Tensor:
    return runner.forward(known_layout(step, runner.model.device, runner.model.dtype))[1]


def _step(segments: Sequence[tuple[int, ...]]) -> Step:
    return replace(padding_step(), segments=np.array(segments, np.int64), thresholds=np.zeros(len(segments)))


def _device(runner: Runner) -> str:
    device = runner.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
