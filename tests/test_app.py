"""The served application over HTTP: the real command, Ray Serve, the engine and the tiny checkpoint."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from conftest import ServerProcess, free_port
from engine.config import MODES, DiffusionParams, EngineConfig, ModelConfig, SamplingParams
from engine.request import DecodeStats, Delta, EngineError, Request
from engine.tokenizer import Tokenizer
from serve_app.answer import Answer
from serve_app.chunks import Chunk
from serve_app.engine_client import EngineClient
from serve_app.engine_replica import EngineReplica, pack, unpack
from serve_app.generation import Generation
from serve_app.schemas import ChatRequest
from serve_app.streaming import DONE, KEEP_ALIVE, Envelope, frames

NAME = "triserve-tiny"
LOSSLESS = ("ar", "linear_spec", "quadratic_spec")
TOKENIZER = Tokenizer(EngineConfig().checkpoint)
MODEL = ModelConfig.from_json(Path(EngineConfig().checkpoint) / "config.json")
SUM: list[Any] = [{"role": "user", "content": "What is 41 + 17?"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/chat/completions", json={"model": NAME, "messages": SUM, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def text_of(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


def events(response: httpx.Response) -> list[Any]:
    """The data of an SSE response, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def busy(http: httpx.Client) -> tuple[int, int, int]:
    """Running and waiting sequences, and pages in use."""
    status = http.get("/ready").json()["replicas"][0]
    return status["running"], status["waiting"], status["total_pages"] - status["free_pages"]


