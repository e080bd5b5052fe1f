"""Draft and verify stages in one process: drafts and canvases drawn by a drafter give the text of an engine that draws
them itself, whatever the drafter does wrong."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.asking import MISSES, OFF_SECONDS
from engine.config import DiffusionParams, ModeChoice, SamplingParams, Sizes
from engine.drafter import Drafter
from engine.drafts import Answer, Ask, Verdict, Wanted
from engine.engine import Engine
from engine.request import DecodeStats, Request
from fakes import (
    TOY,
    DrafterBeside,
    ar_answer,
    check_drafter_is_empty,
    generate,
    random_prompt,
    run,
    staged_engine,
    toy_drafter,
    toy_engine,
)

STAGED: tuple[ModeChoice, ...] = ("linear_spec", "diffusion")
ALL: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion", "auto")
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def some_requests(seed: int, count: int, modes: Sequence[ModeChoice], longest: int = 40) -> list[Request]:
    chance = random.Random(seed)
    return [
        Request(
            str(index),
            random_prompt(chance, chance.randint(1, longest)),
            SamplingParams(
                temperature=chance.choice([0.0, 0.8]),
                top_k=chance.choice([0, 9]),
                seed=index,
                max_tokens=chance.randint(1, 40),
            ),
            mode=chance.choice(modes),
            diffusion=DiffusionParams(
                chance.choice([0.3, 0.9]), chance.choice([0, 3]), chance.choice([0, 4, 8])
            ),
        )
        for index in range(count)
    ]


def stats_of(engine: Engine, request: Request) -> DecodeStats:
    engine.add(request)
    [stats] = [delta.stats for report in run(engine) for delta in report.values() if delta.stats]
    return stats


drafters = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([1, 4, 16]),
        "max_batch_tokens": st.sampled_from([98, 300]),
        "max_running": st.sampled_from([1, 3, 8]),
        "kv_tokens": st.sampled_from([208, 2048]),  # the smaller ones make sequences push each other out
    }
)
verifiers = st.tuples(drafters, st.sampled_from([0, 1]), st.sampled_from([8, 32])).map(
    lambda drawn: {**drawn[0], "lag": drawn[1], "block_length": drawn[2]}
)


def check_staged(seed: int, verifier: dict[str, Any], drafter: dict[str, Any], mode: ModeChoice) -> None:
    requests = some_requests(seed, 5, [mode])
    blocks = {"block_length": verifier["block_length"]}
    source = DrafterBeside(toy_drafter(seed % 7, **drafter, **blocks))
    engine = staged_engine(source, seed % 7, **verifier)
    made = generate(engine, requests)
    assert made == generate(toy_engine(seed % 7, **blocks), requests)
    check_drafter_is_empty(source.drafter)
    for executor in (engine.executor, source.drafter.executor):
        executor.close()


@settings(max_examples=8)
@given(st.integers(0, 10**6), verifiers, drafters, st.sampled_from(STAGED))
def test_staged_tokens_equal_colocated_ones(
    seed: int, verifier: dict[str, Any], drafter: dict[str, Any], mode: ModeChoice
) -> None:
    check_staged(seed, verifier, drafter, mode)


@pytest.mark.long
@settings(max_examples=300)
@given(st.integers(0, 10**6), verifiers, drafters, st.sampled_from(STAGED))
def test_staged_tokens_equal_colocated_ones_at_length(
    seed: int, verifier: dict[str, Any], drafter: dict[str, Any], mode: ModeChoice
) -> None:
    check_staged(seed, verifier, drafter, mode)


@pytest.mark.parametrize(("engine_ranks", "drafter_ranks"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("mode", STAGED)
def test_engine_and_drafter_may_have_ranks_of_their_own(
    mode: ModeChoice, engine_ranks: int, drafter_ranks: int
) -> None:
    verifier = {"tensor_parallel": engine_ranks, "block_length": 8}
    check_staged(3, verifier, {"tensor_parallel": drafter_ranks}, mode)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("block_length", [4, 8, 16, 32])
@pytest.mark.parametrize("mode", STAGED)
def test_staged_tokens_equal_colocated_ones_in_single_precision(
    mode: ModeChoice, block_length: int, lag: Literal[0, 1]
) -> None:
    sizes: dict[str, Any] = {"dtype": "float32", "block_length": block_length, "lag": lag}
    requests = [replace(r, diffusion=DiffusionParams(0.5)) for r in some_requests(block_length, 4, [mode])]
    source = DrafterBeside(toy_drafter(2, **sizes))
    engine = staged_engine(source, 2, **sizes)
    assert generate(engine, requests) == generate(toy_engine(2, **sizes), requests)
    assert engine.asking is not None and engine.asking.answered > 0 == engine.asking.missed


@pytest.mark.parametrize("lag", [0, 1])
def test_all_modes_beside_each_other_and_switched_meanwhile_keep_their_tokens(lag: Literal[0, 1]) -> None:
    for seed in range(2):
        chance = random.Random(seed)
        lossless = [mode for mode in ALL if mode != "diffusion"]
        requests = some_requests(seed, 6, lossless)
        source = DrafterBeside(toy_drafter(seed, block_length=8))
        engine = staged_engine(source, seed, block_length=8, lag=lag)
        for request in requests:
            engine.add(request)
        answers: dict[str, list[int]] = {request.id: [] for request in requests}
        while not engine.idle:
            for name, delta in engine.step().items():
                answers[name] += delta.token_ids
            if engine.sequences and chance.random() < 0.3:
                engine.switch(chance.choice(list(engine.sequences)), chance.choice(lossless))
        for request in requests:
            assert answers[request.id] == ar_answer(seed, request)
        check_drafter_is_empty(source.drafter)


@pytest.mark.parametrize("mode", STAGED)
def test_statistics_mean_the_same_wherever_drafts_are_drawn(mode: ModeChoice) -> None:
    request = Request("a", (5, 6, 8), GREEDY, mode=mode, diffusion=DiffusionParams(0.5))
    there = stats_of(staged_engine(DrafterBeside(toy_drafter(2, block_length=8)), 2, block_length=8), request)
    here = stats_of(toy_engine(2, block_length=8), request)
    assert (there.drafted, there.accepted, there.denoise_passes, there.canvases, there.modes) == (
        here.drafted, here.accepted, here.denoise_passes, here.canvases, here.modes
    )  # fmt: skip
    rounds = there.canvases if mode == "diffusion" else there.forwards
    assert there.drafted_elsewhere == rounds > 0 == here.drafted_elsewhere
    assert there.forwards == rounds < here.forwards


def test_ar_and_quadratic_ask_nobody() -> None:
    source = DrafterBeside(toy_drafter(1))
    requests = some_requests(3, 4, ["ar", "quadratic_spec"])
    engine = staged_engine(source, 1)
    assert generate(engine, requests) == generate(toy_engine(1), requests)
    assert engine.asking is not None and engine.asking.answered == engine.asking.missed == 0
    assert source.drafter.steps == 0


def test_an_abort_frees_what_the_drafter_holds() -> None:
    source = DrafterBeside(toy_drafter(1, block_length=8))
    engine = staged_engine(source, 1, block_length=8)
    requests = [Request(str(i), (5, 8 + i), GREEDY, mode=mode) for i, mode in enumerate(STAGED * 2)]
    for request in requests:
        engine.add(request)
    for step in range(12):
        engine.step()
        if step == 2:
            engine.abort("0")
        if step == 6:
            engine.abort("1")
    assert source.drafter.status().followed == len(engine.sequences) == 2
    run(engine)
    check_drafter_is_empty(source.drafter)


@pytest.mark.parametrize("mode", STAGED)
def test_a_request_resumed_from_its_journal_goes_on_staged(mode: ModeChoice) -> None:
    request = Request("a", (5, 6, 8), GREEDY, mode=mode, diffusion=DiffusionParams(0.5, block_length=8))
    answer = generate(toy_engine(2, block_length=8), [request])["a"]
    resumed = replace(request, generated=tuple(answer[:17]))  # a seam of its canvases too
    source = DrafterBeside(toy_drafter(2, block_length=8))
    assert generate(staged_engine(source, 2, block_length=8), [resumed])["a"] == answer


# --- drafters that fail --------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Faulty(DrafterBeside):
    """Lets `fault` make of every answer what it likes."""

    def __init__(self, drafter: Drafter, fault: Callable[[Answer], list[Answer]], clock: Clock) -> None:
        super().__init__(drafter)
        self.fault, self.clock = fault, clock

    def poll(self) -> list[Answer]:
        return [made for answer in super().poll() for made in self.fault(answer)]

    def wait(self, seconds: float) -> None:
        assert seconds >= 0
        self.clock.now += seconds + 1e-6


def faulty_engine(
    fault: Callable[[Answer], list[Answer]], seed: int = 1, patience: float = 0.01, **settings: Any
) -> tuple[Engine, Faulty]:
    clock = Clock()
    source = Faulty(toy_drafter(seed, block_length=8), fault, clock)
    engine = staged_engine(source, seed, patience, block_length=8, **settings)
    assert engine.asking is not None
    engine.asking.clock = clock
    return engine, source


def check_same_text(engine: Engine, seed: int = 1, modes: Sequence[ModeChoice] = STAGED) -> None:
    requests = some_requests(11, 4, modes)
    assert generate(engine, requests) == generate(toy_engine(seed, block_length=8), requests)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_dead_drafter_costs_no_token(lag: Literal[0, 1]) -> None:
    engine, source = faulty_engine(lambda answer: [], lag=lag)
    check_same_text(engine)
    assert engine.asking is not None and engine.asking.answered == 0 < engine.asking.missed
    assert engine.asking.missed <= MISSES * 4  # after so many a sequence asks no more


@pytest.mark.parametrize("lag", [0, 1])
def test_a_drafter_that_dies_half_way_costs_no_token(lag: Literal[0, 1]) -> None:
    left = 7

    def dies(answer: Answer) -> list[Answer]:
        nonlocal left
        left -= 1
        return [answer] if left > 0 else []

    engine, _ = faulty_engine(dies, lag=lag)
    check_same_text(engine)
    assert engine.asking is not None and engine.asking.answered == 6 and engine.asking.missed > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_late_reordered_and_doubled_answers_are_no_answers_to_another_ask(lag: Literal[0, 1]) -> None:
    chance, kept = random.Random(1), list[Answer]()

    def mixes(answer: Answer) -> list[Answer]:
        kept.append(answer)
        chance.shuffle(kept)
        return [kept.pop() if chance.random() < 0.5 else chance.choice(kept) for _ in range(2) if kept]

    engine, _ = faulty_engine(mixes, lag=lag)
    check_same_text(engine)


@settings(max_examples=4)
@given(st.integers(0, 10**6))
def test_wrong_drafts_cost_acceptance_and_never_text(seed: int) -> None:
    chance = random.Random(seed)

    def lies(answer: Answer) -> list[Answer]:
        tokens = tuple(chance.randint(8, TOY.vocab_size - 1) for _ in answer.tokens)
        return [replace(answer, tokens=tokens)]

    engine, source = faulty_engine(lies)
    check_same_text(engine, modes=["linear_spec"])
    assert engine.asking is not None and engine.asking.missed == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tokens: tokens[:-1],
        lambda tokens: (TOY.mask_id, *tokens[1:]),
        lambda tokens: (*tokens[:-1], TOY.vocab_size),
        lambda tokens: (),
    ],
)
def test_an_answer_that_cannot_be_one_is_refused(spoil: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    engine, _ = faulty_engine(lambda answer: [replace(answer, tokens=spoil(answer.tokens))])
    check_same_text(engine)
    assert engine.asking is not None and engine.asking.answered == 0 < engine.asking.missed


@pytest.mark.parametrize("misses", [1, MISSES])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", STAGED)
def test_a_sequence_asks_again_after_misses(mode: ModeChoice, lag: Literal[0, 1], misses: int) -> None:
    dead = True
    engine, source = faulty_engine(lambda answer: [] if dead else [answer], patience=1.0, lag=lag)
    request = Request("a", (5, 6, 8), replace(GREEDY, max_tokens=150), mode=mode)
    engine.add(request)
    assert engine.asking is not None
    while engine.asking.missed < misses:
        engine.step()
    for _ in range(3):
        engine.step()
    assert not engine.idle and engine.asking.missed == misses
    dead = False
    source.clock.now += OFF_SECONDS
    run(engine)
    assert engine.asking.missed <= misses + 1 and engine.asking.answered > 2


def test_a_drafter_that_forgot_a_sequence_asks_for_its_tokens() -> None:
    sent: list[int] = []

    class Forgetful(DrafterBeside):
        def send(self, asks: Sequence[Ask], dropped: Sequence[int]) -> None:
            if len(sent) % 3 == 2:
                for ask in asks:
                    self.drafter.drop(self.peer, ask.key)
            sent.extend(len(ask.tokens) for ask in asks)
            super().send(asks, dropped)

    source = Forgetful(toy_drafter(1, block_length=8))
    engine = staged_engine(source, 1, block_length=8)
    request = Request("a", random_prompt(random.Random(1), 30), GREEDY, mode="linear_spec")
    assert generate(engine, [request])["a"] == ar_answer(1, request)
    assert engine.asking is not None and engine.asking.missed == 0
    assert sum(length > 30 for length in sent) > 2 and sum(length <= 8 for length in sent) > 2


def test_drafters_that_take_turns_forget_and_catch_up() -> None:
    """As when a sequence's drafter is exchanged: the next one knows nothing of it, or something old."""
    drafters = [toy_drafter(1, block_length=8) for _ in range(3)]
    chance = random.Random(2)

    class Changing(DrafterBeside):
        def send(self, asks: Sequence[Ask], dropped: Sequence[int]) -> None:
            self.drafter = chance.choice(drafters)
            super().send(asks, dropped)
            if dropped:
                for drafter in drafters:
                    for key in dropped:
                        drafter.drop(b"", key)

        def poll(self) -> list[Answer]:
            return [answer for drafter in drafters for _, answer in drafter.step()]

    engine = staged_engine(Changing(drafters[0]), 1, block_length=8)
    check_same_text(engine)
    for drafter in drafters:
        check_drafter_is_empty(drafter)


