"""How the token of each sequence is to be chosen: one row of parameters a sequence, on the device."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# A lower temperature counts as this one: nothing overflows then, and it is as good as greedy.
COLDEST = 1e-30
_COLDEST = tl.constexpr(COLDEST)


class Sampling(NamedTuple):
    """Parameters of every table row.

    temperature: [rows] float32, 0 for greedy. top_k: [rows] int64, 0 for off. top_p: [rows] float32 in (0, 1], 1 for
    off. min_p: [rows] float32 in [0, 1], 0 for off. seed: [rows] int64. Filters apply in this order, not to greedy
    rows.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def inverse_temperature(temperature: Tensor) -> Tensor:
    """What multiplies a row's logits, always finite: temperature [R] to [R]; 1 for greedy rows."""
    return temperature.clamp(min=COLDEST).reciprocal().masked_fill(temperature == 0, 1.0)


@triton.jit
def triton_inverse_temperature(temperature):
    return tl.where(temperature > 0, 1.0 / tl.maximum(temperature, _COLDEST), 1.0)