def wait_until(what: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_openai_client_gets_an_answer_in_every_mode(client: openai.OpenAI, mode: str) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=SUM, max_tokens=60, temperature=0, extra_body={"mode": mode}
    )
    TypeAdapter(ChatCompletion).validate_python(answer.model_dump(), strict=True)
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.model_extra is not None
    decode = answer.usage.model_extra["decode"]
    assert decode["mode"] == [mode]
    assert decode["forward_passes"] > 0
    assert (decode["drafted"] >= decode["accepted"] > 0) == mode.endswith("spec")
    assert (decode["denoise_passes"] > 0) == (mode == "diffusion")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_stream_is_typed_and_joins_to_the_whole_answer(http: httpx.Client, mode: str) -> None:
    fields = {"mode": mode, "seed": 5, "temperature": 0.8, "max_tokens": 50}
    body = {
        "model": NAME,
        "messages": SUM,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    for chunk in chunks:
        TypeAdapter(ChatCompletionChunk).validate_python(chunk, strict=True)
    *pieces, totals = chunks
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    whole = chat(http, **fields)
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text_of(whole)
    assert pieces[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    cached = {"prompt_tokens_details": whole["usage"]["prompt_tokens_details"]}  # the second time finds more
    assert totals["choices"] == [] and totals["usage"] | cached == whole["usage"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_the_async_client_streams(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=NAME, messages=SUM, max_tokens=40, temperature=0, stream=True
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(model=NAME, messages=SUM, max_tokens=40, temperature=0)
    assert all(chunk.usage is None for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("question", ["What is 41 + 17?", "Sort these: 5 3 9 1", "Tell me a story."])
def test_lossless_modes_give_one_text(http: httpx.Client, temperature: float, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    bodies = [
        chat(http, messages=messages, temperature=temperature, seed=11, max_tokens=80, mode=mode)
        for mode in LOSSLESS
    ]
    assert len({text_of(body) for body in bodies}) == 1
    assert len({body["usage"]["completion_tokens"] for body in bodies}) == 1


def test_requests_without_a_seed_differ_and_with_one_do_not(http: httpx.Client) -> None:
    # a raw beginning leaves the model unsure of every token; 200 seeds gave 200 texts
    fields = {"model": NAME, "prompt": "Once upon", "temperature": 2, "max_tokens": 60, "ignore_eos": True}

    def text(**more: int) -> str:
        return str(http.post("/v1/completions", json=fields | more).json()["choices"][0]["text"])

    assert text() != text()
    assert text(seed=1) == text(seed=1)


def test_choices_differ_and_the_first_is_the_only_one_of_a_single(http: httpx.Client) -> None:
    fields = {"temperature": 2, "max_tokens": 20, "seed": 3, "ignore_eos": True}
    several = chat(http, **fields, n=3)
    texts = [choice["message"]["content"] for choice in several["choices"]]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == text_of(chat(http, **fields))
    assert several["usage"]["completion_tokens"] == 60


def test_concurrent_requests_get_what_they_get_alone(http: httpx.Client) -> None:
    requests = [{"seed": seed, "mode": mode, "max_tokens": 40} for seed in range(3) for mode in MODES]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda fields: text_of(chat(http, **fields)), requests))
    assert together == [text_of(chat(http, **fields)) for fields in requests]


@pytest.mark.parametrize("mode", LOSSLESS)
def test_a_stop_string_ends_the_answer_and_is_not_shown(http: httpx.Client, mode: str) -> None:
    fields = {"temperature": 0, "max_tokens": 60, "mode": mode}
    whole = text_of(chat(http, **fields))
    stop = whole[5:9]
    cut = chat(http, **fields, stop=["never there", stop])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["decode"]["mode"] == [mode] and cut["usage"]["decode"]["forward_passes"] > 0
    assert (
        cut["usage"]["completion_tokens"]
        == chat(http, **{**fields, "mode": "ar"}, stop=stop)["usage"]["completion_tokens"]
    )
    body = {"model": NAME, "messages": SUM, **fields, "stop": stop, "stream": True}
    pieces = events(http.post("/v1/chat/completions", json=body))
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text_of(cut)
    wait_until(lambda: busy(http) == (0, 0, 0))


def test_the_tokens_of_a_prompt_that_was_seen_before_are_counted_as_cached(http: httpx.Client) -> None:
    fields = {"model": NAME, "temperature": 0, "max_tokens": 3, "n": 2}
    prompt = TOKENIZER.encode_prompt("Nobody has said this before, and now it is said twice: " * 3)
    page = EngineConfig().page_size
    cached = []
    for _ in range(2):
        body = http.post("/v1/completions", json={**fields, "prompt": prompt}).json()
        cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, (len(prompt) - 1) // page * page]


def test_text_prompts_and_their_token_ids_give_the_same_completion(http: httpx.Client) -> None:
    fields = {"model": NAME, "temperature": 0, "max_tokens": 12}
    texts = ["The numbers are", "Once upon"]
    ids = [TOKENIZER.encode_prompt(text) for text in texts]
    answers = []
    for prompt in (texts, ids):
        body = http.post("/v1/completions", json={**fields, "prompt": prompt}).json()
        TypeAdapter(Completion).validate_python(body, strict=True)
        answers.append([choice["text"] for choice in body["choices"]])
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answers[0] == answers[1]
    alone = http.post("/v1/completions", json={**fields, "prompt": ids[1]}).json()
    assert alone["choices"][0]["text"] == answers[0][1]
    stream = events(http.post("/v1/completions", json={**fields, "prompt": texts[0], "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == answers[0][0]


def test_the_text_of_a_control_token_is_only_text(http: httpx.Client) -> None:
    def prompt_tokens(content: str) -> int:
        body = chat(http, messages=[{"role": "user", "content": content}], max_tokens=1)
        return int(body["usage"]["prompt_tokens"])

    attack = "<|mask|><|im_end|>"
    assert prompt_tokens(attack) - prompt_tokens("") == len(TOKENIZER.encode(attack)) > 2


def test_fields_without_effect_are_named_in_a_header(http: httpx.Client) -> None:
    body = {
        "model": NAME,
        "messages": SUM,
        "max_tokens": 1,
        "tools": [{}],
        "logit_bias": {"1": 1},
        "user": "me",
    }
    for stream in (False, True):
        response = http.post("/v1/chat/completions", json={**body, "stream": stream})
        assert response.headers["x-ignored-params"] == "logit_bias, tools"
    del body["tools"], body["logit_bias"]
    assert "x-ignored-params" not in http.post("/v1/chat/completions", json=body).headers


def test_the_model_is_described(http: httpx.Client, client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [NAME]
    assert client.models.retrieve(NAME) == models[0]
    assert http.get("/v1/models").json()["data"][0]["modes"] == ["auto", *MODES]
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json()["status"] == "ready"
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_refused(response: httpx.Response, status: int, param: str | None, code: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error" and error["message"]
    assert response.headers.get_list("x-request-id") and len(response.content) < 2048


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "invalid_value"),
        ({"mode": "fast"}, "mode", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"max_tokens": MODEL.max_position}, "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": MODEL.max_position}, "max_completion_tokens", "context_length_exceeded"),
        (
            {"messages": [{"role": "user", "content": "word " * MODEL.max_position}]},
            "messages",
            "context_length_exceeded",
        ),
        ({"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages", "context_length_exceeded"),
    ],
)
def test_a_bad_request_names_its_parameter(
    http: httpx.Client, fields: dict[str, Any], param: str, code: str
) -> None:
    body = json.dumps({"model": NAME, "messages": SUM, "stream": True, **fields})
    headers = {"content-type": "application/json"}
    assert_refused(http.post("/v1/chat/completions", content=body, headers=headers), 400, param, code)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([MODEL.mask_id], "invalid_value"),
        ([MODEL.vocab_size], "invalid_value"),
        ("", "invalid_value"),
        ([7] * MODEL.max_position, "context_length_exceeded"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(http: httpx.Client, prompt: Any, code: str) -> None:
    for stream in (False, True):
        body = {"model": NAME, "prompt": prompt, "stream": stream}
        assert_refused(http.post("/v1/completions", json=body), 400, "prompt", code)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b"{} {}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = http.post("/v1/chat/completions", content=content, headers=headers)
    assert_refused(response, 400, None, "invalid_json")


def test_a_body_of_another_type_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert_refused(response, 400, None, "invalid_content_type")


def test_a_large_body_is_refused_before_it_is_read(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 4000000000\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_without_a_length_is_refused_as_it_arrives(http: httpx.Client) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(48):
            yield b" " * 100_000

    response = http.post("/v1/chat/completions", content=body(), headers={"content-type": "application/json"})
    assert_refused(response, 413, None, "body_too_large")


def test_unknown_models_paths_and_methods_are_refused_in_openais_shape(http: httpx.Client) -> None:
    body = {"model": "gpt", "messages": SUM}
    assert_refused(http.post("/v1/chat/completions", json=body), 404, "model", "model_not_found")
    assert_refused(http.get("/v1/models/some/other"), 404, "model", "model_not_found")
    assert_refused(http.get("/nowhere"), 404, None, "not_found")
    assert_refused(http.get("/v1/completions"), 405, None, "method_not_allowed")


def test_a_request_id_is_echoed_or_made(http: httpx.Client) -> None:
    for path in ("/health", "/nowhere"):
        assert http.get(path, headers={"x-request-id": "mine-7"}).headers["x-request-id"].startswith("mine-7")
        made = [http.get(path).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1] and all(made)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
valid = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 9)},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(-1, 50),
        "min_p": st.floats(0, 1),
        "n": st.integers(1, 3),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=4),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=3),
        "ignore_eos": st.booleans(),
        "mode": st.sampled_from(["auto", *MODES]),
        "diffusion": st.fixed_dictionaries(
            {
                "steps": st.integers(0, 5),
                "threshold": st.floats(0, 1),
                "block_length": st.sampled_from([4, 8, 16, 32]),
            }
        ),
        "stream": st.booleans(),
    },
)
broken = st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "tools"]), anything, max_size=2)


