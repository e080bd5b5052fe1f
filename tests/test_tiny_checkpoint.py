"""The bundled checkpoint through the real engine: a language model on which drafts are often right."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig, ModeChoice, SamplingParams
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.model import Model
from engine.request import DecodeStats, Request
from engine.runner import load_model
from engine.tiny import network
from engine.tiny.tasks import evaluation_tasks
from engine.tokenizer import Tokenizer
from fakes import run
from kernels.attention import AttentionPlan
from kernels.expand import Expanded

CONFIG = EngineConfig(block_length=16)
GREEDY = SamplingParams(temperature=0, max_tokens=160)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(CONFIG)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = Tokenizer(CONFIG.checkpoint)
    return [tuple(tokenizer.encode_chat(task.prompt)) for task in evaluation_tasks(12, seed=1)]


def answers(
    model: Model,
    prompts: list[tuple[int, ...]],
    mode: ModeChoice,
    sampling: SamplingParams,
    config: EngineConfig,
) -> tuple[list[list[int]], list[DecodeStats]]:
    engine = Engine(config, LocalExecutor(model, config))
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, replace(sampling, seed=i), mode=mode))
    tokens: list[list[int]] = [[] for _ in prompts]
    stats: list[DecodeStats] = []
    for report in run(engine):
        for name, delta in report.items():
            tokens[int(name)].extend(delta.token_ids)
            stats += [delta.stats] if delta.stats else []
    return tokens, stats


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_lossless_mode_says_what_ar_says(
    model: Model, prompts: list[tuple[int, ...]], temperature: float
) -> None:
    sampling = replace(GREEDY, temperature=temperature)
    plain, _ = answers(model, prompts, "ar", sampling, CONFIG)
    for mode in ("linear_spec", "quadratic_spec", "auto"):
        for config in (CONFIG, replace(CONFIG, lag=1, draft_lora=False, max_batch_tokens=128)):
            made, stats = answers(model, prompts, mode, sampling, config)
            assert made == plain
            assert sum(s.tokens for s in stats) > 1.3 * sum(s.forwards for s in stats)


def test_a_draft_with_the_adapter_is_another_draft_and_the_text_the_same(
    model: Model, prompts: list[tuple[int, ...]]
) -> None:
    counts = []
    for lora in (True, False):
        made, stats = answers(model, prompts, "linear_spec", GREEDY, replace(CONFIG, draft_lora=lora))
        counts.append((made, sum(s.accepted for s in stats)))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] != counts[1][1]


def test_diffusion_commits_several_tokens_a_forward(model: Model, prompts: list[tuple[int, ...]]) -> None:
    _, stats = answers(model, prompts, "diffusion", GREEDY, CONFIG)
    assert sum(s.tokens for s in stats) > 1.5 * sum(s.forwards for s in stats)
    assert all(s.forwards == s.denoise_passes + s.canvases for s in stats)


def test_the_engines_logits_are_those_of_the_network_that_was_trained(
    model: Model, prompts: list[tuple[int, ...]]
) -> None:
    trained, _ = network.load(Path(CONFIG.checkpoint))
    prompt = max(prompts, key=len)
    assert len(prompt) > 60
    seen: list[Tensor] = []
    forward = model.forward

    def watch(batch: Expanded, kv: Tensor, attention: AttentionPlan) -> Tensor:
        seen.append(forward(batch, kv, attention))
        return seen[-1]

    config = replace(CONFIG, max_batch_tokens=4096)
    engine = Engine(config, LocalExecutor(model, config))
    engine.add(
        Request("a", prompt * 4, SamplingParams(temperature=0, max_tokens=1))
    )  # beyond the original window
    with patch.object(model, "forward", watch):
        engine.step()
    got = model.head(seen[0])
    ids = torch.tensor([prompt * 4])
    count = ids.shape[1]
    with torch.no_grad():
        want = trained(ids, torch.arange(count)[None], torch.ones(1, count, count).tril().bool())[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
