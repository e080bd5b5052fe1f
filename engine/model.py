"""The network: one forward for all modes, since a batch says of each token what it sees."""

import torch
from torch import Tensor

from engine.batch import Layout
from engine.config import ModelConfig
from engine.layers import Layer, Weight, rope_table
from engine.tp import Alone, Group
from kernels.attention import AttentionPlan, Ragged, plan_attention
from kernels.expand import Expanded
from kernels.linear import linear
from kernels.norm import add_rms_norm


class Model:
    """Weights and rotary tables of one rank. config: the whole model's geometry; share: this rank's."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        positions: int,
        exact: bool = False,
        group: Group | None = None,
    ) -> None:
        """weights: the rank's, as `load_weights` names them; the layers' are taken out. positions: how many the rotary
        tables cover. exact: on a GPU a token's logits do not depend on the other tokens of its step, to the bit. group:
        the ranks that share the model; None: there is one."""
        self.config, self.exact = config, exact
        self.group: Group = group or Alone()
        self.share = config.share(self.group.size)
        self.vocab_start = self.group.rank * (config.vocab_size // self.group.size)
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
        segments, known, config = layout.segments, layout.known, self.share
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
        """Runs all query tokens. kv: [layers, pages, page_size, 2 * kv_heads, head_dim] of the rank, read and written.
        Returns the normalised hidden states, [T, hidden]."""
        rope = self.rope.at(batch.positions)
        x, residual = self._embed(batch.token_ids), None
        for layer, cache in zip(self.layers, kv.unbind(), strict=True):
            x, residual = layer.forward(
                x, residual, cache, rope, attention, batch, self.share, self.exact, self.group
            )
        return add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the given rows: [R, hidden] to [R, vocab / ranks], float32 at least, of the tokens from vocab_start
        on."""
        wide = torch.float32 if self.dtype is torch.bfloat16 else None
        return linear(hidden, self.output, out_dtype=wide, exact=self.exact)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of [T] tokens, [T, hidden]: of each, one rank has it and the others add zeros."""
        if self.group.size == 1:
            return self.embedding[token_ids]
        local = token_ids - self.vocab_start
        own = self.embedding[local.clamp(0, len(self.embedding) - 1)]
        absent = (local < 0) | (local >= len(self.embedding))
        return self.group.sum(own.masked_fill_(absent[:, None], 0))


def _layer(weights: dict[str, Tensor], index: int) -> Layer:
    """Takes the layer's tensors out of the weights, so that no two copies of a model stand in memory."""
    prefix = f"encoder.layers.{index}."

    def stacked(*names: str) -> Weight:
        parts = [weights.pop(f"{prefix}{name}.weight") for name in names]
        scales = [weights.pop(scale) for name in names if (scale := f"{prefix}{name}.scale") in weights]
        if len(names) == 1:
            return Weight(parts[0], scales[0] if scales else None)
        return Weight(torch.cat(parts), torch.cat(scales) if scales else None)

    return Layer(
        input_norm=weights.pop(f"{prefix}input_layernorm.weight"),
        qkv=stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        o=stacked("self_attn.o_proj"),
        post_norm=weights.pop(f"{prefix}post_attention_layernorm.weight"),
        gate_up=stacked("mlp.gate_proj", "mlp.up_proj"),
        down=stacked("mlp.down_proj"),
        lora_a=weights.pop(f"{prefix}self_attn.o_proj.lora_A", None),
        lora_b=weights.pop(f"{prefix}self_attn.o_proj.lora_B", None),
    )
