"""Which tensors a checkpoint of a geometry has, and what of each a rank of a tensor-parallel group holds.

Standard library only, so that planning costs no torch.
"""

from engine.config import CheckpointError, ModelConfig

PUBLISHED_RANK = 128  # of the draft adapters of the published instruct checkpoints, and of random weights

# The axis of a tensor that the ranks of a tensor-parallel group share out; every rank holds the others whole. Products
# with tensors shared out by columns (axis 1) are partial sums, to be added up over the ranks.
AXIS = {
    "embed_tokens": 0,
    "diffusion_head": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "lora_A": 1,
}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint and its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens.weight": (config.vocab_size, hidden),
        "encoder.norm.weight": (hidden,),
        "diffusion_head.weight": (config.vocab_size, hidden),
    }
    for index in range(config.num_layers):
        shapes |= {f"encoder.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def adapter_shapes(config: ModelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the draft adapter and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_layers):
        prefix = f"base_model.model.encoder.layers.{index}.self_attn.o_proj"
        shapes[f"{prefix}.lora_A.weight"] = (rank, config.num_heads * config.head_dim)
        shapes[f"{prefix}.lora_B.weight"] = (config.hidden_size, rank)
    return shapes


def share(stored: str, shape: tuple[int, ...], rank: int, ranks: int) -> tuple[slice, ...]:
    """The slice of a tensor, by its name in the file, that one of `ranks` ranks holds."""
    axis = AXIS.get(stored.split(".")[-2])
    index = [slice(0, length) for length in shape]
    if axis is not None:
        length = shape[axis] // ranks
        index[axis] = slice(rank * length, (rank + 1) * length)
    return tuple(index)


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Raises CheckpointError naming what `ranks` ranks cannot share out evenly."""
    counts = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    uneven = [f"{key} {count}" for key, count in counts.items() if count % ranks]
    if uneven:
        raise CheckpointError(f"{ranks} ranks cannot share out {' and '.join(uneven)} evenly")
