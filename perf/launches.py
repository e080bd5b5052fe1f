"""The kernels that the engine launches, recorded from the engine itself on tensors without memory."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from engine.batch import FIELDS, unpack_layout
from engine.config import EngineConfig, ModelConfig
from engine.fp8 import quantise
from engine.graphs import SIZES
from engine.model import Model
from engine.runner import Runner
from engine.shapes import expected_shapes
from kernels.backend import Launch, recording
from perf.geometry import geometry

META = torch.device("meta")
RANK = 128  # of linear_spec_lora


def engine_launches(size: str, tokens: Iterable[int], exact: bool = False, fp8: bool = False) -> list[Launch]:
    """What steps of so many query tokens launch at a published size in bfloat16, with the draft adapter and without."""
    shape = replace(geometry(size), num_layers=2)  # the first layer differs, the others are alike
    config = EngineConfig(
        dtype="bfloat16", page_size=64, kv_tokens=2**16, max_model_len=2**15, max_running=64
    )
    with recording() as launches, torch.inference_mode():
        runner = Runner(Model(shape, meta_weights(shape, fp8), 2**15 + 1024, exact), config)
        assert runner.graphs is not None
        for count in tokens:
            segments = torch.empty(FIELDS, min(count, config.max_running) + 1, dtype=torch.int64, device=META)
            for lora in (False, True):
                runner.graphs.execute(unpack_layout(segments, count, None, lora), False)
    return launches


def default_launches() -> list[Launch]:
    """The 14B at the ends of what decoding takes most."""
    return engine_launches("14b", (1, 32))


def all_launches() -> list[Launch]:
    """Every size of the model and number of query tokens that has a graph, and one beyond them; exact and not; and
    weights in eight bits."""
    launches: list[Launch] = []
    for size in ("14b", "8b", "3b"):
        for exact in (False, True):
            launches += engine_launches(size, (*SIZES, 1024), exact)
        launches += engine_launches(size, (8, 32, 128, 512), fp8=True)
    return launches


def meta_weights(config: ModelConfig, fp8: bool) -> dict[str, Tensor]:
    """The names and shapes of a checkpoint with the adapter; with fp8 as `load_weights` makes them for drafting."""
    shapes = dict(expected_shapes(config))
    for index in range(config.num_layers):
        prefix = f"encoder.layers.{index}.self_attn.o_proj"
        shapes[f"{prefix}.lora_A"] = (RANK, config.num_heads * config.head_dim)
        shapes[f"{prefix}.lora_B"] = (config.hidden_size, RANK)
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device=META) for name, shape in shapes.items()}
    for name in [name for name in weights if fp8 and name.endswith("_proj.weight")]:
        scale = f"{name.removesuffix('.weight')}.scale"
        weights[name], weights[scale] = quantise(weights[name])
    return weights
