"""The network: one forward for all modes, since a batch says of each token what it sees."""

import torch
from torch import Tensor

from engine.batch import Layout
from engine.config import ModelConfig
from engine.layers import Layer, rope_table
from kernels.attention import AttentionPlan, Ragged, plan_attention
from kernels.expand import Expanded
from kernels.linear import linear
from kernels.norm import add_rms_norm


class Model:
    """Weights and rotary tables of one rank. positions: how many the tables cover."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], positions: int, exact: bool = False
    ) -> None:
        """exact: a token's logits do not depend on the other tokens of a step, to the bit; on a CPU in float64 or
        float32 they hardly do anyway."""
        self.config, self.exact = config, exact
        self.embedding = weights["encoder.embed_tokens.weight"]
        self.norm = weights["encoder.norm.weight"]
        self.output = weights["diffusion_head.weight"]
        self.layers = [_layer(weights, index) for index in range(config.num_layers)]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.rope = rope_table(config.rope, config.head_dim, positions, self.dtype, self.device)

    @property
    def has_adapter(self) -> bool:
        return self.layers[0].lora_a is not None

    def plan(self, batch: Expanded, layout: Layout, pages: Tensor, page_size: int) -> AttentionPlan:
        """What the attention of every layer needs to know of a batch. pages: the page table of all rows."""
        segments, known, config = layout.segments, layout.known, self.config
        ragged = Ragged(
            segments.first,
            segments.length,
            batch.context,
            segments.row,
            batch.open,
            batch.upto,
            batch.lo,
            batch.hi,
            pages,
            None if known is None else known.lengths,
        )
        return plan_attention(
            ragged, page_size, config.num_heads, config.num_kv_heads, config.head_dim, self.dtype, self.exact
        )

    def forward(self, batch: Expanded, kv: Tensor, attention: AttentionPlan) -> Tensor:
        """Runs all query tokens. kv: [layers, pages, page_size, 2 * kv_heads, head_dim], read and written.
        Returns the normalised hidden states, [T, hidden]."""
        rope = self.rope.at(batch.positions)
        x, residual = self.embedding[batch.token_ids], None
        for layer, cache in zip(self.layers, kv.unbind(), strict=True):
            x, residual = layer.forward(x, residual, cache, rope, attention, batch, self.config, self.exact)
        return add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the given rows: [R, hidden] to [R, vocab], float32 at least."""
        wide = torch.float32 if self.dtype is torch.bfloat16 else None
        return linear(hidden, self.output, out_dtype=wide, exact=self.exact)


def _layer(weights: dict[str, Tensor], index: int) -> Layer:
    def of(name: str) -> Tensor:
        return weights[f"encoder.layers.{index}.{name}.weight"]

    return Layer(
        input_norm=of("input_layernorm"),
        qkv=torch.cat([of(f"self_attn.{name}_proj") for name in "qkv"]),
        o=of("self_attn.o_proj"),
        post_norm=of("post_attention_layernorm"),
        gate_up=torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")]),
        down=of("mlp.down_proj"),
        lora_a=weights.get(f"encoder.layers.{index}.self_attn.o_proj.lora_A"),
        lora_b=weights.get(f"encoder.layers.{index}.self_attn.o_proj.lora_B"),
    )
