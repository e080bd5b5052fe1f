"""A checkpoint is served only if it is exactly what its config.json says."""

import hashlib
import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from cluster.published import FOLDER
from engine.config import CheckpointError, EngineConfig, ModelConfig
from engine.fp8 import dequantise
from engine.runner import load_model
from engine.shapes import adapter_shapes, expected_shapes
from engine.weights import INDEX, SINGLE, contents, dummy_weights, load_weights
from fakes import DEVICE, TOY, random_weights, write_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
CPU = torch.device("cpu")


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


def shard(folder: Path) -> dict[str, str]:
    """Splits a checkpoint's file in two, without an index; returns where each tensor is."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: weights[n] for n in names if places[n] == file}, folder / file)
    return places


def test_a_checkpoint_in_several_files_loads_by_its_index(folder: Path) -> None:
    whole = load_weights(folder, TOY, torch.float32, CPU)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard(folder)}))
    parts = load_weights(folder, TOY, torch.float32, CPU)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_several_files_without_an_index_are_not_guessed_to_be_one_checkpoint(folder: Path) -> None:
    shard(folder)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(folder)


def test_an_index_that_contradicts_the_headers_is_told(folder: Path) -> None:
    places = shard(folder)
    moved, left_out = "encoder.norm.weight", "diffusion_head.weight"
    places[moved] = places[left_out]
    assert load_file(folder / places.pop(left_out))
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert f"{moved} is not in model-00001-of-00002.safetensors, but in model-00002" in str(error.value)
    assert f"{left_out} is not in the index, but in model-00001-of-00002.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "sub/model.safetensors", "model.bin", "absent.safetensors", "a\0.safetensors"],
)
def test_an_index_names_nothing_but_safetensors_files_of_its_folder(folder: Path, name: str) -> None:
    places = shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": places | {"encoder.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize("garbage", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {}}'])
def test_an_index_of_another_form_is_named(folder: Path, garbage: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(garbage)
    with pytest.raises(CheckpointError, match="index.json"):
        load(folder)


def test_a_tensor_in_two_files_is_told(folder: Path) -> None:
    places = shard(folder)
    first, second = sorted(set(places.values()))
    save_file(load_file(folder / first) | load_file(folder / second), folder / second)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=f"is in {first} and in {second}"):
        load(folder)


def test_weights_of_a_type_that_a_cast_would_ruin_are_refused(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    name = "encoder.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=f"{name} has type F8_E4M3"):
        load(folder)


def test_the_adapters_scale_is_folded_in_before_it_is_rounded(folder: Path) -> None:
    path = folder / "linear_spec_lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 5}))  # scale 1.25
    name = "encoder.layers.1.self_attn.o_proj.lora_B"
    stored = load_file(path.with_name("adapter_model.safetensors"))[f"base_model.model.{name}.weight"]
    assert stored.dtype is torch.float32
    loaded = load_weights(folder, TOY, torch.bfloat16, CPU)[name]
    assert loaded.dtype is torch.bfloat16 and torch.equal(loaded, (stored * 1.25).bfloat16())


def published(size: str) -> dict[str, Any]:
    """Header of a published checkpoint: repository, commit, geometry, SHA-256 of the header's bytes, file size."""
    found: dict[str, Any] = json.loads((FIXTURES / "nld_headers.json").read_text())[size]
    return found


