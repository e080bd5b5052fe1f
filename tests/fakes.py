"""Random checkpoints of the family's layout, and engines on them, for tests of exactness."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import EngineConfig, ModelConfig, RopeConfig, Sizes
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.model import Model
from engine.output import StepOutput
from engine.request import Delta, Request
from engine.segment import Pattern
from engine.shapes import expected_shapes
from engine.step import BLOCK, PATTERN, ROW, Step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the Triton kernels are tested
torch.set_num_threads(1)  # more threads than idle cores only wait for each other

TOY = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position=256,
    block_length=32,
    mask_id=7,
    bos_id=1,
    eos_ids=(3,),
    rope=RopeConfig(1e4, 16.0, 16, 32.0, 1.0, 1.0, 0.1),
)
TOY_ENGINE = EngineConfig(dtype="float64", page_size=4, kv_tokens=2048, max_running=8, max_batch_tokens=160)


def random_weights(
    config: ModelConfig, seed: int, dtype: torch.dtype, adapter: bool = True
) -> dict[str, Tensor]:
    """Random weights. The seed decides how flat the logits are: where they are flat, sampled drafts are mostly right,
    since they share their noise with the verifier, and where they are steep hardly ever."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)

    weights: dict[str, Tensor] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            weights[name] = 1 + random(*shape, scale=0.1)
        else:
            gain = 1.0 if name == "encoder.embed_tokens.weight" else 1.2 / shape[1] ** 0.5
            weights[name] = random(*shape, scale=gain)
    weights["diffusion_head.weight"] *= (4.0, 1.0, 0.2)[seed % 3]
    if adapter:
        for index in range(config.num_layers):
            prefix = f"encoder.layers.{index}.self_attn.o_proj"
            weights[f"{prefix}.lora_A"] = random(4, config.num_heads * config.head_dim, scale=0.3)
            weights[f"{prefix}.lora_B"] = random(config.hidden_size, 4, scale=0.3)
    return weights


def toy_model(seed: int, config: EngineConfig, geometry: ModelConfig = TOY, adapter: bool = True) -> Model:
    """A random model in the engine's dtype."""
    sizes, dtype = Sizes.of(config, geometry), getattr(torch, config.dtype)
    return Model(geometry, random_weights(geometry, seed, dtype, adapter), sizes.max_model_len + sizes.slack)


def toy_engine(seed: int = 0, adapter: bool = True, **settings: object) -> Engine:
    """An engine on a random model; settings replace those of TOY_ENGINE."""
    config = replace(TOY_ENGINE, **settings)  # type: ignore[arg-type]
    return Engine(config, LocalExecutor(toy_model(seed, config, adapter=adapter), config))


class DrafterExecutor(LocalExecutor):
    """Replaces every linear draft by what `drafter(row, position)` says."""

    def __init__(self, model: Model, config: EngineConfig, drafter: Callable[[int, int], int]) -> None:
        super().__init__(model, config)
        self.drafter = drafter

    def run(self, steps: Sequence[Step]) -> StepOutput:
        tables = self.runner.tables
        for step in steps:
            output = super().run([step])
            for segment in step.segments[step.segments[:, PATTERN] == Pattern.CANVAS]:
                row, cached = int(segment[ROW]), int(tables.cached[segment[ROW]])
                for position in range(cached + 1, cached + int(segment[BLOCK])):
                    tables.tokens[row, position] = self.drafter(row, position)
        return output


def random_prompt(chance: random.Random, length: int) -> tuple[int, ...]:
    """Any tokens but the mask."""
    return tuple(chance.choice([t for t in range(TOY.vocab_size) if t != TOY.mask_id]) for _ in range(length))


def ar_answer(seed: int, request: Request) -> list[int]:
    """What a plain AR engine, all by itself, answers to the request."""
    alone = replace(request, mode="ar", generated=())
    return generate(toy_engine(seed), [alone])[request.id]


def generate(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Runs the requests to their ends; returns the answer of each, journalled tokens included."""
    for request in requests:
        engine.add(request)
    answers = {request.id: list(request.generated) for request in requests}
    for delta in run(engine):
        for name, change in delta.items():
            answers[name].extend(change.token_ids)
    return answers


def run(engine: Engine) -> list[dict[str, Delta]]:
    """Steps an engine until it is idle, checking its pages all the way."""
    reports = []
    while not engine.idle:
        reports.append(engine.step())
        engine.scheduler.pool.check([s.pages for s in engine.scheduler.running])
        assert len(reports) < 5000, "the engine makes no progress"
    return reports


def write_checkpoint(folder: Path, config: ModelConfig, seed: int = 0, adapter: bool = True) -> None:
    """Writes a random checkpoint in the family's layout, adapter scale 4."""
    weights = random_weights(config, seed, torch.float32, adapter)
    names = expected_shapes(config)
    save_file({name: weights[name] for name in names}, folder / "model.safetensors")
    rope = config.rope
    raw = {
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "block_size": config.block_length,
        "mask_token_id": config.mask_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": rope.query_scaling_beta,
        },
    }
    (folder / "config.json").write_text(json.dumps(raw))
    if adapter:
        lora = folder / "linear_spec_lora"
        lora.mkdir()
        settings = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["o_proj"],
            "use_dora": False,
        }
        (lora / "adapter_config.json").write_text(json.dumps(settings))
        tensors = {
            f"base_model.model.{name}.weight": tensor / 4 if name.endswith("B") else tensor
            for name, tensor in weights.items()
            if name not in names
        }
        save_file(tensors, lora / "adapter_model.safetensors")
