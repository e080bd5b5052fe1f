"""The parts of a transformer layer, as plain tensors and functions."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeConfig
from engine.tp import Group
from kernels.activation import silu_mul
from kernels.attention import AttentionPlan, ragged_attention
from kernels.expand import Expanded
from kernels.linear import linear
from kernels.lora import gated_lora_add
from kernels.norm import add_rms_norm
from kernels.rope import rope_and_store


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos, sin: [positions, head_dim], the first half of sin negated; scale: [positions], of the query."""

    cos: Tensor
    sin: Tensor
    scale: Tensor

    def at(self, positions: Tensor) -> "RopeTable":
        """The rows of the given positions [T], shaped to broadcast over heads."""
        return RopeTable(
            self.cos[positions][:, None], self.sin[positions][:, None], self.scale[positions][:, None, None]
        )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): [head_dim / 2] float64, interpolated below beta_slow rotations over the
    original window, kept above beta_fast, a linear ramp between."""
    plain = rope.theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def dimension(rotations: float) -> float:
        return (
            head_dim
            * math.log(rope.original_max_position / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain * (1 - interpolated) + plain / rope.factor * interpolated


def rope_table(
    rope: RopeConfig, head_dim: int, positions: int, dtype: torch.dtype, device: torch.device
) -> RopeTable:
    """Computed in float64 and rounded once."""
    position = torch.arange(positions, dtype=torch.float64)
    angle = torch.outer(position, inverse_frequencies(rope, head_dim)).repeat(1, 2)
    sign = torch.ones(head_dim, dtype=torch.float64)
    sign[: head_dim // 2] = -1
    scale = 1 + rope.query_scaling_beta * torch.log1p(torch.floor(position / rope.original_max_position))
    parts = (angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor * sign, scale)
    return RopeTable(*(part.to(device, dtype) for part in parts))


class Weight(NamedTuple):
    """A matrix, and the scale of each row if its numbers are FP8."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One rank's weights of one layer; heads and intermediate are its share. qkv: [(heads + 2 * kv_heads) * head_dim,
    hidden]. o: [hidden, heads * head_dim]. gate_up: [2 * intermediate, hidden]. down: [hidden, intermediate]. lora_a:
    [r, heads * head_dim] and lora_b: [hidden, r], scaled, or None where the checkpoint has no adapter. Products with o,
    down and the adapter are partial sums."""

    input_norm: Tensor
    qkv: Weight
    o: Weight
    post_norm: Tensor
    gate_up: Weight
    down: Weight
    lora_a: Tensor | None
    lora_b: Tensor | None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        kv: Tensor,
        rope: RopeTable,
        attention: AttentionPlan,
        batch: Expanded,
        config: ModelConfig,
        exact: bool,
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        """x: [T, hidden], what the layer before adds to the residual stream. kv: [pages, page_size, 2 * kv_heads,
        head_dim]. config: one rank's share. Returns this layer's addition and the stream before it."""
        x, residual = add_rms_norm(x, residual, self.input_norm, config.rms_norm_eps)
        qkv = linear(x, *self.qkv, exact=exact).view(x.shape[0], -1, config.head_dim)
        q = rope_and_store(qkv, rope.cos, rope.sin, rope.scale, kv, batch.slots, config.num_heads)
        attended = ragged_attention(q, kv, attention)
        x = linear(attended, *self.o, exact=exact)
        if batch.gate is not None and self.lora_a is not None and self.lora_b is not None:
            x = gated_lora_add(x, attended, self.lora_a, self.lora_b, batch.gate)
        x, residual = add_rms_norm(group.sum(x), residual, self.post_norm, config.rms_norm_eps)
        inner = silu_mul(linear(x, *self.gate_up, exact=exact))
        return group.sum(linear(inner, *self.down, exact=exact)), residual
