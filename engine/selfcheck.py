"""The kernels against torch on the device at hand, before it serves anybody: compilers have their bugs too."""

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

CONTEXT = 150  # tokens that each row has before the step that is compared
BLOCK = 4
# what rounding may do to logits, relative to their norm, where products are summed in another order
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.inference_mode()
def check_kernels(runner: Runner) -> None:
    """Runs a causal, a canvas and a quadratic segment in one step: twice through the kernels, which must give the same
    bits, and once through torch, which must give the same logits but for rounding.

    Uses rows and pages that sequences get later. Raises RuntimeError. Where ops run in torch it does nothing.
    """
    if not on_triton(runner.kv):
        return
    device = runner.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    first, second = _logits(runner), _logits(runner)
    if not torch.equal(first, second):
        raise RuntimeError(f"{name}: the kernels give different logits for the same input")
    with implementation("torch"):
        expected = _logits(runner)
    error = float((first - expected).norm() / expected.norm())
    if not error < TOLERANCE[runner.model.dtype]:  # so that nan fails
        raise RuntimeError(f"{name}: the kernels' logits are off by {error:.1e} of their norm")


def _logits(runner: Runner) -> Tensor:
    """Logits of a step on up to three rows of made-up text, [R, vocab]."""
    tables, config = runner.tables, runner.model.config
    own = BLOCK * (BLOCK + 1)
    held = min(tables.pages.shape[1] - 1, (runner.kv.shape[1] - 1) // 3)  # pages of each row
    rows = min(3, len(tables.cached) - 1, held)
    context = min(CONTEXT, held * runner.page_size - own, tables.tokens.shape[1] - own)
    row, column = np.mgrid[:rows, :held].reshape(2, -1)
    text = np.random.default_rng(0).integers(0, config.vocab_size - 1, (rows, context + 1))
    text[text == config.mask_id] = config.vocab_size - 1
    starts = [(row, context + 1, 0, 0, 0) for row in range(rows)]
    prefill = [(row, context, context, Pattern.CAUSAL, Settle.KEEP, 0, 0, 0, 0) for row in range(rows)]
    mixed = [
        (0, 1, 1, Pattern.CAUSAL, Settle.SAMPLE, 1, 0, 0, 0),
        (1, BLOCK, BLOCK, Pattern.CANVAS, Settle.DENOISE, 0, 0, int(runner.model.has_adapter), 0),
        (2, own, BLOCK, Pattern.QUADRATIC, Settle.VERIFY, BLOCK, 0, 0, 0),
    ]
    filling = replace(
        _step(prefill),
        grants=np.column_stack((row, column, row * held + column)),
        rows=np.array(starts, np.int64),
        sampling=np.array([(0.0, 1.0, 0.0)] * rows),
        tokens=text.ravel(),
    )
    tables.update(filling)
    _forward(runner, filling)
    tables.cached[:rows] = context
    return _forward(runner, _step(mixed[:rows])).clone()


def _forward(runner: Runner, step: Step) -> Tensor:
    return runner.forward(known_layout(step, runner.model.device, runner.model.dtype))[1]


def _step(segments: Sequence[tuple[int, ...]]) -> Step:
    return replace(padding_step(), segments=np.array(segments, np.int64), thresholds=np.zeros(len(segments)))
