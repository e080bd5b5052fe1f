"""The geometry of the published checkpoints, for runs with dummy weights.

Source: their config.json. `toy` has the same layout and is for a CPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ModelConfig

RANK = 128  # of linear_spec_lora


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs between the sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    theta: float


SHAPES = {
    "3b": Shape(26, 3072, 9216, 32, 8, 128, 131072, 1e6),
    "8b": Shape(34, 4096, 14336, 32, 8, 128, 131072, 1e6),
    "14b": Shape(40, 5120, 16384, 32, 8, 128, 131072, 1e9),
    "toy": Shape(2, 128, 256, 8, 2, 32, 512, 1e6),
}


def raw_config(size: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a size; changes replace keys of it."""
    shape = SHAPES[size]
    return {
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "block_size": 32,
        "mask_token_id": 100,
        "bos_token_id": 1,
        "eos_token_id": 11,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": shape.theta,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        **changes,
    }


def write_config(folder: Path, size: str, **changes: Any) -> ModelConfig:
    """Makes the folder a checkpoint without weights, which `load_format="dummy"` can load; returns its geometry."""
    (folder / "config.json").write_text(json.dumps(raw_config(size, **changes)))
    return ModelConfig.from_json(folder / "config.json")
