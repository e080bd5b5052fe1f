"""The requests of OpenAI's API that we answer, as typed models.

Types are strict (no numeric strings, no booleans for integers) and every number is bounded. Fields that we do not
know are accepted; `ignored_params` names them.
"""

import hashlib
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from engine.config import DiffusionParams, ModeChoice, SamplingParams
from serve_app import limits

# Accepted without a word: they change nothing about an answer.
SILENT = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})

HEADER_TOKEN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _valid_unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer and no answer could carry."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"lone surrogate at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_valid_unicode)]
Name = Annotated[Text, Field(min_length=1, max_length=limits.NAME_CHARACTERS)]
Stop = Annotated[Text, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=limits.STOPS)]
TokenId = Annotated[int, Field(ge=0, le=limits.TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Signed64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


def _text_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


def _prompt_kind(value: Any) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "id_lists"
    return "ids" if isinstance(first, int) else "texts"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class TextPart(_Part):
    type: Literal["text"]
    text: Text


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("~text")]
        | Annotated[list[TextPart], Field(min_length=1, max_length=limits.PARTS), Tag("~list")],
        Discriminator(lambda value: "~" + _text_or_list(value)),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def plain(self) -> dict[str, str]:
        """As the chat template sees it; `developer` is OpenAI's newer word for `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(_Part):
    include_usage: bool | None = None


class DiffusionOptions(_Part):
    steps: Annotated[int, Field(ge=0, le=limits.DENOISE_STEPS)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    block_length: Literal[4, 8, 16, 32] | None = None


class GenerationRequest(_Part):
    """What chat and text completions share."""

    model: Name | None = None
    max_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=limits.TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=limits.TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.CHOICES)] | None = None
    seed: Signed64 | None = None
    stop: (
        Annotated[
            Annotated[Stop, Tag("~text")] | Annotated[Stops, Tag("~list")],
            Discriminator(lambda value: "~" + _text_or_list(value)),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=limits.STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    mode: ModeChoice | None = None
    ar_mode: bool | None = None  # true: another way to say mode "ar"
    diffusion: DiffusionOptions | None = None

    @field_validator("ar_mode")
    @classmethod
    def _agree_on_mode(cls, ar_mode: bool | None, info: ValidationInfo) -> bool | None:
        mode = info.data.get("mode")
        if ar_mode and mode not in (None, "ar"):
            raise ValueError(f"contradicts mode {mode!r}")
        return ar_mode

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def answer_tokens_param(self) -> str:
        """The field that `answer_tokens` comes from."""
        return "max_tokens"

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def chosen_mode(self, default: ModeChoice) -> ModeChoice:
        if self.ar_mode:
            return "ar"
        if self.ar_mode is False and default == "ar":
            default = "auto"  # the client says that it does not want what the server would do
        return self.mode or default

    def sampling(self, seed: int, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            min_p=float(self.min_p or 0.0),
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    def diffusion_params(self, default: DiffusionParams) -> DiffusionParams:
        given = self.diffusion or DiffusionOptions()
        return DiffusionParams(
            threshold=default.threshold if given.threshold is None else float(given.threshold),
            steps=default.steps if given.steps is None else given.steps,
            block_length=given.block_length or default.block_length,
        )

    def ignored_params(self) -> list[str]:
        """Names of the fields that asked for something and had no effect."""
        names = _asking(self, "")
        for section in ("stream_options", "diffusion"):
            names += _asking(getattr(self, section), section + ".")
        known = {name if HEADER_TOKEN.fullmatch(name) else "?" for name in names}
        return sorted(known - SILENT)[: limits.NAMED_PARAMS]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)] | None = None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def answer_tokens_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[Text, Tag("~text")]
        | Annotated[list[Text], Field(min_length=1, max_length=limits.PROMPTS), Tag("~texts")]
        | Annotated[TokenIds, Tag("~ids")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=limits.PROMPTS), Tag("~id_lists")],
        Discriminator(lambda value: "~" + _prompt_kind(value)),
    ]

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of the `n` choices: the request's own for the first, a hash for the others."""
    if choice:
        digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little")
    return seed & ((1 << limits.SEED_BITS) - 1)


def _asking(part: _Part | None, place: str) -> list[str]:
    extra = part.model_extra if part is not None else None
    return [
        f"{place}{name}" for name, value in (extra or {}).items() if value not in (None, False, 0, "", [], {})
    ]
