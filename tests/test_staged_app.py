"""The served application with a draft pool: the real command, two stages, and the text of the colocated one."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from conftest import ServerProcess, free_port
from engine.config import MODES

DRAFTER = "ray::ServeReplica:triserve:draft"
STAGED = ("linear_spec", "diffusion")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    file: Path = tmp_path_factory.mktemp("staged") / "staged.yaml"
    file.write_text("topology: staged\ndraft: {patience_seconds: 2, engine: {kv_tokens: 8192}}\n")
    server = ServerProcess(free_port(), ["--config", str(file)])
    server.launch()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
    assert server.processes() == {}


def chat(server: ServerProcess, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text of an answer, and how it was decoded."""
    body = {"model": "triserve-tiny", "messages": [{"role": "user", "content": "What is 41 + 17?"}], **fields}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["decode"]


def drafter_of(server: ServerProcess) -> int:
    [pid] = [pid for pid, name in server.processes().items() if DRAFTER in name]
    return pid


def wait_for_drafts(server: ServerProcess) -> None:
    """Until the drafter is found again."""
    deadline = time.monotonic() + 200
    while not chat(server, mode="linear_spec", max_tokens=20, ignore_eos=True)[1]["drafted_elsewhere"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(300)
def test_every_mode_says_staged_what_it_says_colocated(server: ServerProcess, staged: ServerProcess) -> None:
    wait_for_drafts(staged)
    requests = [
        {"mode": mode, "seed": seed, "temperature": temperature, "max_tokens": 60}
        for mode in MODES
        for seed, temperature in ((1, 0), (2, 0.8))
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda fields: chat(staged, **fields), requests))
    for fields, (text, decode) in zip(requests, together, strict=True):
        expected, plain = chat(server, **fields)
        assert text == expected
        for name in ("drafted", "accepted", "denoise_passes"):
            assert decode[name] == plain[name]
        assert (decode["drafted_elsewhere"] > 0) == (fields["mode"] in STAGED)
        assert plain["drafted_elsewhere"] == 0


def streamed(server: ServerProcess, act: Callable[[int], None], **fields: Any) -> str:
    """The text of an answer as it comes, with the number of every line told to `act`."""
    messages = [{"role": "user", "content": "What is 41 + 17?"}]
    body = {"model": "triserve-tiny", "messages": messages, "stream": True, **fields}
    text = ""
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False
    ) as response:
        for number, line in enumerate(response.iter_lines()):
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            act(number)
    return text


@pytest.mark.timeout(300)  # a busy machine takes its time to start another drafter
def test_streams_outlive_their_drafter_and_the_next_one_is_found(staged: ServerProcess) -> None:
    wait_for_drafts(staged)
    killed = drafter_of(staged)
    fields = {"seed": 4, "max_tokens": 400, "ignore_eos": True, "temperature": 1.0}
    expected = {mode: chat(staged, mode=mode, **fields)[0] for mode in STAGED}
    flowing = Barrier(len(STAGED))

    def kill(number: int) -> None:
        if number == 4 and flowing.wait() == 0:
            os.kill(killed, signal.SIGKILL)

    with ThreadPoolExecutor(len(STAGED)) as threads:
        texts = list(threads.map(lambda mode: streamed(staged, kill, mode=mode, **fields), STAGED))
    assert dict(zip(STAGED, texts, strict=True)) == expected
    wait_for_drafts(staged)  # Serve has started another
    assert drafter_of(staged) != killed
