"""Ranks that share a model say what one rank says that holds it all."""

import random
from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import tp
from engine.config import DiffusionParams, EngineConfig, ModeChoice, ModelConfig, SamplingParams
from engine.device import kv_tokens
from engine.request import Request
from engine.runner import load_model
from fakes import TOY, TOY_ENGINE, WIDE, generate, random_prompt, thread_groups, toy_engine, toy_model
from kernels.backend import implementation
from test_exactness import engines, samplings

MODES: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion")
GEOMETRY: dict[int, ModelConfig] = {2: TOY, 4: WIDE}


def requests_of(chance: random.Random, params: list[SamplingParams]) -> list[Request]:
    diffusion = DiffusionParams(threshold=0.3, steps=3, block_length=4)
    return [
        Request(
            str(i),
            random_prompt(chance, chance.randint(1, 30)),
            p,
            mode=chance.choice(MODES),
            diffusion=diffusion,
        )
        for i, p in enumerate(params)
    ]


def check(
    ranks: int, seed: int, params: list[SamplingParams], adapter: bool, settings_: dict[str, Any]
) -> None:
    requests = requests_of(random.Random(seed), params)
    geometry = GEOMETRY[ranks]
    alone = generate(toy_engine(seed % 7, adapter, geometry, **settings_), requests)
    engine = toy_engine(seed % 7, adapter, geometry, tensor_parallel=ranks, **settings_)
    try:
        assert generate(engine, requests) == alone
    finally:
        engine.executor.close()


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([2, 4]),
    st.integers(0, 10**6),
    st.lists(samplings, min_size=1, max_size=4),
    st.booleans(),
    engines,
)
def test_ranks_together_say_what_one_says_alone(
    ranks: int, seed: int, params: list[SamplingParams], adapter: bool, settings_: dict[str, Any]
) -> None:
    check(ranks, seed, params, adapter, settings_)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([2, 4]),
    st.integers(0, 10**6),
    st.lists(samplings, min_size=1, max_size=6),
    st.booleans(),
    engines,
)
def test_ranks_together_say_what_one_says_alone_at_length(
    ranks: int, seed: int, params: list[SamplingParams], adapter: bool, settings_: dict[str, Any]
) -> None:
    check(ranks, seed, params, adapter, settings_)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("lag", [0, 1])
def test_single_precision_keeps_the_tokens_too(ranks: int, lag: Literal[0, 1]) -> None:
    plain = SamplingParams(temperature=0.8, seed=5, max_tokens=24, ignore_eos=True)
    params = [
        replace(plain, temperature=0.0),
        plain,
        replace(plain, top_k=5),
        replace(plain, top_p=0.8, min_p=0.1),
    ]
    check(ranks, 2, params, True, {"dtype": "float32", "lag": lag, "block_length": 8})


@pytest.mark.parametrize("top_k", [0, pytest.param(8, marks=pytest.mark.long)])
def test_ranks_through_the_kernels_say_what_one_says_in_torch(top_k: int) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=top_k, seed=4, max_tokens=3, ignore_eos=True)
    request = Request("0", random_prompt(random.Random(3), 3), sampling, mode="linear_spec")
    small: dict[str, Any] = {"dtype": "float32", "block_length": 4, "quadratic_block_length": 2}
    alone = generate(toy_engine(2, **small), [request])
    with implementation("triton"):
        engine = toy_engine(2, tensor_parallel=2, **small)
        assert generate(engine, [request]) == alone
        engine.executor.close()


def test_ranks_share_the_cache_and_the_memory_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    gpu = EngineConfig(device="cuda", dtype="bfloat16", page_size=64, kv_tokens=0, max_running=4)
    alone, four = kv_tokens(gpu, WIDE), kv_tokens(replace(gpu, tensor_parallel=4), WIDE)
    assert 3.99 < four / alone < 4.01
    model = toy_model(1, TOY_ENGINE, group=thread_groups(2)[1])
    assert model.share.num_kv_heads == 1 and model.vocab_start == 20


def test_a_rank_by_itself_does_not_pretend_to_be_two() -> None:
    with pytest.raises(ValueError, match="tensor_parallel: 2 needs as many ranks, and not 1"):
        load_model(EngineConfig(tensor_parallel=2))


class Process:
    """Stands for the process group of the last of three ranks."""

    group_name = "made up"

    def rank(self) -> int:
        return 2

    def size(self) -> int:
        return 3


def test_exact_sums_are_made_in_rank_order_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # in bfloat16 each of the small parts would be lost beside the large one, and the large ones cancel
    first, second = torch.tensor([[256.0, 1e30]]).bfloat16(), torch.tensor([[0.75, 1.0]]).bfloat16()
    own = torch.tensor([[0.75, -1e30]]).bfloat16()

    def gathered(parts: torch.Tensor, x: torch.Tensor, group: object) -> None:
        parts.copy_(torch.cat((first, second, x)))

    monkeypatch.setattr(tp, "_all_gather", gathered)
    group = tp.Distributed(cast(Any, Process()), torch.bfloat16, torch.device("cpu"), exact=True)
    assert group.sum(own).tolist() == [[258.0, 0.0]]
    assert group.gather(own).tolist() == [[*first[0].tolist(), *second[0].tolist(), *own[0].tolist()]]
