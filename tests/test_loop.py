"""The engine in its thread, as the server uses it."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from engine.config import MODES, DiffusionParams, EngineConfig, ModeName, SamplingParams
from engine.loop import EngineLoop
from engine.request import DecodeStats, Delta, EngineError, Request
from fakes import TOY, write_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, TOY)
    return EngineConfig(str(folder), page_size=4, kv_tokens=2048, max_batch_tokens=160, block_length=8)


async def answer(loop: EngineLoop, request: Request) -> tuple[list[int], DecodeStats | None]:
    tokens: list[int] = []
    stats = None
    async for delta in loop.stream(request):
        tokens.extend(delta.token_ids)
        stats = delta.stats
    return tokens, stats


async def settled(loop: EngineLoop) -> bool:
    for _ in range(500):
        status = loop.status()
        if status.running == status.waiting == 0 and status.free_pages == status.total_pages:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_many_streams_at_once_get_their_own_tokens(config: EngineConfig) -> None:
    loop = EngineLoop(config)
    requests = [Request(str(i), (5, 8 + i), GREEDY, mode="linear_spec" if i % 2 else "ar") for i in range(12)]
    together = await asyncio.gather(*(answer(loop, r) for r in requests))
    for request, (tokens, stats) in zip(requests, together, strict=True):
        assert len(tokens) == 30 and stats is not None and stats.modes == (request.mode,)
        assert (await answer(loop, request))[0] == tokens
    loop.close()


async def test_leaving_a_stream_early_frees_its_pages(config: EngineConfig) -> None:
    loop = EngineLoop(config)
    stream = loop.stream(Request("a", (5, 6), SamplingParams(0, max_tokens=200, ignore_eos=True)))
    assert (await anext(stream)).token_ids
    await stream.aclose()
    assert await settled(loop)
    task = asyncio.create_task(
        answer(loop, Request("b", (5,), SamplingParams(0, max_tokens=200, ignore_eos=True)))
    )
    await asyncio.sleep(0.05)
    task.cancel()
    assert await settled(loop)
    loop.close()


async def test_a_refused_request_says_why_and_the_next_is_served(config: EngineConfig) -> None:
    loop = EngineLoop(config)
    with pytest.raises(ValueError, match="^prompt: "):
        await answer(loop, Request("a", (), GREEDY))
    assert len((await answer(loop, Request("a", (5,), GREEDY)))[0]) == 30
    loop.close()


async def test_an_engine_that_dies_tells_everyone_and_refuses_the_rest(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = EngineLoop(config)
    steps = 0
    step = loop.engine.step

    def broken() -> object:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise RuntimeError("out of luck")
        return step()

    monkeypatch.setattr(loop.engine, "step", broken)
    results = await asyncio.gather(
        *(answer(loop, Request(str(i), (5,), GREEDY)) for i in range(3)), return_exceptions=True
    )
    assert all(isinstance(r, EngineError) and "out of luck" in str(r) for r in results)
    assert "out of luck" in (loop.status().error or "")
    with pytest.raises(EngineError):
        await answer(loop, Request("late", (5,), GREEDY))
    loop.close()


async def test_a_mode_can_be_switched_while_tokens_stream(config: EngineConfig) -> None:
    loop = EngineLoop(config)
    request = Request("a", (5, 6), SamplingParams(0, max_tokens=100, ignore_eos=True), mode="ar")
    tokens: list[int] = []
    stats = None
    async for delta in loop.stream(request):
        if len(tokens) == 5:
            loop.switch("a", "quadratic_spec")
        tokens.extend(delta.token_ids)
        stats = delta.stats
    assert stats is not None and stats.modes == ("ar", "quadratic_spec")
    assert tokens == (await answer(loop, request))[0]
    loop.close()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.001)


def asked(name: str, mode: ModeName = "ar", **fields: Any) -> Request:
    sampling = SamplingParams(0.8, seed=5, max_tokens=200, ignore_eos=True)
    return Request(name, (5, 6), sampling, mode, DiffusionParams(0.9), **fields)


async def test_a_request_on_probation_runs_alone_and_says_so_first(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = EngineLoop(config)
    step, together = loop.engine.step, []

    def watched() -> dict[str, Delta]:
        deltas = step()
        together.append({sequence.request.id for sequence in loop.engine.scheduler.running})
        return deltas

    monkeypatch.setattr(loop.engine, "step", watched)
    others: list[asyncio.Task[Any]] = [asyncio.create_task(answer(loop, asked(name))) for name in ("a", "b")]
    await until(lambda: loop.running("a") and loop.running("b"))
    deltas: list[Delta] = []

    async def follow() -> None:
        async for delta in loop.stream(asked("alone", alone=True)):
            deltas.append(delta)

    others += [asyncio.create_task(follow()), asyncio.create_task(answer(loop, asked("c")))]
    await asyncio.gather(*others)
    loop.close()
    assert {"a", "b"} in together and {"alone"} in together and {"c"} in together
    assert all(running == {"alone"} for running in together if "alone" in running)
    assert deltas[0] == Delta(()) and len([d for delta in deltas for d in delta.token_ids]) == 200


async def test_a_request_that_comes_back_takes_the_place_of_its_former_self(config: EngineConfig) -> None:
    loop = EngineLoop(config)
    request = asked("r")
    left = loop.stream(request)
    begun = list((await anext(left)).token_ids)
    back = loop.stream(replace(request, generated=tuple(begun)))
    begun += (await anext(back)).token_ids
    await left.aclose()  # only now, so that its end comes after the other's beginning
    async for delta in back:
        begun += delta.token_ids
    assert delta.finish_reason == "length"
    assert begun == (await answer(loop, request))[0]
    assert await settled(loop)
    loop.close()


async def test_an_engine_that_hands_over_ends_every_stream_at_a_seam_and_frees_all_pages(
    config: EngineConfig,
) -> None:
    loop, other = EngineLoop(config), EngineLoop(config)
    requests = [asked(mode, cast(ModeName, mode)) for mode in MODES]
    streams = [asyncio.create_task(answer(loop, request)) for request in requests]

    def all_begun() -> bool:
        sequences = list(loop.engine.sequences.values())
        return len(sequences) == len(requests) and all(s.num_generated > 0 for s in sequences)

    await until(all_begun)
    loop.hand_over()
    begun = [tokens for tokens, _ in await asyncio.gather(*streams)]
    assert await settled(loop)
    assert (await answer(loop, asked("late")))[0] == []
    for request, tokens in zip(requests, begun, strict=True):
        whole, _ = await answer(other, request)
        assert 0 < len(tokens) < 200
        rest, _ = await answer(other, replace(request, generated=tuple(tokens)))
        assert tokens + rest == whole
    loop.close()
    other.close()


async def test_a_thread_that_stays_inside_a_step_is_stalled(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = EngineLoop(config)
    assert loop.stalled() == 0
    step, release = loop.engine.step, threading.Event()

    def hang() -> dict[str, Delta]:
        release.wait()
        return step()

    monkeypatch.setattr(loop.engine, "step", hang)
    task = asyncio.create_task(answer(loop, asked("r")))
    await until(lambda: loop.stalled() > 0.2)
    release.set()
    await task
    await until(lambda: loop.stalled() == 0)
    loop.close()
