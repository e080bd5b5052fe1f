"""The `triserve` command. Imports Ray only once the configuration has set its environment."""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.plan import PlanError
from engine.config import MODES, CheckpointError
from serve_app.config import AppConfig, ConfigError, load
from serve_app.doctor import report
from serve_app.local_server import LocalServer, StartError
from serve_app.plan import add_options, run
from serve_app.supervisor import supervise

USAGE_ERROR = 2
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EXPOSED = "Other machines can reach it, and it asks nobody for a key: put a gateway in front."
FAILURE = 1
LOOK_SECONDS = 0.2  # between looks for a SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a failure, 2 for a wrong command line or configuration."""
    options = _parser().parse_args(arguments)
    if options.command == "plan":
        return _plan(options)
    try:
        config = load(options.config, _overrides(options))
    except ConfigError as error:
        print(f"triserve: {error}", file=sys.stderr)
        return USAGE_ERROR
    command = _doctor if options.command == "doctor" else _serve
    return command(config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triserve", description="Serve Nemotron-Labs-Diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in (
        ("serve", "start a server on this machine"),
        ("doctor", "check this machine, the checkpoint and the port"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("--config", type=Path, metavar="FILE", help="YAML with any setting")
        command.add_argument(
            "--checkpoint", metavar="DIR|ORG/NAME@COMMIT", help="a folder, or a commit on Hugging Face"
        )
        command.add_argument(
            "--load-format", choices=["safetensors", "dummy"], help="dummy: random weights, for benchmarks"
        )
        command.add_argument("--host", help="default: 127.0.0.1")
        command.add_argument("--port", type=int, help="default: 8000")
        command.add_argument(
            "--mode", choices=["auto", *MODES], help="decoding mode of requests that name none"
        )
    description = "derive replicas, tensor parallelism and memory from a pool of GPUs; prints a configuration"
    add_options(commands.add_parser("plan", help=description, description=description))
    return parser


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "engine.checkpoint": options.checkpoint and _absolute(options.checkpoint),
        "engine.load_format": options.load_format,
        "server.host": options.host,
        "server.port": options.port,
        "engine.default_mode": options.mode,
    }
    return {place: value for place, value in given.items() if value is not None}


def _absolute(checkpoint: str) -> str:
    """Servers run in a folder of their own; what is no folder here is left for the check to judge."""
    return os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint


def _plan(options: argparse.Namespace) -> int:
    try:
        print(run(options))
    except (PlanError, CheckpointError) as error:
        print(f"triserve: {error}", file=sys.stderr)
        return FAILURE
    return 0


def _doctor(config: AppConfig) -> int:
    return 0 if report(config, print) else FAILURE


def _serve(config: AppConfig) -> int:
    print(f"TriServe starts {config.model_name} ({config.engine.checkpoint})", flush=True)
    status = supervise(lambda: _serve_forever(config))
    if status == 0:
        print("\nTriServe has stopped.", flush=True)
    return status


def _serve_forever(config: AppConfig) -> int:
    began = time.perf_counter()
    server = LocalServer(config, lambda phase, seconds: print(f"  {phase:<8} {seconds:5.1f} s", flush=True))
    try:
        server.start()
    except StartError as error:
        print(f"triserve: {error}", file=sys.stderr)
        return FAILURE
    terminated: list[int] = []  # signals; an Event's lock is not for signal handlers
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    print(ready_screen(server, time.perf_counter() - began), flush=True)
    while not terminated:
        time.sleep(LOOK_SECONDS)  # and not signal.pause, which a signal just before it does not end
    print("TriServe takes no more requests and finishes those it has.", flush=True)
    left = server.drain()
    if left:
        print(f"serve.drain_seconds are over: {left} answers are cut.", file=sys.stderr)
    return 0


def ready_screen(server: LocalServer, seconds: float) -> str:
    """What a user needs next: where it is, what it speaks, two things to paste, how long it took, how to stop it."""
    name, config = server.model["id"], server.config
    question = {"model": name, "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
    inner = ", ".join(f"{phase} {spent:.1f} s" for phase, spent in server.engine_phases.items())
    notes = {"engine": f" ({inner})"}
    phases = [f"{phase} {spent:.1f} s{notes.get(phase, '')}" for phase, spent in server.phases.items()]
    exposed = "" if config.server.host in LOOPBACK else f"\n{EXPOSED}"
    return f"""
TriServe is ready: {server.url}{exposed}

  model    {name}, context {server.model["max_model_len"]} tokens
  modes    {", ".join(server.model["modes"])} (default {config.effective_engine.default_mode}; set "mode" per request)

curl {server.url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(json.dumps(question))}

from openai import OpenAI
client = OpenAI(base_url="{server.url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="{name}",
    messages=[{{"role": "user", "content": "What is 2 + 3?"}}],
    extra_body={{"mode": "linear_spec"}},
)
print(answer.choices[0].message.content, answer.usage)

  started in {seconds:.1f} s: {" · ".join(phases)}
  stop     Ctrl-C
"""


if __name__ == "__main__":
    sys.exit(main())