def test_no_request_gets_a_server_error(server: ServerProcess) -> None:
    @settings(max_examples=80, derandomize=True)
    @given(valid, broken)
    def send(good: dict[str, Any], bad: dict[str, Any]) -> None:
        content = json.dumps({"messages": SUM, **bad, **good})
        response = http.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code in (200, 400, 404), response.text
        assert response.status_code == 200 or response.json()["error"]["message"]
        assert 'data: {"error"' not in response.text

    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        send()
        wait_until(lambda: busy(http) == (0, 0, 0))


# --- disconnects and failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("mode", MODES)
async def test_a_disconnect_frees_the_pages(
    server: ServerProcess, http: httpx.Client, mode: str, stream: bool
) -> None:
    body = {
        "model": NAME,
        "messages": SUM,
        "mode": mode,
        "stream": stream,
        "max_tokens": 1900,
        "ignore_eos": True,
        "n": 8,
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as leaver:
        request = asyncio.create_task(leaver.post("/v1/chat/completions", json=body))
        while busy(http)[0] < 8:
            await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    left = time.monotonic()
    wait_until(lambda: busy(http) == (0, 0, 0))
    assert time.monotonic() - left < 4  # to generate all of it takes several times as long


def test_a_request_outlives_its_engine(server: ServerProcess, http: httpx.Client) -> None:
    fields = {"seed": 4, "max_tokens": 1500, "ignore_eos": True, "temperature": 1.0, "mode": "ar"}
    expected = text_of(chat(http, **fields))
    body = {"model": NAME, "messages": SUM, **fields, "stream": True}
    text = ""
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        for number, line in enumerate(response.iter_lines()):
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            if number == 20:
                [engine] = [
                    pid
                    for pid, name in server.processes().items()
                    if "ray::ServeReplica:triserve:engine" in name
                ]
                os.kill(engine, signal.SIGKILL)
    assert text == expected


@pytest.mark.long
def test_haproxy_serves_the_same(tmp_path: Path) -> None:
    ports = {"stats_port": free_port(), "metrics_port": free_port()}
    file = tmp_path / "haproxy.yaml"
    file.write_text(json.dumps({"serve": {"proxy": "haproxy", **ports}}))
    server = ServerProcess(free_port(), ["--config", str(file)])
    server.launch()
    try:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            assert text_of(chat(http, seed=1)) == text_of(chat(http, seed=1, mode="ar"))
            assert_refused(http.get("/nowhere"), 404, None, "not_found")
            body = {"model": NAME, "messages": SUM, "stream": True, "max_tokens": 1900, "ignore_eos": True}
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
            wait_until(lambda: busy(http) == (0, 0, 0), 5)
    finally:
        server.stop()
    assert server.processes() == {}


class FakeLoop:
    """An engine loop that plays deltas at once, then raises `failure`, if there is one."""

    def __init__(
        self, deltas: list[Delta], failure: Exception | None = None, error: str | None = None
    ) -> None:
        self.deltas, self.failure, self.error = deltas, failure, error
        self.closed = False
        self.since_step = 0.0

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        try:
            for delta in self.deltas:
                yield delta
            if self.failure is not None:
                raise self.failure
            await asyncio.sleep(60)
        finally:
            self.closed = True

    def status(self) -> Any:
        return SimpleNamespace(error=self.error)

    def running(self, request_id: str) -> bool:
        return bool(self.deltas)

    def stalled(self) -> float:
        return self.since_step


def replica_of(loop: FakeLoop) -> EngineReplica:
    replica = EngineReplica.__new__(EngineReplica)
    replica._engine = cast(Any, loop)
    replica._heartbeat, replica._patience, replica._streams = 0.4, 60.0, 0
    return replica


async def test_deltas_that_wait_for_the_reader_are_joined() -> None:
    deltas = [Delta((1,)), Delta((2, 3)), Delta((4,), "stop", DecodeStats(("ar",), 3))]
    loop = FakeLoop(deltas)
    chunks = []
    async for chunk in replica_of(loop).stream(pack(Request("r", (1,))), 0.01):
        chunks.append(chunk)
        if chunk.finish_reason is not None:
            break
    assert [token for chunk in chunks for token in chunk.token_ids] == [1, 2, 3, 4]
    accepted, answer = chunks
    assert accepted == Chunk()
    assert answer.finish_reason == "stop" and answer.stats is not None and answer.stats["forwards"] == 3


async def test_leaving_a_replicas_stream_ends_the_engines() -> None:
    loop = FakeLoop([Delta((1,))])
    stream = replica_of(loop).stream(pack(Request("r", (1,))), 0.01)
    await anext(stream)
    await anext(stream)
    assert not loop.closed
    await stream.aclose()
    assert loop.closed


@pytest.mark.parametrize(
    ("failure", "last"),
    [
        (ValueError("prompt: bad"), Chunk(finish_reason="refused", error="prompt: bad")),
        (EngineError("dead"), Chunk(finish_reason="error", error="dead", running=True)),
    ],
)
async def test_no_exception_of_the_engine_crosses_to_the_ingress(
    failure: Exception, last: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("serve_app.engine_replica.FAILED_SECONDS", 0.0)
    stream = replica_of(FakeLoop([Delta((1,))], failure)).stream(pack(Request("r", (1,))), 0.01)
    assert [chunk async for chunk in stream] == [Chunk(), Chunk([1], running=True), last]
    await asyncio.sleep(0.01)
    assert ended == ([1] if last.finish_reason == "error" else [])  # nothing more comes from such a process


async def test_an_engine_that_has_failed_already_counts_against_no_request() -> None:
    stream = replica_of(FakeLoop([], error="dead")).stream(pack(Request("r", (1,))), 0.01)
    assert [chunk async for chunk in stream] == [Chunk(finish_reason="moved", error="dead")]


async def test_a_silent_stream_gives_signs_of_life_while_the_engine_makes_steps() -> None:
    loop = FakeLoop([Delta((1,))])
    stream = replica_of(loop).stream(pack(Request("r", (1,))), 0.01)
    assert [await anext(stream) for _ in range(4)] == [Chunk(), Chunk([1], running=True)] + 2 * [
        Chunk(running=True)
    ]
    loop.since_step = 1.0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.5)


async def test_a_replica_whose_engine_hangs_does_not_say_that_it_has_a_request() -> None:
    loop = FakeLoop([])
    loop.since_step = 1.0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(replica_of(loop).stream(pack(Request("r", (1,))), 0.01)), 0.5)


