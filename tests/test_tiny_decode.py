"""The engine on the tiny checkpoint against plain loops over the dense network: the same text in as many forwards."""

import math
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny import checkpoint
from engine.tiny.evaluate import LIMIT, MODES, THRESHOLD, Generation, Mode, generate
from engine.tiny.network import Adapter, Network, load
from engine.tiny.rows import encode
from engine.tiny.tasks import evaluation_tasks
from engine.tiny.vocabulary import EOS, MASK


def logits(
    net: Network, prefix: list[int], block: list[int], bidirectional: bool, adapter: Adapter | None
) -> Tensor:
    """Logits [len(block), V] of `block` after the causal `prefix`, the mask token excluded."""
    ids = torch.tensor(prefix + block)[None]
    n = ids.shape[1]
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    if bidirectional:
        visible[len(prefix) :, len(prefix) :] = True
    drafting = (torch.arange(n) >= len(prefix))[None]
    with torch.no_grad():
        out: Tensor = net(ids, torch.arange(n)[None], visible[None], adapter, drafting)[0, len(prefix) :]
    out[:, MASK] = -math.inf
    return out


def causal(net: Network, prefix: list[int], block: list[int]) -> list[int]:
    """The greedy next token after each token of `block`."""
    choices: list[int] = logits(net, prefix, block, bidirectional=False, adapter=None).argmax(-1).tolist()
    return choices


def finish(tokens: list[int], forwards: int) -> Generation:
    tokens = tokens[:LIMIT]
    return Generation(tokens[: tokens.index(EOS)] if EOS in tokens else tokens, forwards)


def autoregressive(net: Network, prompt: list[int]) -> Generation:
    made = causal(net, prompt[:-1], prompt[-1:])
    while made[-1] != EOS and len(made) < LIMIT:
        made += causal(net, prompt + made[:-1], made[-1:])
    return finish(made, len(made) - 1)


def linear(net: Network, prompt: list[int], length: int, adapter: Adapter | None) -> Generation:
    """Draft a block in one bidirectional forward, keep what the causal forward agrees with, plus one token."""
    made = causal(net, prompt[:-1], prompt[-1:])
    forwards = 0
    while EOS not in made and len(made) < LIMIT:
        prefix, seed = prompt + made[:-1], made[-1]
        canvas = [seed] + [MASK] * (length - 1)
        drafted: list[int] = (
            logits(net, prefix, canvas, bidirectional=True, adapter=adapter).argmax(-1).tolist()
        )
        choices = causal(net, prefix, [seed] + drafted[1:])
        kept = 0
        while kept < length - 1 and choices[kept] == drafted[kept + 1]:
            kept += 1
        made += choices[: kept + 1]
        forwards += 2
    return finish(made, forwards)


def diffusion(net: Network, prompt: list[int], length: int) -> Generation:
    """Denoise canvas after canvas, committing the best and every confident token per pass; then a causal pass."""
    made = causal(net, prompt[:-1], prompt[-1:])
    forwards = 0
    while EOS not in made and len(made) < LIMIT:
        prefix = prompt + made[:-1]
        canvas = [made[-1]] + [MASK] * (length - 1)
        while MASK in canvas:
            confidence, choices = (
                logits(net, prefix, canvas, bidirectional=True, adapter=None).softmax(-1).max(-1)
            )
            masked = torch.tensor([token == MASK for token in canvas])
            confidence = confidence.masked_fill(~masked, -1)
            commit = (confidence >= THRESHOLD) & masked
            commit[confidence.argmax()] = True
            canvas = torch.where(commit, choices, torch.tensor(canvas)).tolist()
            forwards += 1
        made += canvas[1:] + causal(net, prefix, canvas)[-1:]
        forwards += 1
    return finish(made, forwards)


@cache
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(checkpoint.FOLDER / "tokenizer.json"))
    rows = [encode(tokenizer, task.messages) for task in evaluation_tasks(3, seed=3)]
    return [row.tokens[: row.answers[-1][0]] for row in rows]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.label)
def test_the_engine_decodes_as_the_plain_loops_do(mode: Mode) -> None:
    torch.set_num_threads(1)
    net, adapter = load(checkpoint.FOLDER)
    answers = generate(checkpoint.FOLDER, prompts(), mode)
    for prompt, answer in zip(prompts(), answers, strict=True):
        if mode.name == "diffusion":
            assert answer == diffusion(net, prompt, mode.block_length)
        elif mode.name == "linear_spec":
            assert answer == linear(net, prompt, mode.block_length, adapter if mode.draft_lora else None)
        elif mode.name == "ar":
            assert answer == autoregressive(net, prompt)
        else:
            assert answer.tokens == autoregressive(net, prompt).tokens
