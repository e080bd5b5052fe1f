"""transformers' model on the very weights of ours, for benchmarks beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from engine.model import Model
from perf.bench_engine import GEOMETRY


def hugging_face(model: Model, raw: dict[str, Any]) -> Callable[[tuple[int, ...], int], list[int]]:
    """Ministral3ForCausalLM that shares the model's memory, as a function of a prompt and a number of tokens to that
    many greedily generated ones. raw: the checkpoint's config.json."""
    config = Ministral3Config(**{key: raw[key] for key in GEOMETRY}, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        network = Ministral3ForCausalLM(config).train(False)
    network.load_state_dict(state(model), assign=True)
    with torch.device(model.device):
        network.model.rotary_emb = type(network.model.rotary_emb)(config)
    left = [
        name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta
    ]
    assert not left, f"transformers has tensors that are not ours: {left}"

    @torch.inference_mode()
    def generate(prompt: tuple[int, ...], tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return [int(token) for token in out[0, len(prompt) :].tolist()]

    return generate


def state(model: Model) -> dict[str, Tensor]:
    """The weights under transformers' names, as views."""
    shape = model.config
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensors = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.output,
    }
    for index, layer in enumerate(model.layers):
        q, k, v = torch.split(layer.qkv.values, [queries, keys, keys])
        gate, up = layer.gate_up.values.chunk(2)
        parts = {
            "input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm,
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.o.values,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down.values,
        }  # fmt: skip
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in parts.items()}
    return tensors
