"""What executes steps for an engine: here, a runner in the same process."""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from engine.config import EngineConfig, ModelConfig
from engine.device import device_name, kv_tokens, use_device
from engine.model import Model
from engine.output import HostOutput, StepOutput
from engine.runner import Runner, load_model
from engine.selfcheck import check_graphs, check_kernels
from engine.step import Step


class Executor(Protocol):
    """Executes packed steps strictly in the order in which they are given.

    config: the engine's, with `kv_tokens` as many as there are. device_name: what the maker calls what it runs on.
    phases: the seconds of each part of its start.
    """

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def has_adapter(self) -> bool: ...

    @property
    def config(self) -> EngineConfig: ...

    @property
    def device_name(self) -> str: ...

    @property
    def phases(self) -> dict[str, float]: ...

    def run(self, steps: Seq[Step]) -> StepOutput:
        """Executes the steps one after the other. All but the last commit nothing; the output is the last one's. Raises
        RuntimeError if nothing can be executed any more."""
        ...

    def close(self) -> None:
        """Ends whatever it has started."""
        ...


class LocalExecutor:
    """One rank in this process."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self.model_config, self.has_adapter, self.config = model.config, model.has_adapter, config
        self.device_name = device_name(config.device)
        self.phases: dict[str, float] = {}
        self.runner = Runner(model, config)

    @classmethod
    def load(cls, config: EngineConfig) -> "LocalExecutor":
        """Loads the checkpoint that the configuration names, checks the kernels and captures the graphs. Raises
        CheckpointError, ValueError for what cannot be served here, and RuntimeError for kernels that are wrong."""
        phases: dict[str, float] = {}
        use_device(config.device)
        with phase(phases, "load the checkpoint"):
            model = load_model(config)
        with phase(phases, "set up the engine"):
            executor = cls(model, replace(config, kv_tokens=kv_tokens(config, model.config)))
        with phase(phases, "check and capture the kernels"):
            make_ready(executor.runner)
        executor.phases.update(phases)
        return executor

    def run(self, steps: Seq[Step]) -> HostOutput:
        return self.runner.run(steps)

    def close(self) -> None:
        pass


def make_ready(runner: Runner) -> None:
    """Checks the kernels and captures the graphs, before anybody is served. Raises RuntimeError."""
    check_kernels(runner)
    runner.capture()
    check_graphs(runner)


@contextmanager
def phase(phases: dict[str, float], name: str) -> Iterator[None]:
    """Notes the seconds that a part of the start takes."""
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start