async def test_a_replica_with_a_dead_engine_is_unhealthy() -> None:
    await replica_of(FakeLoop([])).check_health()
    with pytest.raises(RuntimeError, match="out of memory"):
        await replica_of(FakeLoop([], error="out of memory")).check_health()


async def test_a_replica_whose_engine_makes_no_step_is_unhealthy() -> None:
    loop = FakeLoop([])
    loop.since_step = 59.0
    await replica_of(loop).check_health()
    loop.since_step = 61.0
    with pytest.raises(RuntimeError, match="no step"):
        await replica_of(loop).check_health()


def test_a_request_survives_packing() -> None:
    request = Request(
        "r",
        (1, 2),
        SamplingParams(0.5, 1, 0.9, 0.1, 7, 9, (3,), True),
        "ar",
        DiffusionParams(0.5, 2, 8),
        (4,),
    )
    assert unpack(pack(request)) == request


class ScriptedEngine(EngineClient):
    """Plays chunks with pauses (seconds) instead of asking an engine; an abort in a pause ends it."""

    def __init__(self, script: list[Chunk | float]) -> None:
        self.script = script
        self.aborted: list[str] = []
        self.abortion = asyncio.Event()

    async def stream(self, request: Request, interval: float) -> AsyncGenerator[Chunk, None]:
        for item in self.script:
            if isinstance(item, float):
                try:
                    await asyncio.wait_for(self.abortion.wait(), item)
                except TimeoutError:
                    continue
                yield Chunk(finish_reason="abort", stats=dataclasses.asdict(DecodeStats(("ar",), 3, 3)))
                return
            yield item

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.abortion.set()


