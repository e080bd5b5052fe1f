"""The byte-level BPE tokenizer of the tiny checkpoint: trained on the tasks, special ids where NLD has them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, MASK = 1, 11, 100
RESERVED = 111
CONTROLS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    10: "<|im_start|>",
    11: "<|im_end|>",
    12: "<think>",
    13: "</think>",
}
PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?=\p{N})|\s+(?!\S)|\s"

CHAT_TEMPLATE = (
    "{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}"
    "{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n<think></think>' + message.content + '<|im_end|>\\n' -}}"
    "{%- elif message.role != 'system' or not loop.first -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking is defined and enable_thinking"
    " else '<think></think>') -}}"
    "{%- endif -%}"
)


def reserved_names() -> list[str]:
    """The text of the ids below RESERVED."""
    return [CONTROLS.get(i, "<|mask|>" if i == MASK else f"<SPECIAL_{i}>") for i in range(RESERVED)]


def train(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of `size` ids learned from `texts`.

    The mask and the fillers are in the vocabulary but match no text: whoever writes "<|mask|>" gets its letters.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=reserved_names(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] in CONTROLS]
    return Tokenizer.from_str(json.dumps(definition))


def tokenizer_config(max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROLS[BOS],
        "eos_token": CONTROLS[EOS],
        "pad_token": CONTROLS[EOS],
        "unk_token": CONTROLS[0],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
