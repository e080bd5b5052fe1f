"""An independent judge: the network written densely for one sequence, and the decode loops as the model's paper has
them, without cache, pages, batches or kernels of ours. Everything is float64."""

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeConfig

Weights = dict[str, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q: [n, heads, d], k, v: [m, kv_heads, d], visible: [n, m]. One query and one head at a time."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        seen = visible[i].nonzero()[:, 0]
        for head in range(heads):
            score = k[seen, head // groups] @ q[i, head] / math.sqrt(q.shape[-1])
            out[i, head] = (
                (score - score.max()).exp() / (score - score.max()).exp().sum() @ v[seen, head // groups]
            )
    return out


def rotate(x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
    """Turns [n, heads, d] as complex numbers, pair (j, j + d/2) by YaRN's angle."""
    d = x.shape[-1]
    angles = []
    for j in range(d // 2):
        frequency = rope.theta ** (-2 * j / d)
        low, high = (
            d * math.log(rope.original_max_position / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
            for beta in (rope.beta_fast, rope.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        blend = min(max((j - low) / max(high - low, 0.001), 0), 1)
        angles.append(frequency * (1 - blend) + frequency / rope.factor * blend)
    turn = torch.polar(
        torch.ones(1, dtype=torch.float64), positions[:, None] * torch.tensor(angles, dtype=torch.float64)
    )
    pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn[:, None] * rope.attention_factor
    return torch.cat((pairs.real, pairs.imag), -1)


def forward(
    config: ModelConfig,
    w: Weights,
    tokens: list[int],
    positions: list[int],
    visible: Tensor,
    lora: Tensor | None = None,
) -> Tensor:
    """Logits [n, vocab], the mask token's at -inf. visible: [n, n] bool. lora: [n], 1 where the draft adapter is on."""
    place = torch.tensor(positions, dtype=torch.float64)
    x = w["encoder.embed_tokens.weight"][tokens]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[name]

    window = torch.floor(place / config.rope.original_max_position)
    scale = 1 + config.rope.query_scaling_beta * torch.log(1 + window)
    for i in range(config.num_layers):
        p = f"encoder.layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{p}self_attn.{name}_proj.weight"].T).view(len(tokens), -1, config.head_dim)
            for name in "qkv"
        )
        q = rotate(q, place, config.rope) * scale[:, None, None]
        attended = attend(q, rotate(k, place, config.rope), v, visible).flatten(1)
        x = x + attended @ w[p + "self_attn.o_proj.weight"].T
        if lora is not None:
            a, b = w[p + "self_attn.o_proj.lora_A"], w[p + "self_attn.o_proj.lora_B"]
            x = x + lora[:, None] * (attended @ a.T @ b.T)
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
    logits = norm(x, "encoder.norm.weight") @ w["diffusion_head.weight"].T
    logits[:, config.mask_id] = -math.inf
    return logits


def causal_logits(config: ModelConfig, w: Weights, tokens: list[int]) -> Tensor:
    """Row i predicts token i + 1."""
    n = len(tokens)
    return forward(config, w, tokens, list(range(n)), torch.ones(n, n).tril().bool())


def canvas_logits(config: ModelConfig, w: Weights, committed: list[int], canvas: list[int]) -> Tensor:
    """Row i predicts canvas token i. canvas[0] is the last committed token; the context before it is causal."""
    tokens, start = committed[:-1] + canvas, len(committed) - 1
    n = len(tokens)
    visible = torch.ones(n, n).tril().bool()
    visible[start:, :] = True
    return forward(config, w, tokens, list(range(n)), visible)[start:]


def greedy(config: ModelConfig, w: Weights, prompt: list[int], count: int) -> list[int]:
    """Autoregressive decoding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(causal_logits(config, w, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def diffuse(
    config: ModelConfig,
    w: Weights,
    prompt: list[int],
    count: int,
    block_length: int,
    threshold: float,
    steps: int,
) -> tuple[list[int], int]:
    """Block diffusion, greedy: the answer and the forwards it took after the prefill."""
    tokens = [*prompt, int(causal_logits(config, w, prompt)[-1].argmax())]
    forwards = 0
    while len(tokens) - len(prompt) < count:
        canvas = [tokens[-1]] + [config.mask_id] * (block_length - 1)
        passes = 0
        while config.mask_id in canvas:
            logits = canvas_logits(config, w, tokens, canvas)
            probability = logits.softmax(-1)
            masked = [i for i, token in enumerate(canvas) if token == config.mask_id]
            masked.sort(key=lambda i: -float(probability[i].max()))
            quota = math.ceil(len(masked) / max(steps - passes, 1)) if steps else 1
            for rank, i in enumerate(masked):
                if rank < quota or float(probability[i].max()) >= threshold:
                    canvas[i] = int(logits[i].argmax())
            passes += 1
        tokens = tokens[:-1] + canvas
        tokens.append(int(causal_logits(config, w, tokens)[-1].argmax()))
        forwards += passes + 1
    return tokens[len(prompt) :][:count], forwards
