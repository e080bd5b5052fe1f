"""Pages that a text has filled serve every text that begins the same, in every mode, and change no token."""

import random
from dataclasses import replace
from typing import Any, Literal

import pytest

from engine.config import DiffusionParams, ModeChoice, SamplingParams
from engine.engine import Engine
from engine.request import DecodeStats, Delta, Request
from fakes import TOY, ar_answer, generate, random_prompt, run, toy_engine

ALL: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion")
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
PAGE = 4  # tokens, of the toy engine
SEED = 3


def served(engine: Engine, request: Request) -> tuple[list[int], DecodeStats, int]:
    """The request's answer, how it was decoded, and how many tokens were prefilled for it."""
    engine.add(request)
    sequence, answer, stats = engine.sequences[request.id], list(request.generated), None
    for delta in (report.get(request.id, Delta(())) for report in run(engine)):
        answer += delta.token_ids
        stats = delta.stats or stats
    assert stats is not None
    return answer, stats, sequence.prefilled - sequence.found


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", ALL)
def test_a_prompt_that_begins_like_another_prefills_the_rest_alone_and_says_the_same(
    mode: ModeChoice, lag: int
) -> None:
    chance = random.Random(1)
    prefix = random_prompt(chance, 21)
    engine = toy_engine(SEED, lag=lag, block_length=8)
    first = Request("first", prefix + random_prompt(chance, 6), GREEDY, mode=mode)
    second = Request("second", prefix + random_prompt(chance, 9), GREEDY, mode=mode)
    assert served(engine, first)[1].cached_tokens == 0
    answer, stats, prefilled = served(engine, second)
    assert (stats.cached_tokens, prefilled) == (20, 10)
    assert answer == generate(toy_engine(SEED, block_length=8, prefix_cache=False), [second])["second"]
    if mode != "diffusion":
        assert answer == ar_answer(SEED, second)


@pytest.mark.parametrize("length", range(1, 14))
def test_a_hit_leaves_at_least_one_token_to_prefill(length: int) -> None:
    engine = toy_engine(SEED)
    prompt = random_prompt(random.Random(2), length)
    request = Request("a", prompt, GREEDY, mode="ar")
    answers = [served(engine, request) for _ in range(2)]
    assert answers[0][0] == answers[1][0]
    assert answers[1][1].cached_tokens == (length - 1) // PAGE * PAGE
    assert 1 <= answers[1][2] <= PAGE


