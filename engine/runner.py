"""One rank: the model, the KV memory and the device tables. Executes steps in order; plans nothing."""

import time
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import expand
from engine.config import CheckpointError, EngineConfig, ModelConfig
from engine.model import Model
from engine.settle import Settler, StepOutput
from engine.state import Tables
from engine.step import Step, slack
from engine.weights import load_weights


class Runner:
    """Runs packed steps. `forward_seconds` adds up the time inside the model's forward."""

    def __init__(self, model: Model, config: EngineConfig, max_model_len: int, block_length: int) -> None:
        self.model, self.page_size = model, config.page_size
        length = max_model_len + slack(block_length, config.quadratic_block_length)
        columns = -(-length // config.page_size)
        self.tables = Tables(config.max_running, length, columns, model.config.mask_id, model.device)
        geometry, pages = model.config, config.kv_tokens // config.page_size
        shape = (geometry.num_layers, pages, config.page_size, 2 * geometry.num_kv_heads, geometry.head_dim)
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.forward_seconds = 0.0

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutput:
        """Executes a step; its output may still be on the device."""
        self.tables.update(step)
        batch = expand(step, self.tables, self.page_size, self.model.dtype)
        start = time.perf_counter()
        hidden = self.model.forward(batch, self.kv)
        self.forward_seconds += time.perf_counter() - start
        return Settler(step, batch, self.tables, hidden, self._head).run()

    def _head(self, hidden: Tensor) -> Tensor:
        start = time.perf_counter()
        logits = self.model.head(hidden)
        self.forward_seconds += time.perf_counter() - start
        return logits


def load_model(config: EngineConfig) -> Model:
    """Loads the checkpoint that the configuration names. Raises CheckpointError."""
    folder = Path(config.checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    geometry = ModelConfig.from_json(folder / "config.json")
    dtype: torch.dtype = getattr(torch, config.dtype)
    weights = load_weights(folder, geometry, dtype, torch.device(config.device))
    positions = max_model_len(config, geometry) + slack(
        default_block_length(config, geometry), config.quadratic_block_length
    )
    return Model(geometry, weights, positions)


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Longest prompt and answer together, in tokens."""
    return min(config.max_model_len or model.max_position, model.max_position)


def default_block_length(config: EngineConfig, model: ModelConfig) -> int:
    """Block length where nobody asks for another, in tokens."""
    return config.block_length or model.block_length
