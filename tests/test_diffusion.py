"""Diffusion mode against the paper's loop written plainly, one sequence, no cache."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import oracle
from engine.config import DiffusionParams, ModeChoice, SamplingParams
from engine.request import Request
from fakes import TOY, generate, random_prompt, random_weights, toy_engine


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("block_length", "threshold", "steps"),
    [(4, 0.9, 0), (8, 0.3, 0), (8, 0.0, 0), (8, 1.0, 3), (8, 0.2, 2), (16, 0.5, 5), (4, 1.0, 1)],
)
def test_canvases_equal_the_plain_loop(block_length: int, threshold: float, steps: int, lag: int) -> None:
    seed = block_length + steps
    chance = random.Random(seed)
    diffusion = DiffusionParams(threshold, steps, block_length)
    sampling = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
    requests = [
        Request(str(i), random_prompt(chance, 5 + 4 * i), sampling, mode="diffusion", diffusion=diffusion)
        for i in range(2)
    ]
    engine = toy_engine(seed, lag=lag)
    for request in requests:
        engine.add(request)
    answers: dict[str, list[int]] = {"0": [], "1": []}
    forwards = {}
    while not engine.idle:
        for name, delta in engine.step().items():
            answers[name].extend(delta.token_ids)
            if delta.stats:
                forwards[name] = delta.stats.forwards
    weights = random_weights(TOY, seed, torch.float64)
    for request in requests:
        want, passes = oracle.diffuse(TOY, weights, list(request.prompt), 21, block_length, threshold, steps)
        assert answers[request.id] == want
        assert forwards[request.id] == passes


@pytest.mark.parametrize(
    "settings", [{"page_size": 1}, {"lag": 1}, {"max_batch_tokens": 98}, {"kv_tokens": 176}]
)
def test_a_canvas_does_not_depend_on_what_runs_beside_it(settings: dict[str, Any]) -> None:
    chance = random.Random(3)
    sampling = SamplingParams(temperature=0.9, seed=8, max_tokens=40)
    modes: tuple[ModeChoice, ...] = ("diffusion", "ar", "diffusion", "linear_spec", "quadratic_spec")
    requests = [
        Request(
            str(i),
            random_prompt(chance, 20),
            replace(sampling, seed=i),
            mode=mode,
            diffusion=DiffusionParams(0.6),
        )
        for i, mode in enumerate(modes)
    ]
    together = generate(toy_engine(6, **settings), requests)
    for request in requests:
        assert together[request.id] == generate(toy_engine(6), [request])[request.id]


def test_more_steps_refine_and_fewer_hurry() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=33, ignore_eos=True)
    passes = []
    for steps in (1, 4, 8):
        engine = toy_engine(2)
        engine.add(
            Request("a", (5, 6, 8), sampling, mode="diffusion", diffusion=DiffusionParams(1.0, steps, 16))
        )
        while not engine.idle:
            for delta in engine.step().values():
                if delta.stats:
                    passes.append((delta.stats.denoise_passes, delta.stats.canvases))
    assert passes == [(2, 2), (8, 2), (16, 2)]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("leave", range(8, 22))
def test_leaving_and_entering_diffusion_happens_at_seams_only(lag: int, leave: int) -> None:
    """AR's part of the text is AR's answer to what was committed before, and no canvas is dropped half-way."""
    sampling = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    engine = toy_engine(3, lag=lag, block_length=8)
    engine.add(Request("a", (5, 6, 8), sampling, mode="diffusion", diffusion=DiffusionParams(1.0, 0, 8)))
    answer: list[int] = []
    committed: list[int] = []
    stats = None
    for step in range(2000):
        if engine.idle:
            break
        if step == leave:
            engine.switch("a", "ar")
        if step == leave + 28:
            engine.switch("a", "diffusion")
        for delta in engine.step().values():
            committed.append(len(delta.token_ids))
            answer.extend(delta.token_ids)
            stats = delta.stats or stats
    assert stats is not None and stats.modes == ("diffusion", "ar")
    assert stats.denoise_passes == 7 * stats.canvases
    # the first token, canvases of 8, single tokens, and canvases again
    ar_from = committed.index(1, 1)
    canvas_from = next(i for i in range(ar_from, len(committed)) if committed[i] > 1)
    assert set(committed[1:ar_from]) <= {8} and canvas_from - ar_from >= 5
    start = sum(committed[:ar_from])
    weights = random_weights(TOY, 3, torch.float64)
    assert answer[start : start + 5] == oracle.greedy(TOY, weights, [5, 6, 8, *answer[:start]], 5)


def test_passes_counted_for_others_do_not_shorten_a_later_canvas() -> None:
    """Drafts that share their settling with a canvas leave the budget of steps of their own later canvases alone."""
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    diffusion = DiffusionParams(1.0, 4, 8)
    engine = toy_engine(3, block_length=8)
    engine.add(
        Request("other", (9, 9), replace(sampling, max_tokens=120), mode="diffusion", diffusion=diffusion)
    )
    engine.add(Request("a", (5, 6, 8), sampling, mode="linear_spec", diffusion=diffusion))
    stats = None
    for step in range(2000):
        if engine.idle:
            break
        if step == 8:
            engine.switch("a", "diffusion")
        delta = engine.step().get("a")
        stats = delta.stats if delta and delta.stats else stats
    assert stats is not None and stats.modes == ("linear_spec", "diffusion")
    assert stats.canvases > 0 and stats.denoise_passes == 4 * stats.canvases
