"""Operations over the vocabulary: positional Gumbel noise, and the choice of a token with its confidence.

The noise is a function of (seed, absolute position, token id) alone, so that draft and verify, every mode, batch and
block length see the same draw, and a token sampled anywhere is the token AR decoding would have sampled.

The chosen token is the argmax of (logit - row's maximum) / T + noise. Counting from the maximum down loses no digits of
what decides, however small T is. The Triton side, which reads the logits once, counts from the maximum of each chunk
of the vocabulary and adds (chunk's maximum - row's maximum) / T when it merges the chunks: the same but for rounding.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import launch, on_triton
from kernels.filters import filter_limit, filter_limit_reference
from kernels.sampling import Sampling, inverse_temperature, triton_inverse_temperature

CHUNK = 4096  # tokens that one program summarises; shards of a vocabulary are whole chunks
# highest, total, score, token, logit; ids below 2**24 are exact in float32, so that one tensor holds and sends them all
FIELDS = 5

_LOW = 0xFFFFFFFF
_UNIT = tl.constexpr(2**-32)
_BELOW_ONE = tl.constexpr(1 - 2**-24)  # the float32 just below 1


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
    """The token of each row and its confidence.

    logits: [R, V] floating point, contiguous rows; may be changed in place. row: [R] int64, the row's parameters in
    `sampling`. position: [R] int64, the absolute position where the token is to stand. mask_id is never chosen and has
    probability 0. Returns tokens [R] int64, the lowest id among equals, and confidence [R]: the probability of the
    token at temperature 1 without filters. Plain torch computes in the logits' dtype, kernels in float32.

    greedy (every row is), filtered (some row is) and confident (somebody reads the confidence) say what the host knows;
    plain torch leaves out what they say is not needed, and returns an empty confidence where nobody reads it. Kernels
    ask each row's parameters instead, so that one captured graph serves every batch.
    """
    if not on_triton(logits):
        return choose_reference(logits, row, position, sampling, mask_id, greedy, filtered, confident)
    limit = filter_limit(logits, row, sampling, mask_id)
    summary = summarise(logits, row, position, sampling, limit, mask_id, 0)
    return combine(summary, row, sampling)


def choose_reference(
    logits: Tensor,
    row: Tensor,
    position: Tensor,
    sampling: Sampling,
    mask_id: int,
    greedy: bool,
    filtered: bool,
    confident: bool,
) -> tuple[Tensor, Tensor]:
    """From each row's maximum down. Sets the column mask_id of logits to -inf."""
    logits[:, mask_id] = float("-inf")
    if greedy:
        tokens = logits.argmax(-1)
    else:
        temperature = sampling.temperature[row]
        score = (logits - logits.amax(-1, keepdim=True)) * inverse_temperature(temperature)[:, None]
        if filtered:
            limit = filter_limit_reference(logits, row, sampling, mask_id)
            score.masked_fill_(logits < limit[:, None], float("-inf"))
        score += gumbel_noise(sampling.seed[row], position, logits.shape[-1])
        tokens = torch.where(temperature == 0, logits.argmax(-1), score.argmax(-1))
    if not confident:
        return tokens, logits.new_empty(0)
    return tokens, (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).exp()


def summarise(
    logits: Tensor,
    row: Tensor,
    position: Tensor,
    sampling: Sampling,
    limit: Tensor,
    mask_id: int,
    vocab_start: int,
) -> Tensor:
    """What `combine` has to know of each chunk of a shard of the vocabulary, [R, chunks, FIELDS] float32; plain torch
    keeps float64.

    logits: [R, V] of the tokens from vocab_start on. Where V is a multiple of CHUNK, shards' summaries side by side
    are, bit for bit, the summary of the whole. row, position: [R] int64. limit: [R], the
    lowest logit that a row's filters keep.

    Of each chunk: its highest logit; the sum of exp(logit - highest); and of the token with the highest
    (logit - highest) / T + noise among those kept, this score, the id and the logit.
    """
    if not on_triton(logits):
        return summarise_reference(logits, row, position, sampling, limit, mask_id, vocab_start)
    rows, vocab_size = logits.shape
    chunks = triton.cdiv(vocab_size, CHUNK)
    summary = logits.new_empty(rows, chunks, FIELDS, dtype=torch.float32)
    launch(
        _summarise,
        (rows, chunks),
        logits,
        row,
        position,
        sampling.temperature,
        sampling.seed,
        limit,
        summary,
        mask_id,
        vocab_start,
        num_warps=8,
        STRIDE=logits.stride(0),
        V=vocab_size,
        CHUNK=CHUNK,
        FIELDS=FIELDS,
    )
    return summary


