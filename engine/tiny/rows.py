"""Training rows: chats as token ids, and batches of [clean ; noisy] tokens with the block mask.

R rows, n clean tokens each, w noisy tokens each; a noisy block is a canvas of the clean text at the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.tiny.tasks import Message, Task, draw_task
from engine.tiny.vocabulary import EOS, MASK

CHAIN_LENGTHS = (0, 0, 0, 0, 0, 100, 200)
BLOCK_LENGTHS = (4, 8, 16, 16, 16, 32, 32, 32)
LONGEST_BLOCK = 32


@dataclass(frozen=True)
class Row:
    """A conversation: token ids and the [start, end) of each answer, its final end token included."""

    tokens: list[int]
    answers: list[tuple[int, int]]


def encode(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> Row:
    """The conversation as the chat template renders it."""
    tokens: list[int] = []
    answers = []
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    tokens += tokenizer.encode(f"<|im_start|>system\n{system}<|im_end|>\n").ids
    for turn in turns:
        if turn["role"] == "user":
            tokens += tokenizer.encode(f"<|im_start|>user\n{turn['content']}<|im_end|>\n").ids
            continue
        tokens += tokenizer.encode("<|im_start|>assistant\n<think></think>").ids
        start = len(tokens)
        tokens += tokenizer.encode(f"{turn['content']}<|im_end|>").ids
        answers.append((start, len(tokens)))
        tokens += tokenizer.encode("\n").ids
    return Row(tokens, answers)


def conversation(draw: Random, echo_share: float) -> tuple[Message, ...]:
    """One task, or several tasks without a system prompt in one long chat of about a drawn length."""
    task = draw_task(draw, held_out=False, family="echo" if draw.random() < echo_share else None)
    wanted = draw.choice(CHAIN_LENGTHS)
    messages = task.messages
    while messages[0]["role"] != "system" and sum(len(m["content"]) for m in messages) < 2 * wanted:
        following: Task = draw_task(draw, held_out=False)
        if following.messages[0]["role"] != "system":
            messages += following.messages
    return messages


@dataclass(frozen=True)
class Batch:
    """One forward: inputs [R, n+w], then which flat positions (row-major) are scored and against which token."""

    tokens: Tensor
    positions: Tensor
    visible: Tensor  # [R, n+w, n+w] bool
    drafting: Tensor  # [R, n+w] bool, the noisy tokens
    causal_at: Tensor
    causal_targets: Tensor
    noisy_at: Tensor
    noisy_targets: Tensor
    noisy_reference: Tensor  # flat position whose causal logits predict the same token


def blocks(draw: Random, row: Row, width: int, drafts_only: bool) -> tuple[list[int], list[int], list[bool]]:
    """Noisy blocks filling `width` tokens: position, block number and masked, per token."""
    positions: list[int] = []
    owner: list[int] = []
    masked: list[bool] = []
    length = draw.choice(BLOCK_LENGTHS)
    for number in range(width // length):
        start, end = draw.choices(row.answers, [last - first for first, last in row.answers])[0]
        first = start if draw.random() < 0.2 else draw.randrange(start, end - 1)
        ratio = 1.0 if drafts_only or draw.random() < 0.4 else draw.random()
        seed_masked = not drafts_only and draw.random() < 0.05
        positions += range(first, first + length)
        owner += [number] * length
        masked += [seed_masked] + [draw.random() < ratio for _ in range(length - 1)]
    return positions, owner, masked


def assemble(draw: Random, rows: list[Row], noisy: bool, drafts_only: bool) -> Batch:
    """Rows to one batch; after a row's end, and after an answer's end inside a block, every token is the end token."""
    n = -(-max(len(row.tokens) for row in rows) // 16) * 16
    w = max(n * 6 // 10 // LONGEST_BLOCK, 1) * LONGEST_BLOCK if noisy else 0
    count = len(rows)
    tokens = torch.full((count, n + w), EOS)
    positions = torch.arange(n + w).repeat(count, 1)
    owner = torch.full((count, w), -1)
    starts = torch.zeros(count, w, dtype=torch.long)
    lists: dict[str, list[int]] = {"ca": [], "ct": [], "na": [], "nt": [], "nr": []}
    for r, row in enumerate(rows):
        base = r * (n + w)
        tokens[r, : len(row.tokens)] = torch.tensor(row.tokens)
        end_of = {}
        for first, last in row.answers:
            lists["ca"] += range(base + first - 1, base + last - 1)
            lists["ct"] += row.tokens[first:last]
            end_of.update(dict.fromkeys(range(first, last), last))
        if not noisy:
            continue
        places, owners, masked = blocks(draw, row, w, drafts_only)
        positions[r, n:] = torch.tensor(places)
        owner[r] = torch.tensor(owners)
        begin, limit, ids = 0, 0, []
        for j, place in enumerate(places):
            if j == 0 or owners[j] != owners[j - 1]:
                begin, limit = place, end_of[place]
            starts[r, j] = begin
            token = row.tokens[place] if place < limit else EOS
            ids.append(MASK if masked[j] else token)
            if masked[j]:
                lists["na"].append(base + n + j)
                lists["nt"].append(token)
                lists["nr"].append(base + place - 1 if place < limit else -1)
        tokens[r, n:] = torch.tensor(ids)
    visible = torch.zeros(count, n + w, n + w, dtype=torch.bool)
    visible[:, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
    visible[:, n:, :n] = torch.arange(n) < starts[:, :, None]
    visible[:, n:, n:] = owner[:, :, None] == owner[:, None, :]
    drafting = (torch.arange(n + w) >= n).repeat(count, 1)
    return Batch(
        tokens, positions, visible, drafting, *(torch.tensor(lists[k], dtype=torch.long) for k in lists)
    )


def batches(
    draw: Random,
    tokenizer: Tokenizer,
    size: int,
    noisy: bool = False,
    drafts_only: bool = False,
    echo_share: float = 0.0,
) -> Iterator[Batch]:
    """Endless batches of about `size` clean tokens, rows of similar length together."""
    while True:
        chats = (conversation(draw, echo_share) for _ in range(size // 12))
        pool = sorted((encode(tokenizer, messages) for messages in chats), key=lambda row: len(row.tokens))
        groups: list[list[Row]] = [[]]
        for row in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(row.tokens) > size:
                groups.append([])
            groups[-1].append(row)
        draw.shuffle(groups)
        for group in groups:
            if len(group) * len(group[-1].tokens) > size // 2:
                yield assemble(draw, group, noisy, drafts_only)
