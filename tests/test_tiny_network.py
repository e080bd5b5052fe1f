"""The dense network: equal to transformers' Ministral3, right in its gradients, and blind to what it may not see."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.tiny.attention import attend
from engine.tiny.checkpoint import CONFIG
from engine.tiny.network import Adapter, Geometry, Network

GEOMETRY = replace(
    Geometry.from_config(CONFIG),
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    head_dim=16,
)


def random_network(geometry: Geometry) -> Network:
    torch.manual_seed(0)
    network = Network(geometry).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.1)
    return network


def causal(n: int) -> Tensor:
    return torch.ones(1, n, n, dtype=torch.bool).tril()


def test_logits_equal_those_of_ministral3_within_and_beyond_the_trained_length() -> None:
    from transformers.models.ministral3 import Ministral3Config, Ministral3ForCausalLM

    config = Ministral3Config(
        vocab_size=GEOMETRY.vocab_size,
        hidden_size=GEOMETRY.hidden_size,
        intermediate_size=GEOMETRY.intermediate_size,
        num_hidden_layers=GEOMETRY.num_hidden_layers,
        num_attention_heads=GEOMETRY.num_attention_heads,
        num_key_value_heads=GEOMETRY.num_key_value_heads,
        head_dim=GEOMETRY.head_dim,
        rms_norm_eps=GEOMETRY.rms_norm_eps,
        max_position_embeddings=CONFIG["max_position_embeddings"],
        rope_parameters=CONFIG["rope_parameters"],
        tie_word_embeddings=False,
    )
    network = random_network(GEOMETRY)
    reference = Ministral3ForCausalLM(config)
    reference.eval()  # type: ignore[no-untyped-call]
    renamed = {name.replace("encoder.", "model."): weight for name, weight in network.state_dict().items()}
    renamed["lm_head.weight"] = renamed.pop("diffusion_head.weight")
    reference.load_state_dict(renamed)
    tokens = torch.randint(0, GEOMETRY.vocab_size, (1, 400))
    with torch.no_grad():
        ours = network(tokens, torch.arange(400)[None], causal(400))
        theirs = reference(tokens).logits
    assert GEOMETRY.original_max_position_embeddings < 400
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_attention_gradient_is_right() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 3, 3))
    bias = torch.zeros(2, 6, 3, dtype=torch.float64).masked_fill(torch.rand(2, 6, 3) < 0.3, -1e9)
    assert torch.autograd.gradcheck(attend, (q, k, v, bias))


def test_a_token_is_blind_to_what_is_not_visible() -> None:
    network = random_network(GEOMETRY)
    tokens = torch.randint(0, 64, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 64
    positions = torch.arange(12)[None]
    before, after = network(tokens, positions, causal(12)), network(changed, positions, causal(12))
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_the_adapter_changes_only_the_drafting_tokens() -> None:
    network, adapter = random_network(GEOMETRY), Adapter(GEOMETRY, rank=4, alpha=16)
    torch.nn.init.normal_(adapter.up)
    tokens, positions = torch.randint(0, 64, (1, 12)), torch.arange(12)[None]
    drafting = positions >= 8
    plain = network(tokens, positions, causal(12))
    drafted = network(tokens, positions, causal(12), adapter, drafting)
    assert torch.equal(plain[:, :8], drafted[:, :8])
    assert not torch.allclose(plain[:, 8:], drafted[:, 8:])


@pytest.mark.parametrize("length", [4, 32])
def test_parameter_names_are_those_of_the_checkpoint(length: int) -> None:
    names = set(dict(Network(replace(GEOMETRY, num_hidden_layers=length)).named_parameters()))
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    layers = {f"encoder.layers.{i}.{part}.weight" for i in range(length) for part in parts}
    assert names == layers | {"encoder.embed_tokens.weight", "encoder.norm.weight", "diffusion_head.weight"}