def summarise_reference(
    logits: Tensor,
    row: Tensor,
    position: Tensor,
    sampling: Sampling,
    limit: Tensor,
    mask_id: int,
    vocab_start: int,
) -> Tensor:
    """All chunks at once, the last one padded with impossible tokens."""
    rows, vocab_size = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    x = F.pad(logits.to(wide), (0, -vocab_size % CHUNK), value=float("-inf"))
    token = torch.arange(vocab_start, vocab_start + x.shape[1], device=x.device)
    x = x.masked_fill(token == mask_id, float("-inf")).view(rows, -1, CHUNK)
    highest = x.amax(-1)
    below = x - highest.clamp(min=torch.finfo(x.dtype).min)[:, :, None]  # finite where a chunk is empty
    temperature = sampling.temperature[row][:, None, None]
    noise = gumbel_noise(sampling.seed[row], position, vocab_size, vocab_start)
    noise = F.pad(noise, (0, -vocab_size % CHUNK)).view_as(x)
    noisy = (below * inverse_temperature(temperature) + noise).masked_fill(
        x < limit[:, None, None], float("-inf")
    )
    score, at = torch.where(temperature > 0, noisy, below).max(-1)
    chosen = token.view(-1, CHUNK).expand_as(x).gather(-1, at[:, :, None])[:, :, 0]
    logit = x.gather(-1, at[:, :, None])[:, :, 0]
    return torch.stack((highest, below.exp().sum(-1), score, chosen.to(wide), logit), -1)