def generation(script: list[Chunk | float], stops: tuple[str, ...] = ()) -> tuple[Generation, ScriptedEngine]:
    engine = ScriptedEngine(script)
    return Generation(engine, [Answer(Request("r", (1,)), TOKENIZER, stops)], 0.0), engine


async def framed(run: Generation) -> list[bytes]:
    stream: AsyncIterator[bytes] = frames(Envelope("id", 0, NAME, chat=True), run, 0.05, 3, False)
    return [frame async for frame in stream]


async def test_silence_is_filled_with_comments() -> None:
    run, _ = generation([0.2, Chunk(TOKENIZER.encode("a"), "stop")])
    sent = await framed(run)
    assert KEEP_ALIVE in sent and sent[-1] == DONE


async def test_a_failure_within_a_stream_is_an_error_event() -> None:
    run, engine = generation([Chunk(TOKENIZER.encode("a")), Chunk(finish_reason="error", error="it broke")])
    *_, failure, done = await framed(run)
    assert json.loads(failure.removeprefix(b"data: "))["error"] == {
        "message": "it broke",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert done == DONE and engine.aborted == []


async def test_a_stop_string_aborts_what_still_runs() -> None:
    run, engine = generation([Chunk(TOKENIZER.encode("one two three")), 60.0], stops=("two",))
    assert [(event.text, event.finish_reason) async for event in run.events(None) if event] == [
        ("one ", "stop")
    ]
    assert engine.aborted == ["r"]
    assert run.usage(1)["decode"]["mode"] == ["ar"] and run.usage(1)["decode"]["forward_passes"] == 3


async def test_cached_tokens_of_a_prompt_are_counted_once_for_all_its_choices() -> None:
    answers = [
        Answer(Request(str(i), prompt), TOKENIZER, ())
        for i, prompt in enumerate([(1, 2, 3), (1, 2, 3), (4,)])
    ]
    for answer, cached in zip(answers, (16, 32, 48), strict=True):
        answer.stats = DecodeStats(cached_tokens=cached)
    run = Generation(ScriptedEngine([60.0]), answers, 0.0)
    assert run.usage(7)["prompt_tokens_details"] == {"cached_tokens": 64}
    run.close()


async def test_an_answer_cut_by_a_stop_string_does_not_wait_for_an_engine_that_hears_no_abort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.generation.STATISTICS_SECONDS", 0.05)
    run, engine = generation([Chunk(TOKENIZER.encode("one two three")), 60.0], stops=("two",))
    monkeypatch.setattr(engine, "abort", lambda request_id: None)
    async with asyncio.timeout(5):
        assert [(event.text, event.finish_reason) async for event in run.events(None) if event] == [
            ("one ", "stop")
        ]


@settings(max_examples=60)
@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 3)),
)
def test_stop_strings_cut_the_same_text_however_it_arrives(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    answer = Answer(Request("r", (1,)), TOKENIZER, stops)
    tokens = [token for character in text for token in TOKENIZER.encode(character)]
    pieces = []
    while tokens and answer.finish_reason is None:
        size = sizes.pop() if sizes else 1
        pieces.append(answer.push(tokens[:size], None))
        tokens = tokens[size:]
    if answer.finish_reason is None:
        pieces.append(answer.push([], "length"))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_end = min(ends)[0] if ends else None
    cut = text if first_end is None else text[: min(start for end, start in ends if end == first_end)]
    assert "".join(pieces) == answer.text == cut
    assert answer.finish_reason == ("length" if first_end is None else "stop")
    assert answer.tokens == (len(text) if first_end is None else first_end)
