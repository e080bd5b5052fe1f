"""Text to token ids and back, for one checkpoint folder.

Text that a client sends can never become a control token: inside it `<|mask|>` is eight characters like any others.
Knows neither torch nor the engine.
"""

import codecs
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.config import CheckpointError, ModelConfig


class Tokenizer:
    """The tokenizer and the chat template of a checkpoint.

    Raises CheckpointError when a file is missing or of a kind that this server cannot decode.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        folder = Path(checkpoint)
        model = ModelConfig.from_json(folder / "config.json")
        raw = _read_json(folder / "tokenizer.json")
        if (raw.get("decoder") or {}).get("type") != "ByteLevel":
            raise CheckpointError(f"{folder / 'tokenizer.json'}: the decoder must be ByteLevel")
        own = {model.mask_id, model.bos_id, *model.eos_ids}
        self._ordinary = _ordinary_tokenizer(folder / "tokenizer.json", raw, own)
        self._control = _control_tokens(raw)
        self._control_ids = own.union(self._control.values())
        self._markers = _any_of(self._control)
        self._openings = _any_of({text[0] for text in self._control})
        self._longest = max(len(text.encode()) for text in self._ordinary.get_vocab())  # at least its bytes
        self._template = ChatTemplate.from_checkpoint(folder)
        self._bytes: dict[int, bytes] = {}

    def least_tokens(self, text: str) -> int:
        """A lower bound of `len(encode(text))` that costs next to nothing."""
        return -(-len(text.encode("utf-8", errors="replace")) // self._longest)

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text, without a control token. Raises ValueError for text that is not valid Unicode."""
        _refuse_surrogates(text)
        encoding = self._ordinary.encode(text, add_special_tokens=False)
        if self._control_ids.isdisjoint(encoding.ids):
            return list(encoding.ids)
        return self._encode_in_halves(text, encoding)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt, with the control tokens that the checkpoint puts around one (usually BOS)."""
        sample = self._ordinary.encode("x", add_special_tokens=True)
        first = sample.special_tokens_mask.index(0)
        return [*sample.ids[:first], *self.encode(text), *sample.ids[first + 1 :]]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation (`role`, `content`) up to where the assistant is to answer.

        Control tokens come from the template only. Raises ValueError for invalid Unicode and for a conversation that
        the template refuses.
        """
        for message in messages:
            _refuse_surrogates(message["content"])
        shield = _Shield()
        rendered = self._template.render(messages, lambda text: shield.hide(self._markers, text))
        # Templates cut content apart (history without its thinking), and what is left could close up to a control
        # token. Text whose every opening character is hidden cannot, so both must show the same control tokens.
        strict = self._template.render(messages, lambda text: shield.hide(self._openings, text))
        if self._markers.findall(rendered) != self._markers.findall(strict):
            rendered = strict
        ids: list[int] = []
        end = 0
        for marker in self._markers.finditer(rendered):
            ids += self.encode(shield.reveal(rendered[end : marker.start()]))
            ids.append(self._control[marker.group()])
            end = marker.end()
        return ids + self.encode(shield.reveal(rendered[end:]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens and ids outside the vocabulary have none."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._token_bytes(token) for token in ids])

    def _token_bytes(self, token: int) -> bytes:
        cached = self._bytes.get(token)
        if cached is None:
            text = None if token in self._control_ids else self._ordinary.id_to_token(token)
            cached = self._bytes[token] = b"" if text is None else _byte_level_bytes(text)
        return cached

    def _encode_in_halves(self, text: str, encoding: tokenizers.Encoding) -> list[int]:
        """For vocabularies that hold a control token's text as a whole word: cut such a word in two."""
        ids: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control_ids and end - start > 1:
                middle = (start + end) // 2
                ids += self.encode(text[start:middle]) + self.encode(text[middle:end])
            else:
                ids.append(token)
        return ids


class Detokenizer:
    """Text of a growing answer: the pieces joined are the decoded whole, and none ends within a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; may be empty."""
        return self._utf8.decode(self._tokenizer.bytes_of(ids))

    def finish(self) -> str:
        """What an answer that ended within a character leaves behind: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


class ChatTemplate:
    """A checkpoint's jinja2 chat template, run in a sandbox."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template cannot be parsed: {error}") from error
        self._variables = dict(variables)

    @staticmethod
    def from_checkpoint(folder: Path) -> "ChatTemplate":
        settings = _read_json(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = file.read_text("utf-8") if file.exists() else settings.get("chat_template")
        if not isinstance(source, str):
            raise CheckpointError(
                f"{folder}: no chat template, in tokenizer_config.json or chat_template.jinja"
            )
        return ChatTemplate(
            source, {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token")}
        )

    def render(self, messages: Sequence[Mapping[str, str]], escape: Callable[[str], str]) -> str:
        """The conversation as text, each content passed through `escape`. Raises ValueError if the template refuses."""
        escaped = [{"role": message["role"], "content": escape(message["content"])} for message in messages]
        try:
            return self._template.render(messages=escaped, add_generation_prompt=True, **self._variables)
        except Exception as error:  # a checkpoint's template may fail in any way that Python can
            raise ValueError(f"the chat template refuses these messages: {error}") from error


class _Shield:
    """Swaps text for sentinels that nobody outside can guess, and back."""

    def __init__(self) -> None:
        nonce = secrets.token_hex(8)
        self._open = f"\U000f0000{nonce}"
        self._sentinel = re.compile(self._open + "([0-9a-f]*)\U000f0001")

    def hide(self, pattern: re.Pattern[str], text: str) -> str:
        return pattern.sub(lambda match: f"{self._open}{match.group().encode().hex()}\U000f0001", text)

    def reveal(self, text: str) -> str:
        return self._sentinel.sub(lambda match: bytes.fromhex(match.group(1)).decode(), text)


def _ordinary_tokenizer(path: Path, raw: dict[str, Any], control_ids: set[int]) -> tokenizers.Tokenizer:
    """The tokenizer as it reads ordinary text; the ids in `control_ids` are control tokens however they are marked."""
    for token in raw.get("added_tokens", ()):
        token["special"] = token["special"] or token["id"] in control_ids
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # the library raises the bare class
        raise CheckpointError(f"{path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `texts`; nothing, if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _control_tokens(raw: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in raw.get("added_tokens", ()) if token["special"]}


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token is stored as its text
        return token.encode()


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: lone surrogate at character {error.start}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object")
    return value


def _token_text(token: Any) -> str:
    """tokenizer_config.json gives a token as its text or as a description of it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
