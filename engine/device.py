"""What an engine asks of the device that it runs on."""

import platform
from pathlib import Path

import torch
import triton

from engine.config import EngineConfig, ModelConfig
from engine.memory import PAGE_SIZE, pool_tokens


def check_device(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ValueError if the kernels cannot serve this configuration where it is to run."""
    if not config.device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device: {config.device} needs a GPU, and there is none")
    capability = torch.cuda.get_device_capability(config.device)
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if capability < (9, 0):
        raise ValueError(f"device: {config.device} has compute capability {capability}; the kernels need 9.0")
    if capability >= (10, 0) and release < (3, 8):
        # loops with matrix products come out wrong or racing there: triton-lang/triton issues 9871 and 10590
        raise ValueError(f"device: Blackwell needs Triton 3.8 or newer, not {triton.__version__}")
    if config.dtype == "float64":
        raise ValueError("dtype: the kernels compute in bfloat16 or float32, not float64")
    if config.page_size != PAGE_SIZE:
        raise ValueError(f"page_size: the kernels are made for pages of {PAGE_SIZE}, not {config.page_size}")
    if model.head_dim & (model.head_dim - 1) or model.head_dim < 16:
        raise ValueError(f"head_dim: {model.head_dim} is not a power of two of at least 16")


def use_device(name: str) -> None:
    """Makes a device the calling thread's own, and products of bfloat16 exact up to their last rounding."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if device.index is not None:
            torch.cuda.set_device(device)


def kv_tokens(config: EngineConfig, model: ModelConfig) -> int:
    """The tokens that the page pool holds: as configured, or what is free on the GPU once the rank's weights are there,
    less what the largest step's logits and activations take. model: the whole geometry. Raises ValueError if that is
    nothing."""
    if config.kv_tokens:
        return config.kv_tokens
    if not config.device.startswith("cuda"):
        raise ValueError("kv_tokens: 0 needs a GPU, whose free memory it stands for")
    torch.cuda.empty_cache()  # what loading has left over
    free, total = torch.cuda.mem_get_info(config.device)
    tokens = pool_tokens(free, total, config, model, config.tensor_parallel)
    if not tokens:
        raise ValueError(f"kv_tokens: {free / 2**30:.1f} GiB of free memory leave no room for the cache")
    return tokens


def device_name(device: str) -> str:
    """What the maker calls a torch device."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