def combine(summary: Tensor, row: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 and confidence [R] from a summary [R, chunks, FIELDS] of a whole vocabulary, in its dtype.

    Chunks are merged in their order. row: [R] int64, rows of `sampling`.
    """
    if not on_triton(summary):
        return combine_reference(summary, row, sampling)
    rows, chunks, _ = summary.shape
    tokens = row.new_empty(rows)
    confidence = summary.new_empty(rows)
    launch(
        _combine,
        (rows,),
        summary,
        row,
        sampling.temperature,
        tokens,
        confidence,
        num_warps=1,
        CHUNKS=chunks,
        WIDTH=triton.next_power_of_2(chunks),
        FIELDS=FIELDS,
    )
    return tokens, confidence


def combine_reference(summary: Tensor, row: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Counts every chunk from the row's maximum down."""
    highest, total, score, token, logit = summary.unbind(-1)
    peak = highest.amax(-1, keepdim=True)
    below = highest - peak
    scale = inverse_temperature(sampling.temperature[row])[:, None]
    at = (below * scale + score).argmax(-1, keepdim=True)
    mass = (total * below.exp()).sum(-1)
    return token.gather(-1, at)[:, 0].long(), (logit.gather(-1, at) - peak).exp()[:, 0] / mass


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int, vocab_start: int = 0) -> Tensor:
    """Standard Gumbel noise, [R, vocab_size] float32, for seed [R] int64, position [R] int64 and the tokens from
    vocab_start on.

    -log(e) of an exponential variate e = -log(1 - x), x uniform. Always finite: e neither cancels near zero, where its
    series replaces it since 1 - x has lost the digits of x, nor overflows near one.
    """
    key = _mix((seed & _LOW) ^ _mix(((seed >> 32) & _LOW) ^ 0x9E3779B9))
    key = _mix(key ^ _mix((position + 0x85EBCA6B) & _LOW))
    token = torch.arange(vocab_start, vocab_start + vocab_size, device=seed.device)
    bits = _mix((key[:, None] + token * 0x9E3779B1) & _LOW)
    x = (bits.float() + 0.5).mul_(_UNIT.value).clamp_(max=_BELOW_ONE.value)
    exponential = torch.where(x < 0.02, x * (1 + x * (0.5 + x * (1 / 3 + x * 0.25))), (1 - x).log_().neg_())
    return exponential.log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (xorshift-multiply, constants of Wellons' lowbias32) on int64 values below 2**32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


@triton.jit
def _triton_mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _triton_gumbel_noise(seed, position, token):
    key = _triton_mix(seed.to(tl.uint32) ^ _triton_mix((seed >> 32).to(tl.uint32) ^ 0x9E3779B9))
    key = _triton_mix(key ^ _triton_mix(position.to(tl.uint32) + 0x85EBCA6B))
    bits = _triton_mix(key + token.to(tl.uint32) * 0x9E3779B1)
    x = tl.minimum((bits.to(tl.float32) + 0.5) * _UNIT, _BELOW_ONE)
    exponential = tl.where(x < 0.02, x * (1 + x * (0.5 + x * (1 / 3 + x * 0.25))), -tl.log(1 - x))
    return -tl.log(exponential)


@triton.jit
def _summarise(
    logits_ptr,
    row_ptr,
    position_ptr,
    temperature_ptr,
    seed_ptr,
    limit_ptr,
    summary_ptr,
    mask_id,
    vocab_start,
    STRIDE: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    r = tl.program_id(0)
    c = tl.program_id(1)
    lane = tl.arange(0, CHUNK)
    column = c * CHUNK + lane
    token = vocab_start + column
    x = tl.load(logits_ptr + r.to(tl.int64) * STRIDE + column, mask=column < V, other=float("-inf")).to(
        tl.float32
    )
    x = tl.where(token == mask_id, float("-inf"), x)
    highest = tl.max(x, 0)
    score = x - tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(score), 0)
    owner = tl.load(row_ptr + r)
    temperature = tl.load(temperature_ptr + owner)
    if temperature > 0:
        noise = _triton_gumbel_noise(tl.load(seed_ptr + owner), tl.load(position_ptr + r), token)
        score = score * triton_inverse_temperature(temperature) + noise
        score = tl.where(x >= tl.load(limit_ptr + r), score, float("-inf"))
    best, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    summary_ptr += (r * tl.num_programs(1) + c) * FIELDS
    tl.store(summary_ptr, highest)
    tl.store(summary_ptr + 1, total)
    tl.store(summary_ptr + 2, best)
    tl.store(summary_ptr + 3, (vocab_start + c * CHUNK + at).to(tl.float32))
    tl.store(summary_ptr + 4, tl.max(tl.where(lane == at, x, float("-inf")), 0))


@triton.jit
def _combine(
    summary_ptr,
    row_ptr,
    temperature_ptr,
    tokens_ptr,
    confidence_ptr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
):
    r = tl.program_id(0)
    chunk = tl.arange(0, WIDTH)
    inside = chunk < CHUNKS
    chunks = summary_ptr + (r * CHUNKS + chunk) * FIELDS
    highest = tl.load(chunks, mask=inside, other=float("-inf"))
    total = tl.load(chunks + 1, mask=inside, other=0.0)
    score = tl.load(chunks + 2, mask=inside, other=float("-inf"))
    peak = tl.max(highest, 0)
    below = highest - peak
    scale = triton_inverse_temperature(tl.load(temperature_ptr + tl.load(row_ptr + r)))
    at = tl.argmax(below * scale + score, 0, tie_break_left=True)
    chosen = summary_ptr + (r * CHUNKS + at) * FIELDS
    mass = tl.sum(total * tl.exp(below), 0)
    tl.store(tokens_ptr + r, tl.load(chosen + 3).to(tl.int64))
    tl.store(confidence_ptr + r, tl.exp(tl.load(chosen + 4) - peak) / mass)