@pytest.mark.parametrize("known", range(1, 9))
@pytest.mark.parametrize("mode", ALL)
def test_a_resumed_answer_may_find_all_but_its_seed_token(mode: ModeChoice, known: int) -> None:
    engine = toy_engine(SEED, block_length=8)
    request = Request("a", random_prompt(random.Random(3), 8), GREEDY, mode=mode)
    whole, *_ = served(engine, request)
    if mode == "diffusion":  # whose canvases begin where the answer is resumed
        alone = toy_engine(SEED, block_length=8, prefix_cache=False)
        whole = generate(alone, [replace(request, generated=tuple(whole[:known]))])["a"]
    again, stats, prefilled = served(engine, replace(request, generated=tuple(whole[:known])))
    assert again == whole
    assert prefilled == (7 + known) % PAGE and stats.cached_tokens == min(8, (7 + known) // PAGE * PAGE)


@pytest.mark.parametrize("mode", ALL)
def test_different_salts_share_nothing(mode: ModeChoice) -> None:
    engine = toy_engine(SEED)
    prompt = random_prompt(random.Random(4), 30)
    cached = [
        served(engine, Request("a", prompt, GREEDY, mode=mode, cache_salt=salt))[1].cached_tokens
        for salt in ("", "one", "two", "one", "")
    ]
    assert cached == [0, 0, 0, 28, 28]


def test_other_tokens_find_nothing_after_the_first_that_differs() -> None:
    engine = toy_engine(SEED)
    prompt = random_prompt(random.Random(5), 32)
    served(engine, Request("a", prompt, GREEDY, mode="ar"))
    for place in (0, 3, 4, 17, 31):
        other = next(t for t in range(TOY.vocab_size) if t not in (prompt[place], TOY.mask_id))
        changed = Request("b", (*prompt[:place], other, *prompt[place + 1 :]), GREEDY, mode="ar")
        answer, stats, _ = served(engine, changed)
        assert stats.cached_tokens == min(place // PAGE * PAGE, 28)
        assert answer == ar_answer(SEED, changed)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("then", ALL)
@pytest.mark.parametrize("mode", ALL)
def test_an_answer_is_there_for_the_next_turn_of_its_conversation(
    mode: ModeChoice, then: ModeChoice, lag: int
) -> None:
    chance = random.Random(6)
    engine = toy_engine(SEED, lag=lag, block_length=8)
    sampling = replace(GREEDY, temperature=0.8, seed=9)
    prompt = random_prompt(chance, 10)
    answer, *_ = served(engine, Request("a", prompt, sampling, mode=mode))
    turn = Request("b", (*prompt, *answer, *random_prompt(chance, 5)), sampling, mode=then)
    said, stats, _ = served(engine, turn)
    assert stats.cached_tokens == 28  # all but the last token of the answer, in whole pages
    assert said == generate(toy_engine(SEED, block_length=8, prefix_cache=False), [turn])["b"]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("after", range(1, 12))
def test_an_abort_leaves_no_page_that_is_not_final(mode: ModeChoice, after: int, lag: int) -> None:
    """What the cache kept of a text cut in the middle of a canvas or of drafts gives AR's tokens."""
    engine = toy_engine(SEED, lag=lag, block_length=16, quadratic_block_length=8)
    diffusion = DiffusionParams(threshold=1.0, steps=4)
    prompt = random_prompt(random.Random(7), 9)
    engine.add(Request("a", prompt, replace(GREEDY, max_tokens=60), mode=mode, diffusion=diffusion))
    answer: list[int] = []
    for _ in range(after):
        answer += engine.step().get("a", Delta(())).token_ids
    engine.abort("a")
    run(engine)
    committed = len(prompt) + len(answer)
    # beyond what was committed stands what AR would have said, so that a page kept too early would be found
    text = (*prompt, *answer)
    text += tuple(ar_answer(SEED, Request("x", text, replace(GREEDY, max_tokens=24))))
    request = Request("b", text, GREEDY, mode="ar")
    said, stats, _ = served(engine, request)
    assert said == ar_answer(SEED, request)
    assert stats.cached_tokens <= committed


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("sizes", [{"page_size": 1}, {"page_size": 16}, {"max_batch_tokens": 98}])
def test_sequences_that_share_pages_at_the_same_time_do_not_disturb_each_other(
    lag: Literal[0, 1], sizes: dict[str, Any]
) -> None:
    chance = random.Random(8)
    prefix = random_prompt(chance, 50)
    requests = [
        Request(str(i), prefix[: 50 - 3 * i] + random_prompt(chance, i), GREEDY, mode=mode)
        for i, mode in enumerate((*ALL, *ALL))
    ]
    engine = toy_engine(SEED, lag=lag, kv_tokens=320, max_running=3, **sizes)
    answers = generate(engine, requests)
    for request in requests:
        assert answers[request.id] == generate(toy_engine(SEED), [request])[request.id]
    pool = engine.scheduler.pool
    assert pool.free == pool.total and pool.asked_tokens >= pool.hit_tokens > 0


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    chance = random.Random(9)
    requests = [
        Request(str(i), random_prompt(chance, 60), replace(GREEDY, max_tokens=60), mode="ar")
        for i in range(3)
    ]
    answers, hits = {}, {}
    for cache in (False, True):
        engine = toy_engine(SEED, kv_tokens=300, prefix_cache=cache)
        answers[cache] = generate(engine, requests)
        hits[cache] = engine.scheduler.pool.hit_tokens
    assert answers[True] == answers[False]
    assert hits[False] == 0 < hits[True]  # the prompts share nothing with each other


@pytest.mark.parametrize("mode", ALL)
def test_without_the_cache_nothing_is_found(mode: ModeChoice) -> None:
    engine = toy_engine(SEED, prefix_cache=False)
    request = Request("a", random_prompt(random.Random(10), 30), GREEDY, mode=mode)
    assert [served(engine, request)[1].cached_tokens for _ in range(2)] == [0, 0]
