"""The `triserve` command as a process: what it prints, what it refuses, what it leaves behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import ServerProcess, free_port
from engine.config import EngineConfig
from serve_app.cli import main
from serve_app.config import AppConfig, load, ray_environment
from serve_app.local_server import StartError, cause, check

LOGS = "Ray's logs: there"
FOLDER = Path(EngineConfig().checkpoint)
HEAD = "diffusion_head.weight"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def pasted(screen: str, first: str, last: str) -> str:
    """The lines of the ready screen from the one that starts with `first` to the one with `last`, as they stand."""
    lines = screen.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    end = next(number for number in range(start, len(lines)) if last in lines[number])
    return "\n".join(lines[start : end + 1])


def test_the_curl_line_of_the_ready_screen_works(server: ServerProcess) -> None:
    command = pasted(server.screen, "curl ", "curl ")
    answer = subprocess.run(
        ["bash", "-c", f"{command} -s"], capture_output=True, text=True, check=True, timeout=60
    )
    assert '"finish_reason":"stop"' in answer.stdout


def test_the_python_snippet_of_the_ready_screen_works(server: ServerProcess) -> None:
    code = pasted(server.screen, "from openai import", "print(")
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "linear_spec" in answer.stdout


def test_the_ready_screen_tells_where_the_time_went(server: ServerProcess) -> None:
    for phase in ("imports", "ray", "serve", "engine", "http"):
        assert re.search(rf"\b{phase} \d+\.\d s", server.screen)
    assert f"ready: {server.url}" in server.screen and "triserve-tiny" in server.screen
    assert len(server.screen[server.screen.index("TriServe is ready") :].splitlines()) <= 24


def test_every_process_gets_rays_settings_from_the_configuration(server: ServerProcess) -> None:
    expected = ray_environment(AppConfig())
    replicas = [pid for pid, name in server.processes().items() if re.match("ray::(Serve|Proxy)", name)]
    assert len(replicas) >= 4  # controller, proxy, ingress, engine
    for pid in replicas:
        pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        assert {name: environment[name] for name in expected} == expected
        assert {name for name in environment if name.startswith("RAY_SERVE_")} <= set(expected)
        assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64


def test_it_listens_on_loopback_only(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10):
        pass
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {
        row[1].split(":")[0]
        for row in table
        if row[3] == "0A" and int(row[1].split(":")[1], 16) == server.port
    }
    assert hosts == {"0100007F"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.5, 3.0])
def test_an_interrupt_while_it_starts_leaves_nothing_behind(number: int, delay: float) -> None:
    starting = ServerProcess(free_port())
    starting.launch()
    time.sleep(delay)
    status = starting.stop(number)
    assert status == 0 or delay < 1  # before Python has read our handlers in, the signal itself ends it
    assert starting.processes() == {}


def test_a_checkpoint_that_does_not_fit_is_named_without_a_traceback(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.chmod(0o644)
    weights = load_file(file)
    del weights["encoder.norm.weight"]
    weights["surprise"] = torch.zeros(1)
    weights[HEAD] = weights[HEAD][:-1].clone()
    save_file(weights, file)
    broken = ServerProcess(free_port(), ["--checkpoint", str(tmp_path / "broken")])
    broken.launch()
    with broken.process, pytest.raises(AssertionError, match="did not start"):
        broken.wait_until_ready()
    assert broken.process.returncode == 1
    for sentence in (
        "missing encoder.norm.weight",
        "unexpected surprise",
        f"{HEAD} has shape {list(weights[HEAD].shape)}",
    ):
        assert sentence in broken.screen
    assert "Traceback" not in broken.screen
    assert broken.processes() == {}


def test_a_taken_port_is_told_before_anything_starts(
    taken_port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(taken_port)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1
    assert f"cannot listen on 127.0.0.1:{taken_port}" in answer.stderr and "--port" in answer.stderr
    assert time.monotonic() - began < 10 and "Traceback" not in answer.stderr


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_without_a_checkpoint_is_told(tmp_path: Path, folder: str) -> None:
    command = [sys.executable, "-m", "serve_app.cli", "serve", "--checkpoint", str(tmp_path / folder)]
    answer = subprocess.run(
        [*command, "--port", str(free_port())], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 1
    assert str(tmp_path / folder) in answer.stderr and "Traceback" not in answer.stderr


def test_a_wrong_configuration_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "triserve.yaml"
    file.write_text("server: {prot: 8000}")
    assert main(["serve", "--config", str(file)]) == 2
    assert "did you mean server.port?" in capsys.readouterr().err
    assert main(["doctor", "--port", "0"]) == 2
    assert "server.port must be between" in capsys.readouterr().err


def test_the_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--port", str(free_port())])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0 and all(line.startswith("ok ") for line in lines)
    for name in ("machine", "python", "torch", "triton", "ray", "checkpoint", "memory", "port"):
        assert any(line.split()[1] == name for line in lines)


def test_the_doctor_names_each_problem(
    taken_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text("engine: {device: 'cuda:99'}")
    arguments = ["--config", str(file), "--checkpoint", str(tmp_path), "--port", str(taken_port)]
    assert main(["doctor", *arguments]) == 1
    problems = [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("problem")
    ]
    assert {"checkpoint", "port"} <= set(problems)


def test_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["serve", "--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert len(capsys.readouterr().out.splitlines()) <= 24


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Traceback:\n  File x\nengine.config.CheckpointError: a lacks b", "a lacks b"),
        (
            "RuntimeError: Traceback\n  File x\nValueError: max: one\ntwo",
            "max: one\ntwo",
        ),
        ("Traceback\nMemoryError", f"MemoryError\n{LOGS}"),
        ("it just failed", f"it just failed\n{LOGS}"),
    ],
)
def test_the_cause_of_a_failed_start_is_its_last_exception(message: str, sentence: str) -> None:
    assert cause(message, "there") == sentence


def test_nothing_is_left_of_a_server_that_is_killed_with_its_terminal() -> None:
    starting = ServerProcess(free_port())
    starting.launch()
    time.sleep(2)
    os.kill(starting.process.pid, signal.SIGHUP)
    starting.process.communicate(timeout=30)
    assert starting.processes() == {}


def test_a_gpu_that_is_not_there_is_said_at_once() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(StartError, match="sees no GPU"):
        check(load(None, {"engine.device": "cuda", "server.port": free_port()}))


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("engine.device", "gpu", "engine.device must be cpu, cuda or cuda:<number>, not gpu"),
        ("engine.kv_tokens", 0, "engine.kv_tokens: 0 stands for a GPU's free memory"),
        ("engine.exact", True, "engine.exact is a property of the GPU kernels"),
    ],
)
def test_what_a_cpu_cannot_do_is_said_at_once(setting: str, value: object, sentence: str) -> None:
    with pytest.raises(StartError, match=sentence):
        check(load(None, {setting: value, "server.port": free_port()}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"engine.tensor_parallel": 3},
            "engine.tensor_parallel: 3 ranks cannot share out num_attention_heads 8",
        ),
        ({"draft.engine.tensor_parallel": 3}, "draft.engine.tensor_parallel: 3 ranks cannot share out"),
        ({"draft.engine.weights": "fp8"}, "draft.engine.weights: fp8 needs a GPU"),
    ],
)
def test_what_ranks_and_drafters_cannot_do_is_said_at_once(settings: dict[str, Any], sentence: str) -> None:
    config = load(None, {"topology": "staged", "server.port": free_port(), **settings})
    with pytest.raises(StartError, match=sentence):
        check(config)


def test_a_checkpoint_without_weights_is_said_at_once(tmp_path: Path) -> None:
    bundled = Path(load(None, {}).engine.checkpoint)
    for file in bundled.glob("*.json*"):
        shutil.copy(file, tmp_path)
    for file in bundled.glob("*.jinja"):
        shutil.copy(file, tmp_path)
    settings = {"engine.checkpoint": str(tmp_path), "server.port": free_port()}
    with pytest.raises(
        StartError, match="has no model.safetensors; --load-format dummy draws random weights"
    ):
        check(load(None, settings))
    check(load(None, {**settings, "engine.load_format": "dummy"}))


def test_the_doctor_counts_the_cache(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text("engine: {kv_tokens: 1000000000}")
    assert main(["doctor", "--config", str(file), "--port", str(free_port())]) == 1
    assert "GiB are wanted" in capsys.readouterr().out


def test_a_plan_is_a_configuration_with_its_reasons_in_comments(capsys: pytest.CaptureFixture[str]) -> None:
    model = "nvidia/Nemotron-Labs-Diffusion-14B"
    arguments = ["plan", "--model", model, "--gpu", "gb200", "--nodes", "18"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    assert settings["replicas"] == 72 and settings["engine"]["tensor_parallel"] == 1
    assert "PREDICTED, not measured" in text and max(map(len, text.splitlines())) <= 120
    for mode in ("ar", "linear_spec", "quadratic_spec", "diffusion"):
        assert re.search(rf"^#   {mode} .*\d", text, re.M)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == settings
    documented = (Path(__file__).parent.parent / "docs" / "topology.md").read_text()
    assert text in documented


def test_a_plan_reads_the_geometry_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--model", str(FOLDER), "--gpu", "h100", "--context", "512"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["engine"]["checkpoint"] == str(FOLDER)
    assert main(["plan", "--model", str(tmp_path), "--gpu", "h100"]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--model", "x", "--gpu", "a100"], 2, "invalid choice: 'a100' (choose from "),
        (
            ["--model", "x", "--gpu", "h100", "--nodes", "0"],
            2,
            "must be a whole number between 1 and 128, not 0",
        ),
        (["--model", "x", "--gpu", "h100", "--context", "-1"], 2, "must be a whole number between 1 and"),
        (
            ["--model", "nvidia/x", "--gpu", "h100"],
            1,
            "neither a folder nor one of nvidia/Nemotron-Labs-Diffusion-3B",
        ),
        (
            ["--model", "nvidia/Nemotron-Labs-Diffusion-14B", "--gpu", "h100", "--gpus-per-node", "1"],
            1,
            "2 GPUs in one NVLink domain would do",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_told(
    arguments: list[str], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["plan", *arguments])
    except SystemExit as error:
        found = int(str(error.code))
    assert found == status and sentence in capsys.readouterr().err
