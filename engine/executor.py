"""What executes steps for an engine: here, a runner in the same process."""

from collections.abc import Sequence as Seq
from typing import Protocol

from engine.config import EngineConfig, ModelConfig
from engine.model import Model
from engine.output import StepOutput
from engine.runner import Runner
from engine.step import Step


class Executor(Protocol):
    """Executes packed steps strictly in the order in which they are given."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def has_adapter(self) -> bool: ...

    def run(self, steps: Seq[Step]) -> StepOutput:
        """Executes the steps one after the other. All but the last commit nothing; the output is the last one's."""
        ...


class LocalExecutor:
    """One rank in this process."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self.model_config, self.has_adapter = model.config, model.has_adapter
        self.runner = Runner(model, config)

    def run(self, steps: Seq[Step]) -> StepOutput:
        return self.runner.run(steps)
