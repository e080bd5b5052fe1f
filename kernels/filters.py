"""The filters of sampling, top-k, top-p and min-p, as one number: the lowest logit of a row that they keep.

All three keep a row's likeliest tokens, so "logit >= limit" says all that they say, and tokens that tie at a limit
share their fate, whatever their ids.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton
from kernels.sampling import Sampling, inverse_temperature, triton_inverse_temperature

BLOCK = 8192  # logits that a program reads at a time


def filter_limit(logits: Tensor, row: Tensor, sampling: Sampling, mask_id: int) -> Tensor:
    """The lowest logit of each row that the filters keep.

    logits: [R, V] floating point, unscaled; where one is -inf, and at mask_id, the token has probability 0. row: [R]
    int64, rows of `sampling`. Returns [R], -inf where a row is greedy or has no filter.

    A token stays if fewer than top_k are likelier, then if those likelier have less than top_p of the probability left,
    then if it has at least min_p times the likeliest one's; probabilities are those at the row's temperature. The two
    sides may differ where a sum of probabilities comes within rounding of top_p.
    """
    if not on_triton(logits):
        return filter_limit_reference(logits, row, sampling, mask_id)
    rows, vocab_size = logits.shape
    limit = logits.new_empty(rows, dtype=torch.float32)
    launch(
        _filter_limit,
        (rows,),
        logits,
        row,
        *sampling[:4],
        limit,
        mask_id,
        num_warps=16,
        STRIDE=logits.stride(0),
        V=vocab_size,
        BLOCK=BLOCK,
    )
    return limit


def filter_limit_reference(logits: Tensor, row: Tensor, sampling: Sampling, mask_id: int) -> Tensor:
    """By sorting. Sets the column mask_id of logits to -inf."""
    temperature, top_k, top_p, min_p = (parameter[row] for parameter in sampling[:4])
    logits[:, mask_id] = float("-inf")
    ranked = logits.sort(-1, descending=True).values
    vocab_size = logits.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
    keep = ranked >= ranked.gather(-1, last[:, None])
    weight = ((ranked - ranked[:, :1]) * inverse_temperature(temperature)[:, None]).exp() * keep
    mass = weight.cumsum(-1)
    likelier = F.pad(mass[:, :-1], (1, 0))
    # rounding puts the sums a little over what they should be, so that 1 must mean off
    keep &= (likelier < top_p[:, None] * mass[:, -1:]) | (top_p[:, None] >= 1)
    keep &= (weight >= min_p[:, None]) & ranked.isfinite()
    keep[:, 0] = True
    limit = ranked.masked_fill(~keep, float("inf")).amin(-1)
    filtered = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    return limit.masked_fill(~filtered, float("-inf"))


@triton.jit
def _block(logits_ptr, start, mask_id, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of one row from column `start` on, [BLOCK]."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
    return tl.where(column == mask_id, float("-inf"), x)


@triton.jit
def _ordered(x):
    """The bits of floats as integers of the same order. Undoes itself."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _lowest(
    logits_ptr,
    mask_id,
    low,
    high,
    wanted,
    peak,
    scale,
    MASS: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest logit from low to high that has less than `wanted` above it: probability mass, in units of the
    likeliest token's, or tokens. Bisects the bits of floats, and skips those that are no logit of the row."""
    found = _ordered(high.to(tl.int32, bitcast=True))
    below = _ordered(low.to(tl.int32, bitcast=True))
    while below < found:
        middle = (below & found) + ((below ^ found) >> 1)  # rounds down and does not overflow
        value = _ordered(middle).to(tl.float32, bitcast=True)
        above = tl.zeros((BLOCK,), tl.float32)
        next_up = tl.full((BLOCK,), float("inf"), tl.float32)
        next_down = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            x = _block(logits_ptr, start, mask_id, V, BLOCK)
            if MASS:
                above += tl.where(x > value, tl.exp((x - peak) * scale), 0.0)
            else:
                above += tl.where(x > value, 1.0, 0.0)  # such sums are exact below 2**24
            next_up = tl.minimum(next_up, tl.where(x > value, x, float("inf")))
            next_down = tl.maximum(next_down, tl.where(x > value, float("-inf"), x))
        few = tl.sum(above) < wanted
        down = _ordered(tl.max(next_down).to(tl.int32, bitcast=True))
        up = _ordered(tl.min(next_up).to(tl.int32, bitcast=True))
        # no zero with a sign and no NaN may keep the bounds apart for ever
        found = tl.where(few, tl.minimum(down, middle), found)
        below = tl.where(few, below, tl.maximum(up, middle + 1))
    return _ordered(found).to(tl.float32, bitcast=True)


@triton.jit
def _filter_limit(
    logits_ptr,
    row_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    limit_ptr,
    mask_id,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    owner = tl.load(row_ptr + r)
    temperature = tl.load(temperature_ptr + owner)
    top_k = tl.load(top_k_ptr + owner)
    top_p = tl.load(top_p_ptr + owner)
    min_p = tl.load(min_p_ptr + owner)
    if (temperature == 0) | ((top_k == 0) & (top_p >= 1) & (min_p == 0)):
        tl.store(limit_ptr + r, float("-inf"))
        return
    logits_ptr += r.to(tl.int64) * STRIDE
    scale = triton_inverse_temperature(temperature)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = _block(logits_ptr, start, mask_id, V, BLOCK)
        highest = tl.maximum(highest, x)
        lowest = tl.minimum(lowest, tl.where(x == float("-inf"), float("inf"), x))
    peak, floor = tl.max(highest), tl.min(lowest)
    if top_k > 0:
        floor = _lowest(logits_ptr, mask_id, floor, peak, top_k.to(tl.float32), peak, scale, False, V, BLOCK)
    if top_p < 1:
        mass = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = _block(logits_ptr, start, mask_id, V, BLOCK)
            mass += tl.where(x >= floor, tl.exp((x - peak) * scale), 0.0)
        floor = _lowest(logits_ptr, mask_id, floor, peak, top_p * tl.sum(mass), peak, scale, True, V, BLOCK)
    if min_p > 0:
        kept = tl.full((BLOCK,), float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            x = _block(logits_ptr, start, mask_id, V, BLOCK)
            stays = (x >= floor) & (tl.exp((x - peak) * scale) >= min_p)
            kept = tl.minimum(kept, tl.where(stays, x, float("inf")))
        floor = tl.min(kept)
    tl.store(limit_ptr + r, floor)
