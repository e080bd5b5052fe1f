"""Tokens a second before there is a machine: a formula fitted to public measurements, scaled by data sheets.

A step is predicted as

    layers * (LAYER + BATCHED, if more than two sequences)  +  bytes read / (BANDWIDTH_SHARE * bandwidth)
        + FLOPs / (PEAK_SHARE * peak)  +  all-reduces

LAYER, BATCHED and PEAK_SHARE are fitted to 384 forwards of the 14B on one B200 with SGLang (perf/data), whose errors
tests/test_forecast.py states, as well as those for the 8B, which the fit has not seen. Nothing here was measured on our
engine.
"""

from dataclasses import dataclass

from cluster.gpu import Gpu
from cluster.published import LARGE, nearest
from engine.config import EngineConfig, ModelConfig, ModeName

LAYER = 79e-6  # seconds a layer that neither bytes nor FLOPs explain
BATCHED = 60e-6  # seconds a layer more from the third sequence on
PEAK_SHARE = 0.547  # of a GPU's peak
BANDWIDTH_SHARE = 0.8  # of HBM's, assumed as in engine/cost_model.py; at batch 1 the 8B agrees within 6 %
BATCHED_FROM = 3

# Seconds of one all-reduce with its residual and norm, by bytes: TP 4 on Blackwell Ultra, hidden size 5120, 1 to 2048
# tokens of bfloat16 (flashinfer issue 5178, a variant that does more, so an upper bound). NCCL's own take 24 to 29 us
# from 16 KiB on (vllm issue 37756). Taken for every TP; a slower NVLink counts as more bytes.
TABLE_NVLINK = 1.8e12
ALL_REDUCE = [
    (10_240 * tokens, 1e-6 * microseconds)
    for tokens, microseconds in ((1, 4.1), (8, 4.3), (16, 4.8), (32, 5.8), (64, 7.7), (128, 9.3), (256, 13.0),
                                 (512, 20.3), (1024, 42.0), (2048, 72.0))
]  # fmt: skip

# Tokens that a round of linear self-speculation commits on the 14B, by block length: twice the mean tokens per forward
# of the served sweep's nine data sets (perf/data/b200_14b_sglang_served.csv). For blocks of 4, which it lacks, the 8B's
# on six easy sets, 3.67, times what the two have of each other at 8 (6.6 and 6.36).
LINEAR_TOKENS = {4: 3.8, 8: 6.6, 16: 10.0, 32: 12.6}


@dataclass(frozen=True, slots=True)
class Round:
    """What a mode does for one sequence from seam to seam: `forwards` of `query_tokens` each, for `tokens`."""

    mode: ModeName
    block_length: int
    query_tokens: int
    forwards: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted tokens a second of one replica in a mode, with the block length that is best for the batch."""

    mode: ModeName
    batch: int
    block_length: int
    tokens_per_second: float


def rounds(model: ModelConfig, quadratic_block_length: int) -> list[Round]:
    """What the modes do, on text like that of public benchmarks; open chat commits about half of it.

    Sizes differ as their published tokens per forward do. Quadratic self-speculation with short blocks is unpublished:
    assumed to commit the same share of a linear round as with blocks of 32. Diffusion ends a canvas with one more pass.
    """
    published = nearest(model)
    linear = {b: tokens * published.linear / LARGE.linear for b, tokens in LINEAR_TOKENS.items()}
    short = quadratic_block_length
    share = published.quadratic / (2 * published.linear)
    canvas = model.block_length
    return [
        Round("ar", 1, 1, 1, 1),
        *(Round("linear_spec", block, block, 2, tokens) for block, tokens in linear.items()),
        Round("quadratic_spec", short, short * (short + 1), 1, linear[short] * share),
        Round("diffusion", canvas, canvas, canvas / published.diffusion + 1, canvas),
    ]


def step_seconds(
    model: ModelConfig, gpu: Gpu, ranks: int, sequences: float, query_tokens: float, context: float
) -> float:
    """Predicted seconds of a step. query_tokens: of all sequences together; context: cached tokens of each."""
    width = model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    attention = 2 * model.hidden_size * (width + kv_width)
    weights = model.vocab_size * model.hidden_size  # the head's; of the embedding only a few rows are read
    weights += model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)
    read = 2 * weights + 4 * model.num_layers * kv_width * sequences * context
    flops = query_tokens * (2 * weights + 4 * model.num_layers * width * context)
    seconds = model.num_layers * (LAYER + BATCHED * (sequences >= BATCHED_FROM))
    seconds += read / ranks / (BANDWIDTH_SHARE * gpu.bandwidth) + flops / ranks / (PEAK_SHARE * gpu.peak)
    if ranks > 1:
        exchanged = 2 * query_tokens * model.hidden_size * TABLE_NVLINK / gpu.nvlink
        seconds += 2 * model.num_layers * all_reduce_seconds(exchanged)
    return seconds


def all_reduce_seconds(size: float) -> float:
    """Of so many bytes: linear between the table's rows, flat before the first, steady after the last."""
    (low, seconds), *rest = ALL_REDUCE
    if size <= low:
        return seconds
    rate = 0.0
    for high, next_seconds in rest:
        rate = (next_seconds - seconds) / (high - low)
        if size <= high:
            break
        low, seconds = high, next_seconds
    return seconds + rate * (size - low)


def speed(
    model: ModelConfig, gpu: Gpu, ranks: int, config: EngineConfig, mode: ModeName, batch: int, context: float
) -> Speed:
    """The mode's best speed for `batch` sequences with `context` cached tokens each. Only decoding counts: no prefill,
    no scheduling, no text. What exceeds the engine's step is spread over several."""
    found = []
    for item in rounds(model, config.quadratic_block_length):
        if item.mode == mode:
            total = batch * item.query_tokens
            steps = -(-total // config.max_batch_tokens)
            seconds = steps * step_seconds(model, gpu, ranks, batch / steps, total / steps, context)
            found.append(
                Speed(mode, batch, item.block_length, batch * item.tokens / (item.forwards * seconds))
            )
    return max(found, key=lambda found: found.tokens_per_second)
