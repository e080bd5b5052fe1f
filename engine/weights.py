"""Reads a checkpoint's safetensors, once every header fits the geometry. Never runs a checkpoint's code."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import CheckpointError, ModelConfig

ADAPTER = "linear_spec_lora"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens.weight": (config.vocab_size, hidden),
        "encoder.norm.weight": (hidden,),
        "diffusion_head.weight": (config.vocab_size, hidden),
    }
    for index in range(config.num_layers):
        shapes |= {f"encoder.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def adapter_shapes(config: ModelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the draft adapter and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_layers):
        prefix = f"base_model.model.encoder.layers.{index}.self_attn.o_proj"
        shapes[f"{prefix}.lora_A.weight"] = (rank, config.num_heads * config.head_dim)
        shapes[f"{prefix}.lora_B.weight"] = (config.hidden_size, rank)
    return shapes


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """All tensors by their names, and the adapter's, if the checkpoint has one, as
    `encoder.layers.N.self_attn.o_proj.lora_{A,B}` with its scale folded into B.

    Raises CheckpointError naming what is missing, unexpected or of another shape.
    """
    files = sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]
    weights = _read(files, expected_shapes(config), dtype, device)
    adapter = folder / ADAPTER
    if adapter.is_dir():
        rank, scale = _adapter_rank_and_scale(adapter / "adapter_config.json")
        tensors = _read([adapter / "adapter_model.safetensors"], adapter_shapes(config, rank), dtype, device)
        for name, tensor in tensors.items():
            short = name.removeprefix("base_model.model.").removesuffix(".weight")
            weights[short] = tensor * scale if short.endswith("lora_B") else tensor
    return weights


def _read(
    files: list[Path], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    found[name] = (file, tuple(tensors.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    problems = [f"missing {name} {list(shapes[name])}" for name in sorted(shapes.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - shapes.keys())]
    problems += [
        f"{name} has shape {list(found[name][1])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name][1] != shape
    ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointError(f"{files[0].parent} does not fit its config.json: " + "; ".join(shown))
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                weights[name] = tensors.get_tensor(name).to(device, dtype)
    return weights


def _adapter_rank_and_scale(path: Path) -> tuple[int, float]:
    try:
        raw = json.loads(path.read_text())
        rank, targets = int(raw["r"]), raw["target_modules"]
        scale = float(raw["lora_alpha"]) / rank
        plain = raw["peft_type"] == "LORA" and not raw.get("use_dora") and not raw.get("use_rslora")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: {error!r}") from error
    if targets != ["o_proj"] or not plain:
        raise CheckpointError(f"{path}: only plain LoRA on o_proj is supported, not {targets}")
    return rank, scale
