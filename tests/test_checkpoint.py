"""A checkpoint is a folder, or one commit of a repository on Hugging Face: here on a hub of ours, over real HTTP."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import free_port
from engine.checkpoint import fingerprint, local_folder, short_name
from engine.config import CheckpointError, EngineConfig, ModelConfig
from fakes import TOY, write_checkpoint
from serve_app.cli import main

BUNDLED = Path(EngineConfig().checkpoint)
REPOSITORY = "nvidia/Nemotron-Labs-Diffusion-14B"
COMMIT = "f8c3e2c078e193599b8882d965b1001c456ba738"
PINNED = f"{REPOSITORY}@{COMMIT}"
EVIL = (
    "modeling_nemotron_labs_diffusion.py",
    "pytorch_model.bin",
    "training.pt",
    "original/consolidated.safetensors",
)


class Hub:
    """Answers what Hugging Face's client asks for to download one commit of one repository. `asked`: paths of
    all requests; `sent`: names of files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        self.sent: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                resolve = f"/{REPOSITORY}/resolve/{COMMIT}/"
                if path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
                    listing = [
                        {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                        for name, data in files.items()
                    ]
                    self.answer(json.dumps(listing).encode(), "application/json")
                elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                    name = path.removeprefix(resolve)
                    if self.command == "GET":
                        hub.sent.append(name)
                    self.answer(files[name], "application/octet-stream")
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def answer(self, body: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{etag(body)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Serves the bundled checkpoint and, beside it, files that no one should fetch."""
    files = {
        str(path.relative_to(BUNDLED)): path.read_bytes() for path in BUNDLED.rglob("*") if path.is_file()
    }
    with Hub(
        files | {name: b"raise SystemExit" for name in EVIL} | {"chat_template.jinja": b"{{ messages }}"}
    ) as hub:
        yield hub


@pytest.fixture(autouse=True)
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets Hugging Face's client in this process use the hub and an empty cache, which it returns."""
    from huggingface_hub import constants

    hub.asked.clear()
    hub.sent.clear()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_pinned_checkpoint_is_downloaded_without_code_or_pickles(hub: Hub) -> None:
    folder, wanted = local_folder(PINNED), names(BUNDLED)
    assert names(folder) == wanted | {"chat_template.jinja"}
    assert all((folder / name).read_bytes() == (BUNDLED / name).read_bytes() for name in wanted)
    assert not set(hub.sent) & set(EVIL)


def test_what_is_in_the_cache_needs_no_network(hub: Hub) -> None:
    folder = local_folder(PINNED)
    hub.asked.clear()
    assert local_folder(PINNED) == folder and local_folder(PINNED, weights=False) == folder
    assert hub.asked == []


def test_the_ingress_fetches_no_weights_and_the_engine_adds_them(hub: Hub) -> None:
    folder = local_folder(PINNED, weights=False)
    assert (folder / "tokenizer.json").exists() and not list(folder.rglob("*.safetensors"))
    assert local_folder(PINNED) == folder and (folder / "model.safetensors").exists()
    assert (folder / "linear_spec_lora" / "adapter_model.safetensors").exists()


def test_a_repository_that_is_not_there_is_told() -> None:
    with pytest.raises(CheckpointError, match=f"cannot download nobody/nothing@{COMMIT}"):
        local_folder(f"nobody/nothing@{COMMIT}")


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    with pytest.raises(CheckpointError, match=f"cannot download {PINNED}"):
        local_folder(PINNED)


@pytest.mark.parametrize("revision", ["", "@", "@main", f"@{COMMIT[:8]}", f"@{COMMIT.upper()}"])
def test_a_revision_that_can_move_is_refused_with_the_form_that_cannot(hub: Hub, revision: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint folder.*org/name@<40 hexadecimal digits>"):
        local_folder(REPOSITORY + revision)
    assert hub.asked == []


@pytest.mark.parametrize(
    "name", ["/nowhere/at@all", "nowhere", f"a/b/c@{COMMIT}", f"{PINNED}\n", f"../x/y@{COMMIT}"]
)
def test_what_is_neither_a_folder_nor_a_repository_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        local_folder(name)


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / f"name@{COMMIT}").mkdir(parents=True)
    assert local_folder(str(tmp_path)) == tmp_path
    assert local_folder(f"org/name@{COMMIT}") == Path(f"org/name@{COMMIT}")
    assert hub.asked == []


def test_clients_call_a_checkpoint_by_its_repository_or_folder(tmp_path: Path) -> None:
    assert short_name(PINNED) == REPOSITORY
    assert short_name(str(tmp_path / "mine")) == "mine"


def doctor(environment: dict[str, str], *arguments: str) -> str:
    """What `triserve doctor` says in a process of its own; asserts that it is content."""
    command = [sys.executable, "-m", "serve_app.cli", "doctor", "--port", str(free_port()), *arguments]
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**os.environ, **quiet, **environment}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_the_command_line_takes_a_repository(hub: Hub, tmp_path: Path) -> None:
    said = doctor({"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}, "--checkpoint", PINNED)
    assert f"{REPOSITORY}, 3.5 M parameters" in said


def test_the_command_line_takes_random_weights(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "dummy", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "random parameters" in doctor(
        {}, "--checkpoint", str(tmp_path / "dummy"), "--load-format", "dummy"
    )


def test_a_folder_of_a_relative_name_is_named_in_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The server's processes run in other folders.
    monkeypatch.chdir(BUNDLED.parent)
    main(["doctor", "--checkpoint", BUNDLED.name, "--port", str(free_port())])
    assert str(BUNDLED) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 0),
        ("hidden_size", -4),
        ("block_size", 0),
        ("vocab_size", math.inf),
        ("rms_norm_eps", math.nan),
        ("eos_token_id", [10**6]),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write_checkpoint(tmp_path, TOY)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError):
        ModelConfig.from_json(file)


def test_a_name_that_no_file_system_takes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        local_folder("x" * 5000)


def test_a_fingerprint_tells_checkpoints_apart_by_what_models_are_made_from(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for folder, seed in ((first, 1), (second, 1), (other, 2)):
        folder.mkdir()
        write_checkpoint(folder, TOY, seed)
    same = fingerprint(first)
    (second / "extra.json").write_text("{}")  # lies in some caches, and nobody reads it
    assert same == fingerprint(second) != fingerprint(other)
    (second / "config.json").write_text((first / "config.json").read_text() + " ")
    assert fingerprint(second) != same
    weights = bytearray((first / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (first / "model.safetensors").write_bytes(weights)
    assert fingerprint(first) != same


def test_a_fingerprint_reads_little_of_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write((8).to_bytes(8, "little") + b"{}      ")
        sparse.truncate(2**36)
    start = time.perf_counter()
    fingerprint(tmp_path)
    assert time.perf_counter() - start < 1