# --- the drafter alone ---------------------------------------------------------------------------------------------


def ask(key: int, text: Sequence[int], block: int = 8, number: int = 0, known: int = 0) -> Ask:
    return Ask(key, number, len(text), tuple(text[known:]), Wanted(block), GREEDY)


def drawn(drafter: Drafter) -> list[Answer]:
    answers = []
    while not drafter.idle:
        answers += [answer for _, answer in drafter.step()]
    return answers


def test_a_drafter_forgets_whom_nobody_asked_about_longest() -> None:
    drafter = toy_drafter(1, block_length=8, kv_tokens=160, max_running=8)
    chance = random.Random(1)
    texts = [random_prompt(chance, 40) for _ in range(4)]
    for key in (0, 1, 2):
        drafter.add(b"", ask(key, texts[key]))
        assert [answer.verdict for answer in drawn(drafter)] == [Verdict.DRAWN]
    drafter.add(b"", ask(0, [*texts[0], 9], known=40))
    assert [answer.verdict for answer in drawn(drafter)] == [Verdict.DRAWN]
    drafter.add(b"", ask(3, texts[3]))
    assert [answer.verdict for answer in drawn(drafter)] == [Verdict.DRAWN]
    drafter.add(b"", ask(1, [*texts[1], 9], known=40))
    drafter.add(b"", ask(0, [*texts[0], 9, 9], known=41))
    verdicts = {answer.key: answer.verdict for answer in drawn(drafter)}
    assert verdicts == {0: Verdict.DRAWN, 1: Verdict.FORGOTTEN}


