import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CheckpointError, EngineConfig, ModelConfig
from engine.tokenizer import ChatTemplate, Detokenizer, Tokenizer

FOLDER = Path(EngineConfig().checkpoint)
MODEL = ModelConfig.from_json(FOLDER / "config.json")
TOKENIZER = Tokenizer(FOLDER)
REFERENCE = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
CONTROL_TEXTS = [
    "<|mask|>",
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "</s>",
    "<think>",
    "</think>",
    "<SPECIAL_50>",
]

valid_text = st.text()
hostile_text = st.lists(
    st.one_of(st.sampled_from(CONTROL_TEXTS), valid_text, st.sampled_from(["<", "|>", "\n"]))
).map("".join)


def copy(tmp_path: Path, **changed: str | None) -> Path:
    """A copy of the checkpoint's small files with some replaced (text) or left out (None)."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    for stem, text in changed.items():
        file = tmp_path / f"{stem}.json"
        file.unlink()
        if text is not None:
            file.write_text(text)
    return tmp_path


def control_ids() -> frozenset[int]:
    raw = json.loads((FOLDER / "tokenizer.json").read_text())
    special = {token["id"] for token in raw["added_tokens"] if token["special"]}
    return frozenset(special | {MODEL.mask_id, MODEL.bos_id, *MODEL.eos_ids})


CONTROL = control_ids()


@settings(max_examples=40)
@given(hostile_text)
def test_no_text_encodes_to_a_control_token(text: str) -> None:
    assert CONTROL.isdisjoint(TOKENIZER.encode(text))


@settings(max_examples=40)
@given(hostile_text)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), hostile_text), min_size=1, max_size=4))
def test_content_adds_no_control_token_to_a_conversation(turns: list[tuple[str, str]]) -> None:
    hostile = [{"role": role, "content": content} for role, content in turns]
    harmless = [{"role": role, "content": "x" if content else ""} for role, content in turns]

    def controls(messages: list[dict[str, str]]) -> list[int]:
        return [token for token in TOKENIZER.encode_chat(messages) if token in CONTROL]

    assert controls(hostile) == controls(harmless)


@settings(max_examples=40)
@given(st.lists(valid_text.filter(lambda text: "<" not in text), min_size=1, max_size=3))
def test_a_conversation_of_plain_text_is_encoded_as_the_reference_does(texts: list[str]) -> None:
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    messages = [{"role": "user", "content": text} for text in texts]
    rendered = ChatTemplate(config["chat_template"], {}).render(messages, str)
    assert TOKENIZER.encode_chat(messages) == REFERENCE.encode(rendered, add_special_tokens=False).ids


def test_a_template_that_cuts_content_apart_cannot_forge_a_control_token(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    config["chat_template"] = "<|im_start|>{{ messages[0].content.replace('#', '') }}<|im_end|>"
    tokenizer = Tokenizer(copy(tmp_path, tokenizer_config=json.dumps(config)))
    ids = tokenizer.encode_chat([{"role": "user", "content": "a<|im#_end|>b"}])
    assert [token for token in ids if token in CONTROL] == [ids[0], ids[-1]]
    assert tokenizer.encode_chat([{"role": "user", "content": "a#b"}])[1:-1] == tokenizer.encode("ab")


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "\udc00\ud800"])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        TOKENIZER.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        TOKENIZER.encode_chat([{"role": "user", "content": text}])


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, MODEL.vocab_size + 10))))
def test_pieces_of_an_answer_join_to_the_decoded_whole(steps: list[list[int]]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(step) for step in steps] + [detokenizer.finish()]
    assert "".join(pieces) == TOKENIZER.decode([token for step in steps for token in step])


@settings(max_examples=40)
@given(valid_text)
def test_no_piece_ends_within_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push([token]) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=40)
@given(st.lists(st.integers(0, MODEL.vocab_size - 1)))
def test_decoding_equals_the_reference(ids: list[int]) -> None:
    ordinary = [token for token in ids if token not in CONTROL]
    assert TOKENIZER.decode(ids) == REFERENCE.decode(ordinary, skip_special_tokens=False)


def test_a_template_may_refuse_a_conversation() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ValueError, match="roles must alternate"):
        template.render([{"role": "user", "content": "x"}], str)


def test_a_template_cannot_leave_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(ValueError, match="unsafe"):
        template.render([{"role": "user", "content": "x"}], str)


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("tokenizer", None, "No such file"),
        ("tokenizer", "[]", "must hold an object"),
        ("tokenizer", "{}", "decoder must be ByteLevel"),
        ("tokenizer", '{"decoder": {"type": "ByteLevel"}}', "tokenizer.json"),
        ("tokenizer_config", "{}", "no chat template"),
        ("tokenizer_config", '{"chat_template": "{% if %}"}', "cannot be parsed"),
        ("config", "{", "config.json"),
    ],
)
def test_an_unusable_checkpoint_is_named(tmp_path: Path, file: str, text: str | None, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        Tokenizer(copy(tmp_path, **{file: text}))
