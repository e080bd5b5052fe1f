"""The scheduler alone, driven with made-up results: no tensor, thousands of steps a second."""

import random
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import config, modes
from engine.config import EngineConfig, ModeChoice, SamplingParams
from engine.controller import auto_mode
from engine.request import Request
from engine.scheduler import Scheduler
from engine.segment import Segment, Settle, Settled
from engine.sequence import Sequence

MODES: tuple[ModeChoice, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion", "auto")


class Driver:
    """Plays the engine: settles segments with a random number of tokens, at once or a step late."""

    def __init__(self, chance: random.Random, config: EngineConfig) -> None:
        self.chance, self.config = chance, config
        self.scheduler = Scheduler(config, 32)
        self.in_flight: list[list[Segment]] = []
        self.live: list[Sequence] = []
        self.arrivals = 0

    def add(self) -> None:
        chance = self.chance
        sampling = SamplingParams(max_tokens=chance.randint(1, 50))
        prompt = (5,) * chance.randint(1, 60) + (chance.randint(5, 9),) * chance.randint(0, 20)
        self.put(Request(str(self.arrivals), prompt, sampling), chance.choice(MODES))

    def put(self, request: Request, mode: ModeChoice) -> None:
        sequence = Sequence(request, mode, (3,), self.arrivals)
        self.arrivals += 1
        self.live.append(sequence)
        self.scheduler.add(sequence)

    def step(self) -> list[Segment]:
        """Plans and settles; returns what was planned."""
        scheduler = self.scheduler
        segments = scheduler.schedule()
        self.check(segments)
        if segments:
            self.in_flight.append(segments)
        if self.in_flight and (len(self.in_flight) > self.config.lag or not segments):
            for segment in self.in_flight.pop(0):
                self.settle(segment)
                scheduler.pool.check([s.pages for s in scheduler.running])
        return segments

    def settle(self, segment: Segment) -> None:
        sequence = segment.sequence
        sequence.in_flight -= 1
        sequence.uncertain -= segment.commits
        if sequence.finish_reason is not None:
            return
        least = 0 if segment.settle in (Settle.KEEP, Settle.DENOISE) else 1
        count = self.chance.randint(least, max(segment.commits, least))
        if segment.settle is Settle.DENOISE:
            count = self.chance.choice([0, segment.commits])
        tokens = [8] * min(count, segment.commits)
        if segment.mode is None:
            sequence.append(tokens)
        else:
            segment.mode.advance(sequence, Settled(segment, tokens))
        if sequence.finish_reason is not None:
            self.scheduler.drop(sequence)
            self.live.remove(sequence)

    def check(self, segments: list[Segment]) -> None:
        scheduler, config = self.scheduler, self.config
        running = list(scheduler.running)
        scheduler.pool.check([s.pages for s in running])
        assert sum(segment.query_tokens for segment in segments) <= config.max_batch_tokens
        assert len({id(segment.sequence) for segment in segments}) == len(segments)
        assert len({s.row for s in running}) == len(running) <= config.max_running
        assert segments == sorted(segments, key=lambda s: s.settle)
        for segment in segments:
            sequence = segment.sequence
            assert sequence in running
            before = sequence.max_context - segment.commits
            if segment.mode is None:
                before = sequence.prefilled - segment.block
            assert len(sequence.pages) * config.page_size >= before + segment.query_tokens
            shared = sequence.found // config.page_size
            assert before >= sequence.found and shared <= sequence.registered <= len(sequence.pages)
        written = [page for s in running for page in s.pages[s.registered :]]
        assert len(set(written)) == len(written), "two sequences may write one page"
        assert set(written).isdisjoint(page for s in running for page in s.pages[: s.registered])
        for row, column, page in scheduler.granted:
            owner = next(s for s in running if s.row == row)
            assert owner.pages[column] == page


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0, 1]), st.sampled_from([1, 4, 16]), st.sampled_from([288, 4096])
)
def test_no_step_overruns_a_budget_a_page_or_a_row_and_everyone_ends(
    seed: int, lag: int, page_size: int, kv_tokens: int
) -> None:
    chance = random.Random(seed)
    config = EngineConfig(
        lag=lag,  # type: ignore[arg-type]
        page_size=page_size,
        kv_tokens=kv_tokens,
        max_running=chance.randint(1, 9),
        max_batch_tokens=chance.randint(98, 400),
        prefix_cache=chance.random() < 0.8,
    )
    driver = Driver(chance, config)
    for _ in range(300):
        if chance.random() < 0.1:
            driver.add()
        if driver.live and chance.random() < 0.02:
            gone = chance.choice(driver.live)
            gone.finish_reason = "abort"
            driver.scheduler.drop(gone)
            driver.live.remove(gone)
        driver.step()
    for _ in range(20000):
        if not driver.live:
            break
        driver.step()
    assert not driver.live, "a sequence never ends"
    while driver.in_flight:
        driver.step()
    assert driver.scheduler.pool.free == driver.scheduler.pool.total


@settings(max_examples=10, deadline=None)
@given(cache=st.booleans(), shared=st.sampled_from([0, 60, 100]), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
def test_a_full_memory_starves_nobody_and_the_oldest_never_gives_way(
    mode: ModeChoice | Literal["mixed"], lag: Literal[0, 1], cache: bool, shared: int, seed: int
) -> None:
    """Each request needs more than half of the memory in the end. Whoever came first goes on until it ends."""
    chance = random.Random(seed)
    config = EngineConfig(
        lag=lag,
        page_size=chance.choice([1, 4, 16]),
        kv_tokens=304,
        max_running=chance.randint(2, 8),
        max_batch_tokens=chance.randint(98, 300),
        prefix_cache=cache,
    )
    driver = Driver(chance, config)
    for index in range(12):
        length = chance.randint(1, 110)
        prompt = ((5,) * shared + tuple(chance.randint(5, 9) for _ in range(110)))[:length]
        request = Request(str(index), prompt, SamplingParams(max_tokens=170 - length))
        driver.put(request, mode if mode != "mixed" else chance.choice(MODES))
    oldest, idle = driver.live[0], 0
    for _ in range(12 * 4 * 170):
        if not driver.live:
            return
        if driver.live[0] is not oldest:
            oldest, idle = driver.live[0], 0
        started = oldest.row >= 0
        segments = driver.step()
        assert not started or oldest.row >= 0 or oldest.finish_reason, "the oldest was preempted"
        idle = 0 if any(segment.sequence is oldest for segment in segments) else idle + 1
        assert idle <= 4, "the oldest is not served"
    raise AssertionError("a sequence never ends")


@pytest.mark.parametrize(
    ("running", "want"),
    [
        (1, ("linear_spec", 32)),
        (2, ("linear_spec", 32)),
        (4, ("linear_spec", 16)),
        (9, ("linear_spec", 4)),
        (17, ("ar", 1)),
    ],
)
def test_auto_shortens_its_drafts_as_load_grows_and_then_stops_drafting(
    running: int, want: tuple[str, int]
) -> None:
    assert auto_mode(running, 64, 32) == want


def test_every_mode_has_its_name_in_the_configuration() -> None:
    assert tuple(modes.MODES) == config.MODES
    assert get_args(config.ModeName) == config.MODES and get_args(config.ModeChoice) == (
        "auto",
        *config.MODES,
    )


def test_auto_never_drafts_longer_than_the_engine_allows() -> None:
    assert auto_mode(1, 64, 8) == ("linear_spec", 8)
