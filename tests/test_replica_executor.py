"""A replica whose model several ranks share, behind a whole server."""

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from conftest import ServerProcess, free_port

QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 2 + 3?"}],
    "seed": 4,
    "max_tokens": 300,
    "ignore_eos": True,
    "mode": "ar",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose replica has two ranks."""
    settings = tmp_path_factory.mktemp("shared") / "two.yaml"
    settings.write_text("engine: {tensor_parallel: 2}")
    server = ServerProcess(free_port(), ["--config", str(settings)])
    server.launch()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def ask(url: str) -> str:
    reply = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60, trust_env=False)
    return str(reply.json()["choices"][0]["message"]["content"])


def test_an_answer_outlives_a_killed_rank_and_is_what_one_rank_says(
    shared: ServerProcess, server: ServerProcess
) -> None:
    expected = ask(server.url)
    assert len(expected) > 100 and ask(shared.url) == expected
    ranks = ranks_of(shared)
    assert len(ranks) == 2
    said: list[str] = []
    with httpx.stream(
        "POST",
        f"{shared.url}/v1/chat/completions",
        json=QUESTION | {"stream": True},
        timeout=60,
        trust_env=False,
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                assert "error" not in event
                said += [choice["delta"].get("content") or "" for choice in event["choices"]]
                if len(said) == 5:
                    os.kill(ranks[1], signal.SIGKILL)
    assert "".join(said) == expected
    after = ranks_of(shared)
    assert len(after) == 2 and not set(after) & set(ranks)


def ranks_of(server: ServerProcess) -> list[int]:
    return [number for number, command in server.processes().items() if "ray::RankWorker" in command]
