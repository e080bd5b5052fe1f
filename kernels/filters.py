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
def _block(logits, start, mask_id, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of one row from column `start` on, [BLOCK]."""
    column = start + tl.arange(0, BLOCK)
    inside = (column < V) & (column != mask_id)
    return tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _ordered(x):
    """Floats to integers of the same order, and, since it undoes itself on the integers, the way back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _lowest(
    logits, mask_id, low, high, wanted, peak, scale, MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """The lowest float from low to high that has less than `wanted` above it: probability mass, in units of the
    likeliest token's, or tokens. Bisects the floats themselves, so that it ends on one of the logits."""
    below = _ordered(low.to(tl.int32, bitcast=True))
    found = _ordered(high.to(tl.int32, bitcast=True))
    while below < found:
        middle = (below & found) + ((below ^ found) >> 1)  # rounds down and does not overflow
        value = _ordered(middle).to(tl.float32, bitcast=True)
        above = 0.0
        for start in range(0, V, BLOCK):
            x = _block(logits, start, mask_id, V, BLOCK)
            if MASS:
                weight = tl.exp((x - peak) * scale)
            else:
                weight = tl.full((BLOCK,), 1.0, tl.float32)  # sums of these are exact below 2**24
            above += tl.sum(tl.where(x > value, weight, 0.0))
        few = above < wanted
        found = tl.where(few, middle, found)
        below = tl.where(few, below, middle + 1)
    return _ordered(found).to(tl.float32, bitcast=True)


@triton.jit
def _filter_limit(
    logits,
    row,
    temperature,
    top_k,
    top_p,
    min_p,
    limit,
    mask_id,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    owner = tl.load(row + r)
    heat = tl.load(temperature + owner)
    count = tl.load(top_k + owner)
    share = tl.load(top_p + owner)
    least = tl.load(min_p + owner)
    if (heat == 0) | ((count == 0) & (share >= 1) & (least == 0)):
        tl.store(limit + r, float("-inf"))
        return
    logits += r.to(tl.int64) * STRIDE
    scale = triton_inverse_temperature(heat)
    peak, floor = float("-inf"), float("inf")
    for start in range(0, V, BLOCK):
        x = _block(logits, start, mask_id, V, BLOCK)
        peak = tl.maximum(peak, tl.max(x))
        floor = tl.minimum(floor, tl.min(tl.where(x == float("-inf"), float("inf"), x)))
    if count > 0:
        floor = _lowest(logits, mask_id, floor, peak, count.to(tl.float32), peak, scale, False, V, BLOCK)
    if share < 1:
        mass = 0.0
        for start in range(0, V, BLOCK):
            x = _block(logits, start, mask_id, V, BLOCK)
            mass += tl.sum(tl.where(x >= floor, tl.exp((x - peak) * scale), 0.0))
        floor = _lowest(logits, mask_id, floor, peak, share * mass, peak, scale, True, V, BLOCK)
    kept = float("inf")
    for start in range(0, V, BLOCK):
        x = _block(logits, start, mask_id, V, BLOCK)
        stays = (x >= floor) & (tl.exp((x - peak) * scale) >= least)
        kept = tl.minimum(kept, tl.min(tl.where(stays, x, float("inf"))))
    tl.store(limit + r, kept)
