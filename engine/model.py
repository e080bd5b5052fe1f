"""The network: one forward for all modes, since a batch says of each token what it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batch import Batch
from engine.config import ModelConfig
from engine.layers import Layer, rope_table
from kernels.attention import AttentionPlan, Ragged, plan_attention
from kernels.norm import add_rms_norm


class Model:
    """Weights and rotary tables of one rank. positions: how many the tables cover."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], positions: int) -> None:
        self.config = config
        self.embedding = weights["encoder.embed_tokens.weight"]
        self.norm = weights["encoder.norm.weight"]
        self.output = weights["diffusion_head.weight"]
        self.layers = [_layer(weights, index) for index in range(config.num_layers)]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.rope = rope_table(config.rope, config.head_dim, positions, self.dtype, self.device)

    @property
    def has_adapter(self) -> bool:
        return self.layers[0].lora_a is not None

    def plan(self, batch: Batch, page_size: int) -> AttentionPlan:
        """What the attention of every layer needs to know of a batch."""
        lengths, config = batch.layout.lengths, self.config
        length = torch.tensor(lengths, device=self.device)
        ragged = Ragged(
            first=length.cumsum(0) - length,
            length=length,
            context=batch.context,
            row=torch.arange(len(lengths), device=self.device),
            open=batch.open,
            upto=batch.upto,
            lo=batch.lo,
            hi=batch.hi,
            pages=batch.pages,
            lengths=lengths,
        )
        heads, kv_heads = config.num_heads, config.num_kv_heads
        return plan_attention(ragged, page_size, heads, kv_heads, config.head_dim, self.dtype, exact=True)

    def forward(self, batch: Batch, kv: Tensor, attention: AttentionPlan) -> Tensor:
        """Runs all query tokens. kv: [layers, pages, page_size, 2 * kv_heads, head_dim], read and written.
        Returns the normalised hidden states, [T, hidden]."""
        rope = self.rope.at(batch.positions)
        x, residual = self.embedding[batch.token_ids], None
        for layer, cache in zip(self.layers, kv, strict=True):
            x, residual = layer.forward(x, residual, cache, rope, attention, batch, self.config)
        return add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the given rows: [R, hidden] to [R, vocab], float32 at least, -inf for the mask token."""
        logits = F.linear(hidden, self.output)
        if logits.dtype is torch.bfloat16:
            logits = logits.float()
        logits[:, self.config.mask_id] = float("-inf")
        return logits


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
