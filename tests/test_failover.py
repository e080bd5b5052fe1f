"""A server whose engines all stop for a while, and one that is told to end. One engine of several: test_chaos.py."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import ServerProcess, free_port
from engine.config import MODES

HEARTBEAT = 2.0  # seconds
TOKENS = 300

pytestmark = pytest.mark.timeout(600)  # engines start, and start again, on a machine that may be busy
ENGINE = "ray::ServeReplica:triserve:engine"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two engines, which a test may stop or kill but not the server itself."""
    file: Path = tmp_path_factory.mktemp("pair") / "pair.yaml"
    file.write_text(json.dumps({"replicas": 2, "serve": {"heartbeat_seconds": HEARTBEAT}}))
    server = ServerProcess(free_port(), ["--config", str(file)])
    server.launch()
    try:
        server.wait_until_ready()
        yield server
    finally:
        for pid in engines(server):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        server.stop()
    assert server.processes() == {}


def engines(server: ServerProcess) -> list[int]:
    return [pid for pid, name in server.processes().items() if ENGINE in name]


def client_of(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=240, trust_env=False)


def body_of(index: int, **fields: Any) -> dict[str, Any]:
    """A request of 300 tokens: all modes in turn, a seed for each, every third one greedy."""
    return {
        "prompt": f"Question {index}: tell me a story.",
        "mode": list(MODES)[index % len(MODES)],
        "seed": index,
        "temperature": 0.0 if index % 3 == 2 else 1.0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        **fields,
    }


def whole(client: httpx.Client, index: int) -> str:
    response = client.post("/v1/completions", json=body_of(index))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def streamed(client: httpx.Client, index: int) -> tuple[str, dict[str, Any]]:
    """The text and the usage of a stream, which must end in order."""
    body = body_of(index, stream=True, stream_options={"include_usage": True})
    text, usage = "", dict[str, Any]()
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for line in lines:
        chunk = json.loads(line)
        text += "".join(choice["text"] for choice in chunk["choices"])
        usage = chunk["usage"] or usage
    return text, usage


def ready(client: httpx.Client) -> list[dict[str, Any]]:
    """The replicas that serve; none if the server says that it is not ready."""
    response = client.get("/ready")
    assert response.status_code in (200, 503)
    return [] if response.status_code == 503 else list(response.json()["replicas"])


def wait_for(what: Any, seconds: float) -> float:
    """How long it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
    return time.monotonic() - began


def under_load(pair: ServerProcess, act: Any) -> int:
    """Streams and whole answers of all modes, half and half, while `act(client)` does harm: every one must be what it
    is without. Returns how many engines the streams outlived in all."""
    count = 12
    with client_of(pair) as client, ThreadPoolExecutor(count) as pool:
        wait_for(lambda: len(ready(client)) == 2, 60)
        expected = list(pool.map(lambda index: whole(client, index), range(count)))
        answers: list[Any] = [
            pool.submit(whole if index % 2 else streamed, client, index) for index in range(count)
        ]
        wait_for(lambda: sum(replica["running"] for replica in ready(client)) > count // 2, 30)
        act(client)
        resumed = 0
        for index, answer in enumerate(answers):
            result = answer.result()
            text, usage = (result, None) if index % 2 else result
            assert text == expected[index], f"request {index}"
            resumed += usage["decode"]["resumed"] if usage else 0
        wait_for(lambda: sum(map(idle, ready(client))) == 2, 60)
        return resumed


def idle(replica: dict[str, Any]) -> bool:
    """Whether nothing is left of any request."""
    whole_pool = replica["free_pages"] == replica["total_pages"]
    return bool(whole_pool and replica["running"] == replica["waiting"] == 0)


def test_an_engine_that_is_told_to_end_hands_its_requests_over(pair: ServerProcess) -> None:
    victim = engines(pair)[0]

    def terminate(client: httpx.Client) -> None:
        os.kill(victim, signal.SIGTERM)
        wait_for(lambda: any(replica["leaving"] for replica in ready(client)), 10)  # it was not just killed
        wait_for(lambda: victim not in engines(pair), 20)

    assert under_load(pair, terminate) > 0


def test_engines_that_all_stop_for_a_while_make_the_server_unready_within_ten_seconds_and_lose_nothing(
    pair: ServerProcess,
) -> None:
    def pause(client: httpx.Client) -> None:
        stopped = engines(pair)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: not ready(client), 10)
        time.sleep(
            HEARTBEAT
        )  # requests have left their engines, and come back to one that may still have them
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    assert under_load(pair, pause) > 0


def test_a_terminated_server_finishes_its_answers_and_takes_no_more() -> None:
    server = ServerProcess(free_port())
    server.launch()
    try:
        server.wait_until_ready()
        with client_of(server) as client, ThreadPoolExecutor(2) as pool:
            expected, _ = streamed(client, 1)
            answer, unary = pool.submit(streamed, client, 1), pool.submit(whole, client, 1)
            wait_for(lambda: ready(client)[0]["running"] == 2, 30)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not ready(client), 10)
            refusal = client.post("/v1/completions", json=body_of(2))
            assert refusal.status_code == 503 and refusal.json()["error"]["code"] == "draining"
            assert answer.result()[0] == unary.result() == expected
    finally:
        status = server.stop()
    assert status == 0 and server.processes() == {}
    assert "finishes those it has" in server.screen
