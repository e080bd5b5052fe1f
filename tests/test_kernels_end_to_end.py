"""The engine on the Triton kernels against the engine on torch: the same tokens in every mode, so that no kernel is
compiled that is never called. Steps are filled up to the sizes that a GPU captures as graphs."""

import random
from dataclasses import replace
from typing import Literal

import pytest
import torch

from engine.config import ModeChoice, SamplingParams
from engine.request import Request
from fakes import TOY, generate, random_prompt, toy_engine
from kernels.backend import implementation

MODES: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/test_gpu.py runs the same on the GPU"
)


def answers(
    side: Literal["torch", "triton"], requests: list[Request], exact: bool = False, lag: Literal[0, 1] = 0
) -> dict[str, list[int]]:
    with implementation(side):
        engine = toy_engine(
            2, dtype="float32", block_length=4, quadratic_block_length=2, exact=exact, lag=lag
        )
        return generate(engine, requests)


@pytest.mark.parametrize(("mode", "exact"), [*((mode, False) for mode in MODES), ("linear_spec", True)])
def test_ten_tokens_of_every_mode_through_the_kernels_equal_torch(mode: ModeChoice, exact: bool) -> None:
    prompt = random_prompt(random.Random(1), 11)
    sampling = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    request = Request("0", prompt, sampling, mode=mode)
    made = answers("triton", [request], exact=exact)
    assert len(made["0"]) == 10
    assert made == answers("torch", [request])


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_mixed_batch_through_the_kernels_equals_torch(lag: Literal[0, 1]) -> None:
    chance = random.Random(2)
    sampled = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, max_tokens=6, ignore_eos=True)
    requests = [
        Request(
            mode,
            random_prompt(chance, chance.randint(1, 30)),
            replace(sampled, seed=seed, temperature=0.9 * (mode != "diffusion")),
            mode=mode,
        )
        for seed, mode in enumerate(MODES)
    ]
    made = answers("triton", requests, lag=lag)
    assert all(len(answer) == 6 and TOY.mask_id not in answer for answer in made.values())
    assert made == answers("torch", requests, lag=lag)