@pytest.mark.parametrize("block", [4, 8, 32])
def test_a_text_near_the_longest_gets_its_drafts_and_a_longer_one_is_declined(block: int) -> None:
    drafter = toy_drafter(1, block_length=32, kv_tokens=240, max_running=1)
    sizes = Sizes.of(drafter.config, TOY)
    for beyond in range(-2, sizes.slack):
        text = random_prompt(random.Random(1), sizes.max_model_len + beyond)
        drafter.add(b"", ask(1, text, block=block))
        verdict = Verdict.DRAWN if beyond <= 0 else Verdict.DECLINED
        assert [answer.verdict for answer in drawn(drafter)] == [verdict]


def test_a_drafter_without_room_declines_and_goes_on() -> None:
    drafter = toy_drafter(1, block_length=8, kv_tokens=160)
    chance = random.Random(1)
    for key in range(5):
        drafter.add(b"", ask(key, random_prompt(chance, 40)))
    verdicts = [answer.verdict for answer in drawn(drafter)]
    assert sorted(verdicts) == [Verdict.DRAWN] * 3 + [Verdict.DECLINED] * 2
    for key in range(5):
        drafter.drop(b"", key)
    check_drafter_is_empty(drafter)


@pytest.mark.parametrize(
    "bad",
    [
        Ask(1, 0, 2, (5, TOY.mask_id), Wanted(8), GREEDY),
        Ask(1, 0, 2, (5, TOY.vocab_size), Wanted(8), GREEDY),
        Ask(1, 0, 2, (5, 6), Wanted(32), GREEDY),
        Ask(1, 0, 2, (5, 6), Wanted(1), GREEDY),
        Ask(1, 0, 0, (), Wanted(8), GREEDY),
        Ask(1, 0, 10**6, (5,) * 10**6, Wanted(8), GREEDY),
    ],
)
def test_what_a_drafter_cannot_draw_it_declines(bad: Ask) -> None:
    drafter = toy_drafter(1, block_length=8)
    drafter.add(b"", bad)
    assert [answer.verdict for answer in drawn(drafter)] == [Verdict.DECLINED]
    check_drafter_is_empty(drafter)


def test_two_engines_may_give_their_sequences_the_same_key() -> None:
    drafter = toy_drafter(1, block_length=8)
    for peer, text in ((b"one", [5, 6, 8]), (b"two", [9, 9])):
        drafter.add(peer, ask(1, text))
    drawn(drafter)
    drafter.add(b"one", ask(1, [5, 6, 8, 10], known=3))
    drafter.drop(b"two", 1)
    assert [answer.verdict for answer in drawn(drafter)] == [Verdict.DRAWN]
    drafter.drop(b"one", 1)
    check_drafter_is_empty(drafter)


def test_a_short_ask_does_not_wait_for_a_long_one() -> None:
    drafter = toy_drafter(1, block_length=8, max_batch_tokens=98)
    chance = random.Random(1)
    drafter.add(b"", ask(1, random_prompt(chance, 230)))
    drafter.add(b"", ask(2, [5, 6, 8]))
    assert [answer.key for _, answer in drafter.step()] == [2]
    assert [answer.key for answer in drawn(drafter)] == [1]