def sparse_file(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> tuple[str, int]:
    """Writes a safetensors file whose data is a hole; returns the SHA-256 of its header and the bytes of its data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items()):
        begin, end = end, end + math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return hashlib.sha256(text).hexdigest(), end


@pytest.mark.parametrize("size", ["3b", "8b", "14b"])
def test_the_headers_of_the_published_checkpoints_pass(tmp_path: Path, size: str) -> None:
    facts = published(size)
    config_file = FOLDER / f"nld_{size}_config.json"
    shutil.copy(config_file, tmp_path / "config.json")
    config = ModelConfig.from_json(config_file)
    base = {name: ("BF16", list(shape)) for name, shape in expected_shapes(config).items()}
    if size == "14b":  # whose header is a fixture, so that nothing of ours says what is in it
        fixture = json.loads((FIXTURES / "nld_14b_header.json").read_text())
        base = {name: (dtype, shape) for name, (dtype, *shape) in fixture.items()}
    adapter = {name: ("F32", list(shape)) for name, shape in adapter_shapes(config, 128).items()}
    # The hashes are of the official files' headers: these are their very bytes.
    assert sparse_file(tmp_path / SINGLE, base) == (facts["header_sha256"], facts["bytes"])
    (tmp_path / "linear_spec_lora").mkdir()
    lora = tmp_path / "linear_spec_lora" / "adapter_model.safetensors"
    assert sparse_file(lora, adapter)[0] == facts["adapter_header_sha256"]
    (lora.with_name("adapter_config.json")).write_text(json.dumps(facts["adapter_config"]))
    assert tmp_path.joinpath(SINGLE).stat().st_blocks * 512 < 2**20

    entries = contents(tmp_path, config)
    assert {entry.stored: list(entry.shape) for entry in entries} == {
        n: s for n, (_, s) in (base | adapter).items()
    }
    assert {entry.scale for entry in entries if entry.name.endswith("lora_B")} == {4.0}
    assert {entry.scale for entry in entries if not entry.name.endswith("lora_B")} == {1.0}


@pytest.mark.parametrize("edit", ["truncated", "longer", "overlapping"])
def test_a_file_that_is_not_what_its_header_says_is_refused_before_it_is_read(
    folder: Path, edit: str
) -> None:
    path = folder / SINGLE
    content = path.read_bytes()
    match edit:
        case "truncated":
            path.write_bytes(content[:-1])
        case "longer":
            path.write_bytes(content + b"x")
        case "overlapping":
            path.write_bytes(content.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1))
    with pytest.raises(CheckpointError, match=SINGLE):
        contents(folder, TOY)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shares_of_all_ranks_make_up_every_tensor(tmp_path: Path, ranks: int) -> None:
    config = replace(TOY, num_kv_heads=4)
    write_checkpoint(tmp_path, config)
    whole = load_weights(tmp_path, config, torch.float32, CPU)
    shares = [load_weights(tmp_path, config, torch.float32, CPU, rank, ranks) for rank in range(ranks)]
    rows = ("embed_tokens.weight", "diffusion_head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight",
            "gate_proj.weight", "up_proj.weight")  # fmt: skip
    columns = ("o_proj.weight", "down_proj.weight", "lora_A")
    for name, tensor in whole.items():
        parts = [share[name] for share in shares]
        if name.endswith(rows):
            assert torch.equal(torch.cat(parts, 0), tensor)
        elif name.endswith(columns):
            assert torch.equal(torch.cat(parts, 1), tensor)
        else:
            assert all(torch.equal(part, tensor) for part in parts)


def test_a_rank_keeps_nothing_but_its_share(folder: Path) -> None:
    weights = load_weights(folder, TOY, torch.float32, DEVICE, 1, 2)
    down = weights["encoder.layers.0.mlp.down_proj.weight"]
    assert down.shape == (24, 16)
    for tensor in weights.values():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (4, "num_key_value_heads 2"),
        (3, "num_attention_heads 4"),
        (16, "vocab_size 40"),
        (5, "intermediate_size 32"),
    ],
)
def test_what_ranks_cannot_share_out_evenly_is_named(folder: Path, ranks: int, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"{ranks} ranks cannot share out .*{said}"):
        load_weights(folder, TOY, torch.float32, CPU, 0, ranks)


def only_configuration(folder: Path) -> str:
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return str(folder)


def test_random_weights_need_no_file_of_weights_and_have_an_adapter(folder: Path) -> None:
    config = EngineConfig(only_configuration(folder), load_format="dummy")
    first, second = load_model(config), load_model(config)
    assert first.has_adapter and first.layers[0].lora_a is not None and len(first.layers[0].lora_a) == 128
    assert torch.equal(first.output, second.output) and torch.equal(
        first.layers[1].qkv.values, second.layers[1].qkv.values
    )
    assert not torch.equal(first.layers[0].qkv.values, first.layers[1].qkv.values)


def test_random_weights_have_the_names_and_shapes_of_read_ones(folder: Path) -> None:
    read, drawn = (load_weights(folder, TOY, torch.float32, CPU), dummy_weights(TOY, torch.float32, CPU))
    shapes = {name: t.shape for name, t in drawn.items()}
    assert shapes | {n: t.shape for n, t in read.items() if "lora" not in n} == shapes
    assert shapes.keys() == read.keys()


def test_random_weights_follow_the_seed_and_are_shared_out_like_read_ones() -> None:
    whole = dummy_weights(TOY, torch.float32, DEVICE)
    halves = [dummy_weights(TOY, torch.float32, DEVICE, rank, 2) for rank in (0, 1)]
    name = "encoder.layers.1.self_attn.o_proj.weight"
    assert torch.equal(torch.cat([half[name] for half in halves], 1), whole[name])
    assert torch.equal(halves[0]["encoder.norm.weight"], whole["encoder.norm.weight"])
    assert not torch.equal(dummy_weights(TOY, torch.float32, DEVICE, seed=1)[name], whole[name])


def test_random_weights_give_logits_that_bfloat16_can_hold() -> None:
    config = replace(TOY, hidden_size=128, intermediate_size=256, vocab_size=512, num_layers=20, head_dim=32)
    drawn = dummy_weights(config, torch.bfloat16, DEVICE)
    weights = {name: tensor.double().cpu() for name, tensor in drawn.items()}
    tokens = torch.randint(8, config.vocab_size, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = oracle.causal_logits(config, weights, tokens)
    deviation = logits[:, config.mask_id + 1 :].std()
    assert 0.5 < float(deviation) < 2


def test_eight_bit_weights_come_with_a_scale_per_row(folder: Path) -> None:
    plain, eight = (load_weights(folder, TOY, torch.float32, CPU, fp8=fp8) for fp8 in (False, True))
    scales = {name for name in eight if name.endswith(".scale")}
    assert eight.keys() - scales == plain.keys() and len(scales) == 7 * TOY.num_layers
    for name, tensor in plain.items():
        scale = eight.get(name.removesuffix("weight") + "scale")
        if scale is None or not name.endswith(".weight"):
            assert torch.equal(eight[name], tensor)
        else:
            assert eight[name].dtype is torch.float8_e4m3fn and scale.shape == tensor.shape[:1]
            torch.testing.assert_close(
                dequantise(eight[name], scale, torch.float32), tensor, rtol=1 / 16, atol=1e-3
            )


def test_eight_bit_weights_are_refused_where_nothing_multiplies_them(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"engine\.weights: fp8 needs a CUDA GPU .* 8\.9 .* not a cpu device"
    ):
        load_model(EngineConfig(str(folder), weights="fp8"))


def test_an_adapter_of_another_kind_is_refused(folder: Path) -> None:
    path = folder / "linear_spec_lora" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"target_modules": ["q_proj"]}))
    with pytest.raises(CheckpointError, match="only plain LoRA on o_proj"):
        load(folder)


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load(Path("nowhere"))
