"""Weights in eight bits, for engines that only draft: a verifier needs the checkpoint's own."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
FIRST_CAPABILITY = (8, 9)  # Ada; Hopper and Blackwell are above


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K], floating. Returns it as float8_e4m3fn [N, K] and a float32 scale per output row [N], amax / 448:
    `quantised * scale` is within a sixteenth of each weight, or within 2^-10 scales where weights are tiny. Rows of
    zeros have scale 1."""
    amax = weight.abs().amax(1).float()
    scale = torch.where(amax > 0, (amax / LARGEST).clamp(SMALLEST_SCALE), 1.0)
    # Rounding may end a hair above the largest value, which the cast would turn into NaN.
    return (weight.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` kept of a weight: [N, K] in `dtype`."""
    return (weight.float() * scale[:, None]).to(dtype)


def check_fp8(device: torch.device) -> None:
    """Raises ValueError unless the device multiplies FP8 matrices."""
    if device.type != "cuda":
        found = f"a {device.type} device"
    elif not torch.cuda.is_available():
        found = "a machine without a GPU"
    else:
        capability = torch.cuda.get_device_capability(device)
        if capability >= FIRST_CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    raise ValueError(
        f"engine.weights: fp8 needs a CUDA GPU of compute capability 8.9 or newer, not {found}; use 'checkpoint'"
    )
