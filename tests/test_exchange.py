"""Verify and draft stages over real sockets: frames that survive anything, servers that come, die and fall silent."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import remote_drafts
from cluster.draft_frames import (
    MAX_BLOCK,
    MAX_POSITION,
    MAX_STEPS,
    TOKENS,
    FrameError,
    pack_answers,
    pack_asks,
    sent,
    unpack_answers,
    unpack_asks,
)
from cluster.draft_server import DraftServer, Endpoint
from cluster.remote_drafts import RemoteDrafts
from engine.config import ModeChoice, SamplingParams
from engine.drafts import Answer, Ask, Verdict, Wanted
from engine.engine import Engine
from fakes import generate, run, staged_engine, toy_drafter, toy_engine
from test_stages import STAGED, some_requests

uint32 = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)
tokens = st.lists(st.integers(0, TOKENS - 1), max_size=40).map(tuple)
wanteds = st.builds(Wanted, st.integers(1, MAX_BLOCK), st.booleans(), shares, st.integers(0, MAX_STEPS))
samplings = st.builds(
    SamplingParams, st.floats(0, 2), st.integers(0, TOKENS - 1), shares, shares, st.integers(0, 2**63 - 1)
)
asks = st.tuples(
    st.integers(40, MAX_POSITION), tokens, st.integers(0, 2**64 - 1), uint32, wanteds, samplings
).map(lambda drawn: Ask(drawn[2], drawn[3], drawn[0], drawn[1], drawn[4], drawn[5]))
answers = st.builds(
    Answer, st.integers(0, 2**64 - 1), uint32, st.sampled_from(Verdict), tokens, st.integers(0, MAX_STEPS)
)


@given(st.lists(asks, max_size=5), st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_asks_survive_their_frames(sent_asks: list[Ask], dropped: list[int]) -> None:
    assert unpack_asks(pack_asks(sent_asks, dropped)) == (sent_asks, dropped)


@given(st.lists(answers, max_size=5))
def test_answers_survive_their_frames(sent_answers: list[Answer]) -> None:
    assert unpack_answers(pack_answers(sent_answers)) == sent_answers


def test_only_what_chooses_a_token_is_sent_of_sampling_parameters() -> None:
    sampling = SamplingParams(0.5, 3, 0.9, 0.1, 7, 12, (3,), True)
    [[ask], _] = unpack_asks(pack_asks([Ask(1, 1, 1, (5,), Wanted(8), sampling)], []))
    assert (
        ask.sampling
        == sent(sampling)
        == replace(sampling, max_tokens=256, stop_token_ids=(), ignore_eos=False)
    )


@settings(max_examples=300)
@given(st.lists(asks, max_size=3), st.lists(answers, max_size=3), st.data())
def test_a_spoilt_frame_is_refused_or_read_and_never_more(
    sent_asks: list[Ask], sent_answers: list[Answer], data: st.DataObject
) -> None:
    for frame, unpack in (
        (pack_asks(sent_asks, [1, 2]), unpack_asks),
        (pack_answers(sent_answers), unpack_answers),
    ):
        spoilt = bytearray(frame)
        for _ in range(data.draw(st.integers(0, 4))):
            spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))])
        for bad in (bytes(spoilt), cut, cut + b"\0" * 4):
            try:
                unpack(bad)
            except FrameError as error:
                assert str(error)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    for unpack in (unpack_asks, unpack_answers):
        with pytest.raises(FrameError):
            unpack(noise)


# --- sockets -------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"dtype": "float32", "block_length": 8}


@contextmanager
def serving(seed: int = 1, **settings_: Any) -> Iterator[DraftServer]:
    server = DraftServer(toy_drafter(seed, **SIZES, **settings_), "127.0.0.1")
    try:
        yield server
    finally:
        server.close()


@contextmanager
def source_of(*endpoints: Endpoint) -> Iterator[RemoteDrafts]:
    source = RemoteDrafts()
    use(source, *endpoints)
    try:
        yield source
    finally:
        source.close()


def use(source: RemoteDrafts, *endpoints: Endpoint) -> None:
    """Waits until all that are there are connected, or, as some never will be, for a moment."""
    source.use(endpoints)
    source.send((), ())
    deadline = time.monotonic() + 1
    sockets = [server.socket for server in source._servers.values()]
    while time.monotonic() < deadline and not all(socket.poll(0, zmq.POLLOUT) for socket in sockets):
        time.sleep(0.01)


def until(what: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asked(source: RemoteDrafts, *asks: Ask, seconds: float = 20.0) -> list[Answer]:
    source.send(asks, ())
    found: list[Answer] = []
    deadline = time.monotonic() + seconds
    while len(found) < len(asks):
        assert time.monotonic() < deadline
        source.wait(0.01)
        found += source.poll()
    return found


def an_ask(key: int, text: Sequence[int] = (5, 6, 8), known: int = 0, number: int = 0) -> Ask:
    return Ask(key, number, len(text), tuple(text[known:]), Wanted(8), SamplingParams(0.0))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", STAGED)
def test_two_verifiers_and_two_drafters_give_the_colocated_text(mode: ModeChoice, lag: int) -> None:
    requests = some_requests(4, 4, [mode])
    expected = generate(toy_engine(1, **SIZES), requests)
    made: list[dict[str, list[int]]] = []
    with serving() as one, serving() as two:
        with source_of(one.endpoint, two.endpoint) as left, source_of(two.endpoint, one.endpoint) as right:
            engines = [staged_engine(source, 1, 10.0, lag=lag, **SIZES) for source in (left, right)]
            threads = [
                threading.Thread(target=lambda e=e: made.append(generate(e, requests))) for e in engines
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert made == [expected, expected]
            for engine in engines:
                assert engine.asking is not None and engine.asking.answered > 0 == engine.asking.missed
            for server in (one, two):
                until(lambda server=server: server.status().followed == 0)
                status = server.status()
                assert status.drawn > 0 and status.free_pages == status.total_pages


def test_sequences_stay_with_their_server_and_spread_evenly() -> None:
    with serving() as one, serving() as two, source_of(one.endpoint, two.endpoint) as source:
        texts = {key: [5, 6, 8 + key] for key in range(6)}
        assert {a.verdict for a in asked(source, *(an_ask(key, text) for key, text in texts.items()))} == {
            Verdict.DRAWN
        }
        assert one.status().followed == two.status().followed == 3
        longer = [an_ask(key, [*text, 9], known=3) for key, text in texts.items()]
        assert {answer.verdict for answer in asked(source, *longer)} == {Verdict.DRAWN}
        source.send((), tuple(texts))
        until(lambda: one.status().followed == two.status().followed == 0)


def test_many_whole_texts_are_told_in_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_drafts, "FRAME_TOKENS", 10)
    with serving() as server, source_of(server.endpoint) as source:
        asks = [an_ask(key, [5, 6, 8 + key] * (1 + key)) for key in range(6)]
        assert {answer.key for answer in asked(source, *asks) if answer.verdict is Verdict.DRAWN} == set(
            range(6)
        )
        source.send((), tuple(range(6)))
        until(lambda: server.status().followed == 0)


def test_without_a_server_every_ask_is_declined_at_once() -> None:
    with source_of() as source:
        source.send([an_ask(1)], ())
        assert [answer.verdict for answer in source.poll()] == [Verdict.DECLINED]


def test_sequences_of_a_server_that_has_gone_are_told_to_another() -> None:
    with serving() as two, source_of() as source:
        with serving() as one:
            use(source, one.endpoint)
            assert [answer.verdict for answer in asked(source, an_ask(1))] == [Verdict.DRAWN]
        use(source, two.endpoint)
        assert [answer.verdict for answer in asked(source, an_ask(1, [5, 6, 8, 9], 3))] == [Verdict.FORGOTTEN]
        assert [answer.verdict for answer in asked(source, an_ask(1, [5, 6, 8, 9]))] == [Verdict.DRAWN]


def test_a_server_that_died_unannounced_is_noticed_by_the_next_ask() -> None:
    with serving() as two, source_of() as source:
        with serving() as one:
            use(source, one.endpoint)
            assert [answer.verdict for answer in asked(source, an_ask(1))] == [Verdict.DRAWN]
            use(source, one.endpoint, two.endpoint)
        time.sleep(0.1)
        assert [answer.verdict for answer in asked(source, an_ask(1, [5, 6, 8, 9], 3))] == [Verdict.FORGOTTEN]
        assert [answer.verdict for answer in asked(source, an_ask(1, [5, 6, 8, 9]))] == [Verdict.DRAWN]


def test_a_silent_server_loses_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_drafts, "SILENT_SECONDS", 0.1)
    context = zmq.Context()
    mute = context.socket(zmq.ROUTER)
    public, mute.curve_secretkey = zmq.curve_keypair()
    mute.curve_publickey, mute.curve_server = public, True
    port = mute.bind_to_random_port("tcp://127.0.0.1")
    with serving() as one, source_of(Endpoint(f"tcp://127.0.0.1:{port}", public.decode())) as source:
        source.send([an_ask(1)], ())
        use(source, Endpoint(f"tcp://127.0.0.1:{port}", public.decode()), one.endpoint)
        time.sleep(0.1)
        assert [answer.verdict for answer in asked(source, an_ask(1, number=2))] == [Verdict.DRAWN]
    context.destroy(linger=0)


def test_a_late_answer_does_not_stand_for_the_next_one() -> None:
    with serving() as server, source_of(server.endpoint) as source:
        source.send([an_ask(1, number=1)], ())
        until(lambda: server.status().drawn == 1)
        source.send([an_ask(1, [5, 6, 8, 9], 3, number=2)], ())
        until(lambda: server.status().drawn == 2)
        answers: list[Answer] = []

        def arrived() -> bool:
            answers.extend(source.poll())
            return bool(answers)

        until(arrived)
        assert [answer.number for answer in answers] == [2]


def test_a_server_that_is_taken_up_while_asks_go_out_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = RemoteDrafts._connect

    def slowly(source: RemoteDrafts, endpoint: Endpoint) -> Any:
        for _ in range(2):
            source.send((), ())  # as the engine's thread may at any time
        return connect(source, endpoint)

    monkeypatch.setattr(RemoteDrafts, "_connect", slowly)
    with serving() as one, serving() as two, source_of(one.endpoint, two.endpoint) as source:
        source.send((), ())
        assert set(source._servers) == {one.endpoint, two.endpoint}


def test_malformed_frames_are_dropped_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, source_of(server.endpoint) as source:
        chance = random.Random(1)
        assert [answer.verdict for answer in asked(source, an_ask(1))] == [Verdict.DRAWN]
        [stub] = source._servers.values()
        good = pack_asks([an_ask(2)], [])
        for bad in (b"", b"x", good[:-1], good + b"\0\0\0\0", chance.randbytes(500)):
            stub.socket.send(bad)
        stub.socket.send_multipart([good, good])
        until(lambda: server.malformed == 6)
        assert [answer.verdict for answer in asked(source, an_ask(1, [5, 6, 8, 9], 3))] == [Verdict.DRAWN]
        assert server.error is None and "cannot be read" in caplog.text


def test_nobody_asks_without_the_servers_key() -> None:
    with serving() as server:
        other, _ = zmq.curve_keypair()
        with source_of(Endpoint(server.endpoint.address, other.decode())) as source:
            source.send([an_ask(1)], ())
            assert [answer.verdict for answer in source.poll()] == [Verdict.FORGOTTEN]  # never connected
        context = zmq.Context()
        plain = context.socket(zmq.DEALER)
        plain.connect(server.endpoint.address)
        plain.send(pack_asks([an_ask(1)], []))
        time.sleep(0.2)
        assert server.status().steps == 0
        context.destroy(linger=0)


def test_a_stage_that_dies_under_load_costs_no_token() -> None:
    requests = some_requests(5, 6, STAGED)
    expected = generate(toy_engine(1, **SIZES), requests)
    with source_of() as source:
        engine: Engine = staged_engine(source, 1, 0.2, **SIZES)
        made: dict[str, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            engine.add(request)
        with serving() as server:
            use(source, server.endpoint)
            assert engine.asking is not None
            while engine.asking.answered < 10:
                for name, delta in engine.step().items():
                    made[name] += delta.token_ids
        for report in run(engine):
            for name, delta in report.items():
                made[name] += delta.token_ids
    assert made == expected
    assert engine.asking.missed > 0
