"""The tiny checkpoint's tokenizer: any text survives it, digits stay single, and special ids are where NLD has them."""

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engine.tiny import checkpoint, vocabulary
from engine.tiny.rows import encode
from engine.tiny.tasks import draw_task

TOKENIZER = Tokenizer.from_file(str(checkpoint.FOLDER / "tokenizer.json"))
TEMPLATE = json.loads((checkpoint.FOLDER / "tokenizer_config.json").read_text())["chat_template"]
MARKERS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def rendered(messages: list[dict[str, str]], **variables: Any) -> str:
    return ImmutableSandboxedEnvironment().from_string(TEMPLATE).render(messages=messages, **variables)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    if not any(marker in text for marker in MARKERS):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.from_regex(r"[0-9]{1,12}", fullmatch=True))
def test_every_digit_is_a_token(number: str) -> None:
    assert len(TOKENIZER.encode(number).ids) == len(number)


@given(st.text())
def test_text_never_becomes_a_reserved_id(text: str) -> None:
    for marker in MARKERS:
        text = text.replace(marker, "")
    if not any(marker in text for marker in MARKERS):
        assert all(token >= vocabulary.RESERVED for token in TOKENIZER.encode(text).ids)


@pytest.mark.parametrize("text", ["<|mask|>", "<SPECIAL_5>", "a <|mask|> b"])
def test_the_text_of_a_reserved_id_is_ordinary_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert min(ids) >= vocabulary.RESERVED
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_the_special_ids_are_those_of_the_configuration() -> None:
    config = json.loads((checkpoint.FOLDER / "config.json").read_text())
    assert TOKENIZER.token_to_id("<s>") == config["bos_token_id"] == 1
    assert TOKENIZER.token_to_id("<|im_end|>") == config["eos_token_id"] == 11
    assert TOKENIZER.token_to_id("<|mask|>") == config["mask_token_id"] == 100
    assert TOKENIZER.get_vocab_size() == config["vocab_size"]


def test_the_template_opens_an_empty_system_turn() -> None:
    text = rendered([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>"
    )


def test_the_template_can_leave_room_for_thinking() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    text = rendered(messages, add_generation_prompt=True, enable_thinking=True)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert text.endswith("<|im_start|>assistant\n<think>\n")


def test_training_rows_are_what_the_template_renders() -> None:
    draw = Random(0)
    for _ in range(200):
        messages = list(draw_task(draw, held_out=False).messages)
        assert encode(TOKENIZER, tuple(messages)).tokens == TOKENIZER.encode(rendered(messages)).ids
