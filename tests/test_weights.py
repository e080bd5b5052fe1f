"""A checkpoint is served only if it is exactly what its config.json says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import CheckpointError, EngineConfig
from engine.runner import load_model
from fakes import TOY, random_weights, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, TOY)
    return tmp_path


def load(folder: Path) -> None:
    load_model(EngineConfig(str(folder)))


def test_a_whole_checkpoint_loads_with_its_adapter_scaled(folder: Path) -> None:
    model = load_model(EngineConfig(str(folder), dtype="float64"))
    weights = random_weights(TOY, 0, torch.float32)
    assert model.has_adapter and model.config == TOY
    lora_b = model.layers[1].lora_b
    assert lora_b is not None
    torch.testing.assert_close(lora_b.float(), weights["encoder.layers.1.self_attn.o_proj.lora_B"])


def test_a_base_checkpoint_without_adapter_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TOY, adapter=False)
    assert not load_model(EngineConfig(str(tmp_path))).has_adapter


def change(folder: Path, edit: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    match edit:
        case "missing":
            del weights["encoder.layers.1.mlp.up_proj.weight"]
        case "extra":
            weights["encoder.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        case "shape":
            weights["diffusion_head.weight"] = torch.zeros(3, 4)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("missing", r"missing encoder\.layers\.1\.mlp\.up_proj\.weight \[32, 24\]"),
        ("extra", r"unexpected encoder\.layers\.9\.mlp\.up_proj\.weight"),
        ("shape", r"diffusion_head\.weight has shape \[3, 4\] instead of \[40, 24\]"),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, edit: str, said: str) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_many_wrong_tensors_are_counted_not_all_shown(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load(folder)


@pytest.mark.parametrize("key", ["mask_token_id", "head_dim", "rope_parameters", "block_size", "hidden_act"])
def test_a_missing_key_of_the_configuration_is_named(folder: Path, key: str) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw[key]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=key):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("attention_bias", True), ("model_type", "llama"), ("rope", "linear")],
)
def test_an_architecture_we_do_not_run_is_refused(folder: Path, key: str, value: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    if key == "rope":
        raw["rope_parameters"]["rope_type"] = value
    else:
        raw[key] = value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=str(value)):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "linear_spec_lora/adapter_config.json"])
def test_a_file_that_is_missing_or_garbage_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x00garbage")
    with pytest.raises(CheckpointError, match=Path(name).name):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=Path(name).name):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", None),
        ("vocab_size", None),
        ("rope_parameters", None),
        ("vocab_size", 3),
        ("num_key_value_heads", 3),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_the_files_name(folder: Path, key: str, value: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(CheckpointError, match="config.json"):
        load(folder)


def test_a_checkpoint_in_several_files_loads(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for part, some in enumerate((names[:9], names[9:]), 1):
        save_file({n: weights[n] for n in some}, folder / f"model-0000{part}-of-00002.safetensors")
    load(folder)


def test_an_adapter_of_another_kind_is_refused(folder: Path) -> None:
    path = folder / "linear_spec_lora" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"target_modules": ["q_proj"]}))
    with pytest.raises(CheckpointError, match="only plain LoRA on o_proj"):
        load(folder)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load(Path("nowhere"))
