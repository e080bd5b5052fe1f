"""Operations over the vocabulary: positional Gumbel noise, the choice of a token, its confidence.

The noise is a function of (seed, absolute position, token id) alone, so that draft and verify, every mode, batch and
block length see the same draw, and a token sampled anywhere is the token AR decoding would have sampled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (xorshift-multiply, constants of Wellons' lowbias32) on int64 values below 2**32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, [R, vocab_size] float32, for seed [R] int64 and position [R] int64.

    Always finite: the exponential variate behind it neither cancels near zero nor overflows near one.
    """
    key = _mix((seed & _LOW) ^ _mix(((seed >> 32) & _LOW) ^ 0x9E3779B9))
    key = _mix(key ^ _mix((position + 0x85EBCA6B) & _LOW))
    token = torch.arange(vocab_size, device=seed.device)
    bits = _mix((key[:, None] + token * 0x9E3779B1) & _LOW)
    uniform = ((bits.float() + 0.5) * (1.0 / 4294967296.0)).clamp(max=1 - 2**-24)  # the float just below 1
    exponential = torch.where(uniform < 1e-4, uniform + 0.5 * uniform * uniform, -torch.log1p(-uniform))
    return -torch.log(exponential)


def keep_filtered(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Sets to -inf what top-k, top-p and min-p remove, in that order; ties at a limit stay.

    logits: [R, V], already divided by the temperature. top_k: [R] int64, 0 for off. top_p, min_p: [R].
    """
    ranked = logits.sort(-1, descending=True).values
    vocab_size = logits.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
    ranked = ranked.masked_fill(ranked < ranked.gather(-1, last[:, None]), float("-inf"))
    probability = ranked.softmax(-1)
    before = probability.cumsum(-1) - probability
    # rounding puts `before` a little under or over what it should be, so that 1 must mean off
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep &= (probability >= min_p[:, None] * probability[:, :1]) & ranked.isfinite()
    keep[:, 0] = True
    lowest = ranked.masked_fill(~keep, float("inf")).amin(-1, keepdim=True)
    return logits.masked_fill(logits < lowest, float("-inf"))


class Sampling(NamedTuple):
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def choose(
    logits: Tensor,
    row: Tensor,
    position: Tensor,
    sampling: Sampling,
    mask_id: int,
    greedy: bool,
    filtered: bool,
    confident: bool,
) -> tuple[Tensor, Tensor]:
    logits[:, mask_id] = float("-inf")
    if greedy:
        token = logits.argmax(-1)
    else:
        t = sampling.temperature[row]
        cold = t == 0
        scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(cold, 1.0, t)[:, None]
        if filtered:
            scaled = keep_filtered(scaled, sampling.top_k[row], sampling.top_p[row], sampling.min_p[row])
        noisy = scaled + gumbel_noise(sampling.seed[row], position, logits.shape[-1])
        token = torch.where(cold, logits.argmax(-1), noisy.argmax(-1))
    return token, confidence(logits, token) if confident else logits[:, 0]


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """The unscaled probability of each row's token: logits [R, V], tokens [R] int64, returns [R]."""
    return (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).exp()
