"""Dense, differentiable NLD network: the trainer's model and an oracle for the ragged engine.

Parameter names are the checkpoint's tensor names. Shapes: R rows, n tokens, H hidden, V vocabulary, D head size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.tiny.attention import attend


@dataclass(frozen=True)
class Geometry:
    """What the network needs from config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    llama_4_scaling_beta: float

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        flat = {**config, **config["rope_parameters"]}
        return cls(**{field: flat[field] for field in cls.__dataclass_fields__})


def yarn_frequencies(geometry: Geometry) -> Tensor:
    """YaRN's inverse frequencies [D/2], fp32: fast dimensions as trained, slow ones divided by `factor`."""
    size, theta, trained = geometry.head_dim, geometry.rope_theta, geometry.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        return size * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(geometry.beta_fast)), 0)
    high = min(math.ceil(dimension(geometry.beta_slow)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return frequencies * (1 - slow) + frequencies / geometry.factor * slow


def yarn_magnitude(geometry: Geometry) -> float:
    """What YaRN multiplies cos and sin by; 1 when mscale equals mscale_all_dim."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(geometry.factor) + 1 if geometry.factor > 1 else 1.0

    return scale(geometry.mscale) / scale(geometry.mscale_all_dim)


class Rotation:
    """Rotary embedding of q and k at given positions, with llama-4's scaling of q beyond the trained length."""

    def __init__(self, geometry: Geometry, positions: Tensor, dtype: torch.dtype) -> None:
        """`positions` [R, n] int."""
        places = positions.float()
        angles = places[..., None] * yarn_frequencies(geometry)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        magnitude = yarn_magnitude(geometry)
        growth = torch.log(1 + torch.floor(places / geometry.original_max_position_embeddings))
        self.query_scale = (1 + geometry.llama_4_scaling_beta * growth)[:, :, None, None].to(dtype)
        self.cos = (angles.cos() * magnitude).to(dtype)
        self.sin = (angles.sin() * magnitude).to(dtype)

    def turn(self, x: Tensor) -> Tensor:
        """`x` [R, n, heads, D]."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.head_dim = g.head_dim
        self.groups = g.num_key_value_heads
        self.q_proj = nn.Linear(g.hidden_size, g.num_attention_heads * g.head_dim, bias=False)
        self.k_proj = nn.Linear(g.hidden_size, g.num_key_value_heads * g.head_dim, bias=False)
        self.v_proj = nn.Linear(g.hidden_size, g.num_key_value_heads * g.head_dim, bias=False)
        self.o_proj = nn.Linear(g.num_attention_heads * g.head_dim, g.hidden_size, bias=False)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, G, heads/G * n, D] (scaled), k and v [R, G, n, D], G the number of KV heads."""
        rows, n, _ = x.shape
        split = (rows, n, -1, self.head_dim)
        q = rotation.turn(self.q_proj(x).view(split)) * (rotation.query_scale * self.head_dim**-0.5)
        k = rotation.turn(self.k_proj(x).view(split))
        v = self.v_proj(x).view(split)
        q = q.view(rows, n, self.groups, -1, self.head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(rows, self.groups, -1, self.head_dim)
        return q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    def merge(self, attended: Tensor, n: int) -> Tensor:
        """Attention output [R, G, heads/G * n, D] back to [R, n, heads * D]."""
        rows = len(attended)
        parts = attended.view(rows, self.groups, -1, n, self.head_dim)
        return parts.permute(0, 3, 1, 2, 4).reshape(rows, n, -1)


class Mlp(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(g.hidden_size, g.intermediate_size, bias=False)
        self.up_proj = nn.Linear(g.hidden_size, g.intermediate_size, bias=False)
        self.down_proj = nn.Linear(g.intermediate_size, g.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.input_layernorm = Norm(g.hidden_size, g.rms_norm_eps)
        self.self_attn = Attention(g)
        self.post_attention_layernorm = Norm(g.hidden_size, g.rms_norm_eps)
        self.mlp = Mlp(g)

    def before(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), rotation)

    def after(self, x: Tensor, attended: Tensor, draft: Draft | None) -> Tensor:
        merged = self.self_attn.merge(attended, x.shape[1])
        x = x + self.self_attn.o_proj(merged)
        if draft is not None:
            x = x + draft(merged)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Encoder(nn.Module):
    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab_size, g.hidden_size)
        self.layers = nn.ModuleList(Layer(g) for _ in range(g.num_hidden_layers))
        self.norm = Norm(g.hidden_size, g.rms_norm_eps)

    def stack(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer


class Adapter(nn.Module):
    """The draft LoRA on every o_proj: `down` [layers, r, heads*D], `up` [layers, H, r], fp32."""

    def __init__(self, g: Geometry, rank: int, alpha: float) -> None:
        super().__init__()
        width = g.num_attention_heads * g.head_dim
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(g.num_hidden_layers, rank, width) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(g.num_hidden_layers, g.hidden_size, rank))

    def tensors(self) -> dict[str, Tensor]:
        """The adapter under its checkpoint names."""
        stem = "base_model.model.encoder.layers.{}.self_attn.o_proj.lora_{}.weight"
        named = {}
        for i in range(len(self.down)):
            named[stem.format(i, "A")] = self.down[i].detach().clone()
            named[stem.format(i, "B")] = self.up[i].detach().clone()
        return named


@dataclass(frozen=True)
class Draft:
    """One layer's adapter, applied to the drafting tokens only (the others must stay the base model's)."""

    down: Tensor
    up: Tensor
    scale: float
    tokens: Tensor  # [R, n, 1] bool

    def __call__(self, x: Tensor) -> Tensor:
        delta = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)) * self.scale
        return delta * self.tokens


class Network(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.encoder = Encoder(geometry)
        self.diffusion_head = nn.Linear(geometry.hidden_size, geometry.vocab_size, bias=False)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        adapter: Adapter | None = None,
        drafting: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [R, n, H] of `tokens` [R, n] at `positions` [R, n].

        `visible` [R, n, n] bool: which tokens each token sees. `drafting` [R, n] bool: where `adapter` is applied.
        """
        x: Tensor = self.encoder.embed_tokens(tokens)
        rotation = Rotation(self.geometry, positions, x.dtype)
        bias = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, -math.inf)
        bias = bias.repeat(1, self.geometry.num_attention_heads // self.geometry.num_key_value_heads, 1)
        for i, layer in enumerate(self.encoder.stack()):
            draft = None
            if adapter is not None and drafting is not None:
                draft = Draft(adapter.down[i], adapter.up[i], adapter.scale, drafting[..., None])
            q, k, v = layer.before(x, rotation)
            x = layer.after(x, attend(q, k, v, bias), draft)
        out: Tensor = self.encoder.norm(x)
        return out

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        adapter: Adapter | None = None,
        drafting: Tensor | None = None,
    ) -> Tensor:
        """Logits [R, n, V]; the arguments are those of `hidden`."""
        out: Tensor = self.diffusion_head(self.hidden(tokens, positions, visible, adapter, drafting))
        return out


def load(folder: Path) -> tuple[Network, Adapter | None]:
    """Network and draft adapter of a checkpoint folder, in fp32."""
    network = Network(Geometry.from_config(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    lora = folder / "linear_spec_lora"
    if not lora.exists():
        return network.eval(), None
    settings = json.loads((lora / "adapter_config.json").read_text())
    adapter = Adapter(network.geometry, settings["r"], settings["lora_alpha"])
    tensors = load_file(lora / "adapter_model.safetensors")
    for name in adapter.tensors():
        layer = int(name.split(".layers.")[1].split(".")[0])
        target = adapter.down if ".lora_A." in name else adapter.up
        target.data[layer] = tensors[name]
    return network.eval(), adapter.eval()
