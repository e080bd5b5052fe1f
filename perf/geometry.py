"""Geometries for runs with dummy weights: those of the published checkpoints, and a small one for a CPU."""

import json
import tempfile
from pathlib import Path
from typing import Any

from cluster.published import FOLDER
from engine.config import ModelConfig

SIZES = ("3b", "8b", "14b", "toy")
TOY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


def raw_config(size: str) -> dict[str, Any]:
    """The config.json of a size; `toy` is the 3B's with small numbers."""
    raw: dict[str, Any] = json.loads(
        (FOLDER / f"nld_{'3b' if size == 'toy' else size}_config.json").read_text()
    )
    return raw | (TOY if size == "toy" else {})


def write_config(folder: Path, size: str) -> ModelConfig:
    """Makes the folder a checkpoint without weights, which `load_format="dummy"` can load; returns its geometry."""
    (folder / "config.json").write_text(json.dumps(raw_config(size)))
    return ModelConfig.from_json(folder / "config.json")


def geometry(size: str) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        return write_config(Path(folder), size)
