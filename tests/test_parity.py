"""The network beside transformers' Ministral3ForCausalLM, whose causal pass is NLD's; random weights, float32."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3RotaryEmbedding,
    get_llama_4_attn_scale,
)

from cluster.published import FOLDER
from engine.config import EngineConfig, ModelConfig, RopeConfig
from engine.executor import LocalExecutor
from engine.layers import inverse_frequencies, rope_table
from engine.request import Request
from engine.runner import load_model
from engine.segment import Pattern, Segment, Settle
from engine.sequence import Sequence
from engine.step import pack
from fakes import TOY, write_checkpoint
from kernels.attention import AttentionPlan
from kernels.expand import Expanded
from perf.bench_engine import GEOMETRY, HuggingFace

TOLERANCE = 3e-5  # of logits with a standard deviation of about one; 1.05e-5 was seen on one random geometry
WINDOWS = 6  # how many original windows the positions run through
PUBLISHED = sorted(FOLDER.glob("nld_*_config.json"))


def geometry(
    kv_heads: int, groups: int, head_dim: int, hidden: int, theta: float, window: int
) -> ModelConfig:
    return dataclasses.replace(
        TOY,
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=16 * window,
        rope=RopeConfig(theta, 16.0, window, 32.0, 1.0, 1.0, 0.1),
    )


def engine_logits(folder: Path, tokens: list[int], lengths: list[int]) -> Tensor:
    """Logits [sum of lengths, vocab] of causal segments of these lengths, one after the other in a paged cache."""
    config = EngineConfig(str(folder), page_size=16, kv_tokens=2048, max_batch_tokens=1024)
    runner = LocalExecutor(load_model(config), config).runner
    sequence = Sequence(Request("a", tuple(tokens)), "ar", TOY.eos_ids, 0)
    sequence.start(0, 0)
    hidden: list[Tensor] = []
    forward = runner.model.forward

    def watch(batch: Expanded, kv: Tensor, attention: AttentionPlan) -> Tensor:
        hidden.append(forward(batch, kv, attention))
        return hidden[-1]

    pages = [(0, column, column) for column in range(-(-len(tokens) // config.page_size))]
    with patch.object(runner.model, "forward", watch):
        for length in lengths:
            segment = Segment(sequence, None, length, Pattern.CAUSAL, Settle.KEEP, 0)
            runner.run([pack([segment], [] if hidden else [sequence], [] if hidden else pages)])
    return runner.model.head(torch.cat(hidden))


@settings(max_examples=10)
@given(
    kv_heads=st.sampled_from([1, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 16, 32]),
    hidden=st.sampled_from([24, 40, 64]),
    theta=st.sampled_from([1e6, 1e9]),
    window=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
)
@example(kv_heads=2, groups=4, head_dim=32, hidden=40, theta=1e6, window=64, seed=0)  # as 3B and 8B
@example(kv_heads=2, groups=4, head_dim=32, hidden=40, theta=1e9, window=64, seed=1)  # as 14B
@example(kv_heads=1, groups=1, head_dim=8, hidden=24, theta=1e9, window=16, seed=2)
def test_logits_equal_ministral3s_below_and_beyond_the_original_window(
    tmp_path_factory: pytest.TempPathFactory,
    kv_heads: int,
    groups: int,
    head_dim: int,
    hidden: int,
    theta: float,
    window: int,
    seed: int,
) -> None:
    folder, config = (
        tmp_path_factory.mktemp("parity"),
        geometry(kv_heads, groups, head_dim, hidden, theta, window),
    )
    write_checkpoint(folder, config, seed=3 * seed + 1)
    count = WINDOWS * window
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOY.mask_id + 1, config.vocab_size, (count + 1,), generator=draw).tolist()
    with torch.inference_mode():
        theirs = HuggingFace(folder, config).model(torch.tensor([tokens[:-1]])).logits[0]
    legal = [token for token in range(config.vocab_size) if token != config.mask_id]
    block = 32
    whole = engine_logits(folder, tokens, [count])[:, legal]
    verified = engine_logits(folder, tokens, [count - 2 * block - 5, 5, block, block])[:, legal]
    single = engine_logits(folder, tokens, [count - block] + [1] * block)[:, legal]
    assert theirs.std() > 0.3
    for ours in (whole, verified, single):
        torch.testing.assert_close(ours, theirs[:, legal], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(verified[-block:], single[-block:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_rotary_tables_are_ministral3s_up_to_its_rounding(path: Path) -> None:
    raw, config = json.loads(path.read_text()), ModelConfig.from_json(path)
    theirs = Ministral3RotaryEmbedding(Ministral3Config(**{key: raw[key] for key in GEOMETRY}))
    ours = inverse_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(theirs.inv_freq.double(), ours, rtol=3e-6, atol=0)
    positions = torch.tensor([0, 1, 777, 16383, 16384, 16385, 40000])
    cos, sin = (part[0].double() for part in theirs(torch.zeros(1, dtype=torch.float32), positions[None]))
    table = rope_table(config.rope, config.head_dim, 40001, torch.float64, torch.device("cpu"))
    sign = torch.ones(config.head_dim, dtype=torch.float64)
    sign[: config.head_dim // 2] = -1
    # Theirs rounds angles to float32, which at position p is p times its precision.
    allowed = 1e-6 + positions[:, None] * 3e-7
    assert bool(((table.cos[positions] - cos).abs() <= allowed).all())
    assert bool(((table.sin[positions] * sign - sin).abs() <= allowed).all())
    scale = get_llama_4_attn_scale(
        positions[None], config.rope.query_scaling_beta, config.rope.original_max_position
    )
    torch.testing.assert_close(table.scale[positions], scale[0, 0, :, 0].double(), rtol=1e-6, atol=0)
    assert table.scale[16383] == 1 and table.scale[16384] > 1


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 1.0), (1.0, 0.5), (0.707, 1.0)])
def test_the_factor_of_cosine_and_sine_is_ministral3s(mscale: float, all_dim: float) -> None:
    raw = json.loads(PUBLISHED[0].read_text())
    raw["rope_parameters"] |= {"mscale": mscale, "mscale_all_dim": all_dim}
    theirs = Ministral3RotaryEmbedding(Ministral3Config(**{key: raw[key] for key in GEOMETRY}))
    assert RopeConfig.from_dict(raw["rope_parameters"]).attention_factor == pytest.approx(
        theirs.attention_scaling
    )
