"""The checkpoint folder: the files of an NLD checkpoint, and writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny.network import Adapter
from engine.tiny.vocabulary import BOS, EOS, MASK, tokenizer_config

FOLDER = Path(__file__).parent / "checkpoint"

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "vocab_size": 1536,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 16.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "block_size": 32,
    "mask_token_id": MASK,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "dlm_paradigm": "bidirectional",
    "ar_loss_weight": 1.0,
    "dlm_loss_weight": 1.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": False,
}
GENERATION_CONFIG = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "use_cache": False}
RANK = 16
ALPHA = 4 * RANK


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def save_base(folder: Path, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Configuration, tokenizer and bf16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer_config.json", tokenizer_config(CONFIG["max_position_embeddings"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    halves = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """The draft adapter, in PEFT's layout."""
    target = folder / "linear_spec_lora"
    target.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["o_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write_json(target / "adapter_config.json", settings)
    save_file(adapter.tensors(), target / "adapter_model.safetensors", metadata={"format": "pt"})
