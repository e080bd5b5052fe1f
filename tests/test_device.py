"""What an engine asks of a GPU is refused with a sentence where it is not there."""

from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig, Sizes
from engine.device import check_device, kv_tokens
from fakes import TOY

GPU = EngineConfig(device="cuda", dtype="bfloat16", page_size=64, kv_tokens=0, max_running=4)
MODEL = replace(TOY, head_dim=128)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))


@pytest.mark.usefixtures("hopper")
def test_a_hopper_with_the_kernels_sizes_is_taken() -> None:
    check_device(GPU, MODEL)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (replace(GPU, page_size=16), "page_size: the kernels are made for pages of 64, not 16"),
        (replace(GPU, dtype="float64"), "dtype: the kernels compute in bfloat16 or float32"),
    ],
)
def test_settings_without_kernels_are_refused(config: EngineConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_device(config, MODEL)


@pytest.mark.usefixtures("hopper")
def test_heads_that_no_tile_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim: 96 is not a power of two"):
        check_device(GPU, replace(MODEL, head_dim=96))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("capability", "triton_release", "sentence"),
    [
        ((8, 0), "3.7.1", "compute capability"),
        ((10, 0), "3.7.1", "Blackwell needs Triton 3.8 or newer, not 3.7.1"),
        ((10, 3), "3.6.0", "Blackwell needs Triton 3.8"),
        ((10, 0), "3.8.0", None),
    ],
)
def test_a_gpu_needs_a_compiler_that_is_right_on_it(
    capability: tuple[int, int], triton_release: str, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("engine.device.triton.__version__", triton_release)
    if sentence is None:
        check_device(GPU, MODEL)
    else:
        with pytest.raises(ValueError, match=sentence):
            check_device(GPU, MODEL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed() -> None:
    with pytest.raises(ValueError, match="device: cuda needs a GPU, and there is none"):
        check_device(GPU, MODEL)


@pytest.mark.usefixtures("hopper")
def test_the_cache_takes_what_the_memory_leaves() -> None:
    tokens = kv_tokens(GPU, MODEL)
    token = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 2
    spare = 0.08 * 80 * 2**30
    assert tokens % 64 == 0 and 0.9 < tokens * token / (10 * 2**30 - spare) <= 1
    assert Sizes.of(replace(GPU, kv_tokens=tokens), MODEL).max_model_len == MODEL.max_position
    assert kv_tokens(replace(GPU, kv_tokens=640), MODEL) == 640


@pytest.mark.usefixtures("hopper")
def test_no_memory_for_a_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    with pytest.raises(ValueError, match="kv_tokens: 1.0 GiB of free memory leave no room"):
        kv_tokens(GPU, MODEL)


def test_a_cpu_has_no_free_memory_to_go_by() -> None:
    with pytest.raises(ValueError, match="kv_tokens: 0 needs a GPU"):
        kv_tokens(replace(GPU, device="cpu"), MODEL)
