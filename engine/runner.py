"""One rank: the model, the KV memory and the device tables. Executes steps in order; plans nothing."""

import time

import torch
from torch import Tensor

from engine.batch import expand
from engine.checkpoint import local_folder
from engine.config import EngineConfig, ModelConfig, Sizes
from engine.fp8 import check_fp8
from engine.model import Model
from engine.settle import Settler, StepOutput
from engine.state import Tables
from engine.step import Step
from engine.weights import dummy_weights, load_weights


class Runner:
    """Runs packed steps. `forward_seconds` adds up the time inside the model's forward and head."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        self.model, self.page_size = model, config.page_size
        sizes = Sizes.of(config, model.config)
        length = sizes.max_model_len + sizes.slack
        columns = -(-length // config.page_size)
        canvas = max(sizes.block_length, config.quadratic_block_length)
        self.tables = Tables(config.max_running, length, columns, canvas, model.config.mask_id, model.device)
        geometry, pages = model.config, config.kv_tokens // config.page_size
        shape = (geometry.num_layers, pages, config.page_size, 2 * geometry.num_kv_heads, geometry.head_dim)
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.forward_seconds = 0.0

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutput:
        """Executes a step; its output may still be on the device."""
        self.tables.update(step)
        batch = expand(step, self.tables, self.page_size, self.model.dtype)
        attention = self.model.plan(batch, self.page_size)
        start = time.perf_counter()
        hidden = self.model.forward(batch, self.kv, attention)
        self.forward_seconds += time.perf_counter() - start
        return Settler(step, batch, self.tables, hidden, self._head).run()

    def _head(self, hidden: Tensor) -> Tensor:
        start = time.perf_counter()
        logits = self.model.head(hidden)
        self.forward_seconds += time.perf_counter() - start
        return logits


def load_model(config: EngineConfig) -> Model:
    """Loads the checkpoint that the configuration names. Raises CheckpointError, and ValueError as `Sizes` and
    `check_fp8` do."""
    dummy, device, fp8 = config.load_format == "dummy", torch.device(config.device), config.weights == "fp8"
    if fp8:
        check_fp8(device)
    folder = local_folder(config.checkpoint, weights=not dummy)
    geometry = ModelConfig.from_json(folder / "config.json")
    sizes = Sizes.of(config, geometry)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if dummy:
        weights = dummy_weights(geometry, dtype, device, fp8=fp8)
    else:
        weights = load_weights(folder, geometry, dtype, device, fp8=fp8)
    return Model(geometry, weights, sizes.max_model_len + sizes.slack)
