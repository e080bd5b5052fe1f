"""Reads a checkpoint's safetensors, once every header fits the geometry. Never runs a checkpoint's code."""

import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint import ADAPTER
from engine.config import CheckpointError, ModelConfig
from engine.fp8 import quantise
from engine.progress import Progress
from engine.shapes import PUBLISHED_RANK, adapter_shapes, check_ranks, expected_shapes, share

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32", "F64")  # others hold what a mere cast would turn into garbage
DUMMY_ADAPTER_GAIN = 0.25  # of its share in what it is added to

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # what FP8 may hold


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint: its name and shape in a file, its name here, and what it is multiplied with."""

    file: Path
    stored: str
    shape: tuple[int, ...]
    name: str
    scale: float = 1.0


def contents(folder: Path, config: ModelConfig) -> list[Entry]:
    """Every tensor of a checkpoint folder, its adapter's included, from the headers alone.

    Raises CheckpointError naming what is missing, unexpected, elsewhere than the index says, or of another shape or
    type.
    """
    entries = [Entry(*found, name=found[1]) for found in _checked(*_files(folder), expected_shapes(config))]
    adapter = folder / ADAPTER
    if adapter.is_dir():
        rank, scale = _adapter_rank_and_scale(adapter / "adapter_config.json")
        file = adapter / "adapter_model.safetensors"
        for found in _checked([file], None, adapter_shapes(config, rank)):
            name = _adapter_name(found[1])
            entries.append(Entry(*found, name=name, scale=scale if name.endswith("lora_B") else 1.0))
    return entries


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    fp8: bool = False,
) -> dict[str, Tensor]:
    """One rank's share of all tensors by their names, and of the adapter's, if the checkpoint has one, as
    `encoder.layers.N.self_attn.o_proj.lora_{A,B}` with its scale folded into B. Of a tensor that ranks share out no
    more is read than the rank's slice.

    With `fp8` the weights of LINEARS are float8_e4m3fn and `encoder.layers.N.*_proj.scale` [rows] is float32; a slice
    by columns has scales of its own.

    Raises CheckpointError as `contents` does, and where the geometry cannot be shared out over the ranks.
    """
    check_ranks(config, ranks)
    entries = contents(folder, config)

    def read() -> Iterator[tuple[str, Tensor]]:
        with Progress(
            "weights", sum(math.prod(e.shape) for e in entries) // ranks * dtype.itemsize
        ) as progress:
            for file, of_file in groupby(entries, key=lambda entry: entry.file):
                try:
                    opened = safe_open(file, framework="pt")
                except (OSError, RuntimeError, SafetensorError) as error:
                    raise CheckpointError(f"{file}: {error}") from error
                with opened as tensors:
                    for entry in of_file:
                        part = tensors.get_slice(entry.stored)[share(entry.stored, entry.shape, rank, ranks)]
                        if entry.scale != 1:
                            part = part * entry.scale
                        # A copy, since the slice is a view of the whole file in memory.
                        own = torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
                        progress.add(own.nbytes)
                        yield entry.name, own

    return _collect(read(), fp8)


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    fp8: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random weights of a geometry, made on the device, in the form of `load_weights`, always with an adapter (of
    rank 128). Each tensor depends on the seed, its name and the device's generator alone. Logits are about normal."""
    check_ranks(config, ranks)
    names = {name: name for name in expected_shapes(config)}
    names |= {stored: _adapter_name(stored) for stored in adapter_shapes(config, PUBLISHED_RANK)}
    shapes = expected_shapes(config) | adapter_shapes(config, PUBLISHED_RANK)

    def draw() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator(device)
        for stored, name in names.items():
            shape = shapes[stored]
            whole = torch.ones(shape, dtype=dtype, device=device)
            if len(shape) > 1:
                deviation = 1.0 if "embed_tokens" in stored else shape[1] ** -0.5
                deviation *= DUMMY_ADAPTER_GAIN if "lora_B" in stored else 1.0
                generator.manual_seed(zlib.crc32(f"{seed} {stored}".encode()))
                whole.normal_(0.0, deviation, generator=generator)
            part = whole[share(stored, shape, rank, ranks)]
            yield name, part if part.shape == shape else part.clone(memory_format=torch.contiguous_format)

    return _collect(draw(), fp8)


def _collect(tensors: Iterable[tuple[str, Tensor]], fp8: bool) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors:
        layer, _, kind = name.rpartition(".")
        if fp8 and kind == "weight" and layer.endswith(LINEARS):
            weights[name], weights[f"{layer}.scale"] = quantise(tensor)
        else:
            weights[name] = tensor
    return weights


def _files(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files of a checkpoint, and where its index puts each tensor; None without an index."""
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return [folder / SINGLE], None
    try:
        placed = {
            str(name): folder / file for name, file in json.loads(index.read_text())["weight_map"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: {error!r}") from error
    files = sorted(set(placed.values()))
    elsewhere = [file for file in files if file.parent != folder or not file.name.endswith(".safetensors")]
    if elsewhere or not files:
        named = f"{elsewhere[0]}, which is not one" if elsewhere else "none"
        raise CheckpointError(f"{index} must name safetensors files of its folder, and names {named}")
    return files, placed


def _checked(
    files: list[Path], placed: dict[str, Path] | None, shapes: dict[str, tuple[int, ...]]
) -> list[tuple[Path, str, tuple[int, ...]]]:
    """File, name and shape of every tensor, once they are what `shapes` and the index say."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    problems: list[str] = []
    for file in files:
        try:
            # As numpy: torch would map the whole file at once, which takes as much memory as it is long.
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():
                    header = tensors.get_slice(name)
                    if name in found:
                        problems.append(f"{name} is in {found[name][0].name} and in {file.name}")
                    if header.get_dtype() not in DTYPES:
                        problems.append(
                            f"{name} has type {header.get_dtype()}, not one of {', '.join(DTYPES)}"
                        )
                    found[name] = (file, tuple(header.get_shape()))
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    problems += [f"missing {name} {list(shapes[name])}" for name in sorted(shapes.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - shapes.keys())]
    problems += [
        f"{name} has shape {list(found[name][1])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name][1] != shape
    ]
    if placed is not None:
        problems += [
            f"{name} is not in {placed[name].name if name in placed else 'the index'}, but in {file.name}"
            for name, (file, _) in found.items()
            if placed.get(name) != file
        ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointError(f"{files[0].parent} does not fit its config.json: " + "; ".join(shown))
    return [(file, name, shape) for name, (file, shape) in found.items()]


def _adapter_name(stored: str) -> str:
    return stored.removeprefix("base_model.model.").removesuffix(".weight")


def _adapter_rank_and_scale(path: Path) -> tuple[int, float]:
    try:
        raw = json.loads(path.read_text())
        rank, targets = int(raw["r"]), raw["target_modules"]
        scale = float(raw["lora_alpha"]) / rank
        others = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias",
                  "layers_to_transform", "modules_to_save", "exclude_modules")  # fmt: skip
        plain = raw["peft_type"] == "LORA" and not any(raw.get(key) for key in others)
        plain = plain and raw.get("bias", "none") == "none" and math.isfinite(scale)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{path}: {error!r}") from error
    if targets != ["o_proj"] or not plain:
        raise CheckpointError(f"{path}: only plain LoRA on o_proj is supported, not {targets}")
    return rank, scale
