"""Lossless means equal tokens: whatever mode, batch, block, page, lag, chunk, preemption or resumption, the text is
AR's, greedy or sampled."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import BLOCK_LENGTHS, ModeChoice, SamplingParams
from engine.engine import Engine
from engine.request import Request
from fakes import (
    TOY,
    TOY_ENGINE,
    DrafterExecutor,
    ar_answer,
    generate,
    random_prompt,
    toy_engine,
    toy_model,
)

LOSSLESS: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "auto")

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 40),
    ignore_eos=st.booleans(),
)
engines = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 4, 16]),
        "lag": st.sampled_from([0, 1]),
        "block_length": st.sampled_from(BLOCK_LENGTHS),
        "quadratic_block_length": st.sampled_from([2, 4, 8]),
        "max_batch_tokens": st.sampled_from([98, 131, 300]),
        "max_running": st.sampled_from([1, 3, 8]),
        "kv_tokens": st.sampled_from([208, 256, 2048]),  # the smaller ones make sequences push each other out
        "draft_lora": st.booleans(),
        "prefix_cache": st.booleans(),
    }
)


def requests_of(chance: random.Random, params: list[SamplingParams]) -> list[Request]:
    """Requests whose prompts begin alike, some of them."""
    trunk = random_prompt(chance, 40)
    requests = []
    for i, sampling in enumerate(params):
        length = chance.randint(1, 40)
        shared = chance.randint(0, length)
        prompt = trunk[:shared] + random_prompt(chance, length - shared)
        salt = chance.choice(("", "", "other"))
        requests.append(Request(str(i), prompt, sampling, mode=chance.choice(LOSSLESS), cache_salt=salt))
    return requests


def drive(engine: Engine, requests: list[Request], before: Callable[[], None]) -> dict[str, list[int]]:
    """Runs requests to their ends, calling `before` ahead of each step; checks the pool all the way."""
    answers = {r.id: list(r.generated) for r in requests}
    for request in requests:
        engine.add(request)
    for _ in range(5000):
        if engine.idle:
            break
        before()
        for name, delta in engine.step().items():
            answers[name].extend(delta.token_ids)
        engine.scheduler.pool.check([s.pages for s in engine.scheduler.running])
    assert engine.idle, "the engine makes no progress"
    assert engine.scheduler.pool.free == engine.scheduler.pool.total
    return answers


def check_lossless(
    seed: int, params: list[SamplingParams], settings_: dict[str, Any], switches: bool
) -> None:
    """Asserts that a random mix of modes, switched at random if asked, says what AR alone says."""
    chance = random.Random(seed)
    requests = requests_of(chance, params)
    engine = toy_engine(seed % 7, **settings_)

    def switch() -> None:
        if switches and engine.sequences and chance.random() < 0.3:
            engine.switch(chance.choice(sorted(engine.sequences)), chance.choice(LOSSLESS))

    answers = drive(engine, requests, switch)
    for request in requests:
        assert answers[request.id] == ar_answer(seed % 7, request), request
    # what all have left behind serves whoever says the same again, and whoever goes on from there
    again = [replace(r, mode=chance.choice(LOSSLESS)) for r in requests]
    said = [(*r.prompt, *answers[r.id]) for r in requests]
    turns = [replace(r, id=f"then {r.id}", prompt=text) for r, text in zip(again, said, strict=True)]
    answers = drive(engine, [*again, *turns], switch)
    for request in (*requests, *turns):
        assert answers[request.id] == ar_answer(seed % 7, request), request


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(samplings, min_size=1, max_size=5), engines, st.booleans())
def test_every_lossless_mode_and_every_switch_gives_ars_tokens(
    seed: int, params: list[SamplingParams], settings_: dict[str, Any], switches: bool
) -> None:
    check_lossless(seed, params, settings_, switches)


@pytest.mark.long
@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10**6), st.lists(samplings, min_size=1, max_size=8), engines, st.booleans())
def test_every_lossless_mode_and_every_switch_gives_ars_tokens_at_length(
    seed: int, params: list[SamplingParams], settings_: dict[str, Any], switches: bool
) -> None:
    check_lossless(seed, params, settings_, switches)


@pytest.mark.parametrize("mode", ["linear_spec", "quadratic_spec"])
@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_single_precision_keeps_the_tokens_too(
    mode: ModeChoice, block_length: int, temperature: float
) -> None:
    chance = random.Random(block_length)
    sampling = SamplingParams(temperature=temperature, seed=11, max_tokens=40, ignore_eos=True)
    requests = [Request(str(i), random_prompt(chance, 12), sampling, mode=mode) for i in range(3)]
    plain = [replace(r, mode="ar") for r in requests]
    small = min(block_length, 8)
    made = generate(
        toy_engine(2, dtype="float32", block_length=block_length, quadratic_block_length=small), requests
    )
    assert made == generate(toy_engine(2, dtype="float32"), plain)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("drafter", ["right", "wrong", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_drafter_can_change_the_text(drafter: str, lag: Literal[0, 1], temperature: float) -> None:
    chance = random.Random(5)
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=48, ignore_eos=True)
    request = Request("0", random_prompt(chance, 9), sampling, mode="linear_spec")
    answer = ar_answer(4, replace(request, sampling=replace(sampling, max_tokens=100)))
    text = [*request.prompt, *answer]
    wrong = [(t + 1) % TOY.vocab_size for t in text]
    legal = [t for t in range(TOY.vocab_size) if t != TOY.mask_id]

    def draft(row: int, position: int) -> int:
        if drafter == "right":
            return text[position]
        return wrong[position] if drafter == "wrong" else chance.choice(legal)

    config = replace(TOY_ENGINE, lag=lag, block_length=8)
    engine = Engine(config, DrafterExecutor(toy_model(4, config), config, draft))
    made = generate(engine, [request])["0"]
    assert made == answer[:48]
    if drafter == "right":
        assert engine.steps <= 1 + 2 * 6 + 2 * lag  # prefill, then rounds of 8 tokens, one of them wasted
    if drafter == "wrong":
        assert engine.steps >= 1 + 2 * 47


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), samplings, engines, st.sampled_from(LOSSLESS), st.data())
def test_a_request_resumed_from_its_journal_ends_as_it_would_have(
    seed: int, sampling: SamplingParams, settings_: dict[str, Any], mode: ModeChoice, data: st.DataObject
) -> None:
    chance = random.Random(seed)
    request = Request("0", random_prompt(chance, chance.randint(1, 30)), sampling, mode=mode)
    answer = ar_answer(seed % 7, request)
    if len(answer) < 2:
        return
    known = data.draw(st.integers(1, len(answer) - 1))
    resumed = replace(request, generated=tuple(answer[:known]))
    assert generate(toy_engine(seed % 7, **settings_), [resumed])["0"] == answer


def test_the_modes_tell_apart_what_they_do() -> None:
    chance = random.Random(1)
    sampling = SamplingParams(temperature=0.7, max_tokens=30, ignore_eos=True)
    prompt = random_prompt(chance, 8)
    engine = toy_engine(2, block_length=8)
    forwards = {}
    for mode in ("ar", "linear_spec", "quadratic_spec"):
        engine.add(Request(mode, prompt, sampling, mode=mode))
    while not engine.idle:
        for name, delta in engine.step().items():
            if delta.stats:
                forwards[name] = delta.stats
    assert forwards["ar"].forwards == forwards["ar"].tokens == 29  # prefill brings the first token
    assert forwards["ar"].drafted == 0
    for mode in ("linear_spec", "quadratic_spec"):
        assert forwards[mode].modes == (mode,)
        assert 0 < forwards[mode].accepted < forwards[mode].drafted
