"""The engine's promises to whoever calls it: limits, aborts, ends, refusals, progress when memory is short."""

import random
from dataclasses import replace
from typing import Any

import pytest

from engine.config import DiffusionParams, ModeChoice, SamplingParams
from engine.request import Request, Slo
from engine.step import pack
from fakes import TOY, ar_answer, generate, random_prompt, run, toy_engine

ALL: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion")
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("lag", [0, 1])
def test_an_answer_ends_at_its_length_limit(mode: ModeChoice, lag: int) -> None:
    for length in (1, 2, 7, 20):
        engine = toy_engine(lag=lag, block_length=8)
        answer = generate(engine, [Request("a", (5, 6), replace(GREEDY, max_tokens=length), mode=mode)])["a"]
        assert len(answer) == length


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("lag", [0, 1])
def test_an_answer_ends_with_its_stop_token_and_says_so(mode: ModeChoice, lag: int) -> None:
    whole = generate(toy_engine(), [Request("a", (5, 6), GREEDY, mode=mode)])["a"]
    stop = whole[9]
    engine = toy_engine(lag=lag)
    engine.add(Request("a", (5, 6), replace(GREEDY, stop_token_ids=(stop,)), mode=mode))
    deltas = [report["a"] for report in run(engine) if "a" in report]
    assert [t for delta in deltas for t in delta.token_ids] == whole[: whole.index(stop) + 1]
    assert deltas[-1].finish_reason == "stop"
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_the_end_of_text_token_ends_an_answer_unless_ignored() -> None:
    prompt, sampling = (5, 6), SamplingParams(temperature=1.5, max_tokens=200)
    seed = next(
        s for s in range(50) if len(ar_answer(0, Request("a", prompt, replace(sampling, seed=s)))) < 200
    )
    request = Request("a", prompt, replace(sampling, seed=seed))
    assert ar_answer(0, request)[-1] in TOY.eos_ids
    assert len(ar_answer(0, replace(request, sampling=replace(sampling, seed=seed, ignore_eos=True)))) == 200


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_abort_frees_everything_at_once_and_disturbs_nobody(
    mode: ModeChoice, lag: int, after: int
) -> None:
    engine = toy_engine(3, lag=lag, block_length=8)
    kept = Request("kept", random_prompt(random.Random(1), 9), GREEDY, mode="linear_spec")
    engine.add(
        Request("gone", random_prompt(random.Random(2), 30), replace(GREEDY, max_tokens=200), mode=mode)
    )
    engine.add(kept)
    answer: list[int] = []
    for _ in range(after):
        answer += [t for name, delta in engine.step().items() if name == "kept" for t in delta.token_ids]
    last = engine.abort("gone")
    assert last is not None and last.finish_reason == "abort" and last.stats is not None
    assert engine.abort("gone") is None
    engine.scheduler.pool.check([s.pages for s in engine.scheduler.running])
    assert all(s.request.id == "kept" for s in [*engine.scheduler.running, *engine.scheduler.waiting])
    for report in run(engine):
        assert "gone" not in report
        answer += [t for delta in report.values() for t in delta.token_ids]
    assert answer == ar_answer(3, kept)
    assert engine.status().free_pages == engine.status().total_pages


@pytest.mark.parametrize("mode", [*ALL, "auto"])
def test_a_crowd_on_a_memory_for_two_all_finish_as_if_alone(mode: ModeChoice) -> None:
    """The pool holds little more than the largest sequence, so sequences push each other out again and again."""
    chance = random.Random(4)
    requests = [
        Request(
            str(i), random_prompt(chance, chance.randint(1, 40)), replace(GREEDY, max_tokens=60), mode=mode
        )
        for i in range(9)
    ]
    engine = toy_engine(5, kv_tokens=200, max_running=6, block_length=8, lag=1)
    answers = generate(engine, requests)
    for request in requests[::3]:
        assert answers[request.id] == generate(toy_engine(5, block_length=8), [request])[request.id]


def test_more_requests_than_rows_wait_their_turn() -> None:
    engine = toy_engine(max_running=2)
    for i in range(5):
        engine.add(Request(str(i), (5, i + 8), GREEDY))
    engine.step()
    assert (engine.status().running, engine.status().waiting) == (2, 3)
    ended = [name for report in run(engine) for name, delta in report.items() if delta.finish_reason]
    assert ended == ["0", "1", "2", "3", "4"]


