"""The one server that tests share: the real command, Ray, engine and tiny checkpoint. Started when first asked for."""

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import hypothesis
import pytest
import torch

if (
    not torch.cuda.is_available()
):  # kernels run in Triton's interpreter, if this is set before they are imported
    os.environ["TRITON_INTERPRET"] = "1"

# A busy machine is not a failing property.
hypothesis.settings.register_profile("triserve", deadline=None)
hypothesis.settings.load_profile("triserve")

MARK = "TRISERVE_TEST_MARK"
READY = "Ctrl-C"


@dataclass
class ServerProcess:
    """`triserve serve` as its users run it. All its processes carry `mark` in their environment."""

    port: int
    arguments: list[str] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    screen: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        command = [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(self.port), *self.arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, MARK: self.mark},
        )

    def wait_until_ready(self) -> None:
        """Reads the output up to the end of the ready screen, or all of it if the server does not start."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.screen += line
            if READY in line:
                return
        raise AssertionError(f"the server did not start:\n{self.screen}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; returns the exit status."""
        self.process.send_signal(number)
        self.screen += self.process.communicate(timeout=30)[0]
        return self.process.returncode

    def processes(self) -> dict[int, str]:
        """The command lines, by process id, of all that this server has started and that still runs."""
        return marked_processes(self.mark)


def marked_processes(mark: str) -> dict[int, str]:
    """The command lines, by process id, of all that run with a mark in the environment they were started in."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A running server with default settings."""
    running = ServerProcess(free_port())
    running.launch()
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client
