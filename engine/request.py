"""What the engine is asked to generate, as plain values: also the journal from which another replica continues."""

from dataclasses import dataclass, field

from engine.config import DiffusionParams, ModeChoice, SamplingParams


class EngineError(RuntimeError):
    """The engine has died; nothing more comes from it."""


@dataclass(frozen=True, slots=True)
class Slo:
    """A tier's promise, as the engine sees it. Times in seconds; `lossless` forbids diffusion."""

    ttft: float = float("inf")
    tpot: float = float("inf")
    weight: float = 1.0
    lossless: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to generate: `generated` holds the tokens already committed elsewhere, if it is resumed."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    mode: ModeChoice | None = None  # None: the engine's default
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)
    generated: tuple[int, ...] = ()
    slo: Slo = field(default_factory=Slo)
    cache_salt: str = ""  # requests share cached pages only with those of the same salt
    alone: bool = False  # on probation: no other request runs on the engine while it does


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """How an answer was decoded. `forwards` counts the steps in which the sequence had a segment and `tokens` what they
    committed; neither has the prefill, nor the first token, which comes from it. `cached_tokens` counts those of the
    prompt that needed no prefill, since the cache had their KV. `drafted_elsewhere` counts the rounds whose drafts or
    canvas a draft stage drew, with forwards that are not among `forwards`. `resumed` counts the engines that the answer
    outlived; all else is of the last engine, and of those that handed it over in order."""

    modes: tuple[str, ...] = ()
    forwards: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    denoise_passes: int = 0
    canvases: int = 0
    cached_tokens: int = 0
    drafted_elsewhere: int = 0
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one request, or none where one on probation starts. `finish_reason` comes with the last one:
    "stop", "length", "abort" or "moved" (to be continued by another engine), with `stats`; or "refused" or "error",
    with `error` saying why."""

    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stats: DecodeStats | None = None
    error: str | None = None