def test_a_long_prompt_does_not_stop_those_who_are_decoding() -> None:
    engine = toy_engine(max_batch_tokens=98)
    engine.add(Request("short", (5, 6), replace(GREEDY, max_tokens=100), mode="ar"))
    engine.step()
    engine.add(Request("long", random_prompt(random.Random(1), 200), GREEDY))
    for _ in range(3):
        assert "short" in engine.step()
    assert engine.scheduler.running[-1].prefilled > 0 or engine.scheduler.running[0].prefilled > 0


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (TOY.mask_id, 5)}, "prompt"),
        ({"prompt": (5, TOY.vocab_size)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": (5,) * 250}, "max_tokens"),
        ({"mode": "telepathy"}, "mode"),
        ({"sampling": replace(GREEDY, max_tokens=0)}, "max_tokens"),
        ({"sampling": replace(GREEDY, max_tokens=10**9)}, "max_tokens"),
        ({"sampling": replace(GREEDY, seed=2**63)}, "seed"),
        ({"sampling": replace(GREEDY, seed=-1)}, "seed"),
        ({"diffusion": DiffusionParams(block_length=5)}, "diffusion.block_length"),
        ({"diffusion": DiffusionParams(block_length=64)}, "diffusion.block_length"),
        ({"id": "taken"}, "id"),
    ],
)
def test_what_can_never_be_served_is_refused_by_name(change: dict[str, object], parameter: str) -> None:
    engine = toy_engine()
    engine.add(Request("taken", (5,), GREEDY))
    request = replace(Request("new", (5, 6), GREEDY), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{parameter}: "):
        engine.add(request)
    assert len(engine.sequences) == 1


def test_a_request_larger_than_the_memory_is_refused_rather_than_kept_waiting() -> None:
    engine = toy_engine(kv_tokens=100)
    assert engine.max_model_len < 100
    with pytest.raises(ValueError, match="^max_tokens: .* exceed the context"):
        engine.add(Request("a", (5,) * 20, GREEDY))


def test_a_budget_that_no_segment_fits_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens must be at least"):
        toy_engine(max_batch_tokens=64)


def test_a_memory_that_no_request_fits_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="kv_tokens must be above"):
        toy_engine(kv_tokens=72)


def test_a_tier_that_demands_lossless_text_gets_no_diffusion() -> None:
    engine = toy_engine()
    engine.add(Request("a", (5, 6), GREEDY, slo=Slo(lossless=True)))
    with pytest.raises(ValueError, match="^mode: diffusion is not lossless"):
        engine.switch("a", "diffusion")
    with pytest.raises(ValueError, match="^mode: "):
        engine.switch("a", "telepathy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^mode: diffusion is not lossless"):
        engine.add(Request("b", (5, 6), GREEDY, mode="diffusion", slo=Slo(lossless=True)))


def test_an_answer_that_has_ended_is_not_resumed() -> None:
    with pytest.raises(ValueError, match="^max_tokens: nothing is left"):
        toy_engine().add(
            Request("a", (5, 6), replace(GREEDY, ignore_eos=False), generated=(9, TOY.eos_ids[0]))
        )


def test_a_block_of_one_or_a_default_canvas_beyond_the_block_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="quadratic_block_length"):
        toy_engine(quadratic_block_length=1)
    with pytest.raises(ValueError, match="diffusion.block_length"):
        toy_engine(block_length=8, diffusion=DiffusionParams(block_length=32))


def test_the_default_mode_is_for_those_who_ask_for_none_and_auto_stays_lossless() -> None:
    engine = toy_engine(default_mode="diffusion")
    engine.add(Request("auto", (5, 6), GREEDY, mode="auto"))
    engine.add(Request("none", (5, 6), GREEDY))
    stats = {n: d.stats for report in run(engine) for n, d in report.items() if d.stats}
    assert stats["auto"] is not None and stats["auto"].modes == ("linear_spec",)
    assert stats["none"] is not None and stats["none"].modes == ("diffusion",)


@pytest.mark.parametrize("mode", ALL)
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("sizes", [{"page_size": 1}, {"page_size": 16}, {"quadratic_block_length": 4}])
def test_a_request_may_fill_the_context_to_its_last_token(
    mode: ModeChoice, lag: int, sizes: dict[str, Any]
) -> None:
    for missing in range(4):
        engine = toy_engine(2, lag=lag, **sizes)
        prompt = random_prompt(random.Random(missing), engine.max_model_len - 40 - missing)
        sampling = replace(GREEDY, temperature=0.7, max_tokens=40 + missing)
        assert len(generate(engine, [Request("a", prompt, sampling, mode=mode)])["a"]) == 40 + missing


@pytest.mark.parametrize("mode", ALL)
def test_a_full_memory_costs_few_restarts(mode: ModeChoice) -> None:
    engine = toy_engine(3, kv_tokens=320)
    chance = random.Random(6)
    requests = [
        Request(str(i), random_prompt(chance, 100), replace(GREEDY, max_tokens=60), mode=mode)
        for i in range(6)
    ]
    prefilled = 0
    for request in requests:
        engine.add(request)
    while not engine.idle:
        segments = engine.scheduler.schedule()
        prefilled += sum(segment.block for segment in segments if segment.mode is None)
        output = engine.executor.run([pack(segments, engine.scheduler.started, engine.scheduler.granted)])
        engine._report([segments], output)
    assert prefilled <= 3 * 600  # three times what the prompts need


@pytest.mark.parametrize("mode", ALL)
def test_half_precision_serves_every_mode(mode: ModeChoice) -> None:
    engine = toy_engine(2, dtype="bfloat16", block_length=8)
    requests = [
        Request(str(i), (5, 6 + i * 3), replace(GREEDY, temperature=float(i), seed=i), mode=mode)
        for i in range(2)
    ]
    answers = generate(engine, requests)
    assert [len(answer) for answer in answers.values()] == [20, 20]
    assert all(0 <= t < TOY.vocab_size and t != TOY.mask_id for answer in answers.values() for t in answer)
