"""The one typed configuration: the command line, YAML files and the Serve builder all make an AppConfig.

Ray reads many of its settings from environment variables; `ray_environment` derives them from here, so that the same
configuration gives the same server everywhere.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.checkpoint import short_name
from engine.config import BLOCK_LENGTHS, EngineConfig
from serve_app import limits

BUNDLED_CHECKPOINT = EngineConfig().checkpoint
BLOCK_PLACES = tuple(
    f"{engine}.{place}"
    for engine in ("engine", "draft.engine")
    for place in ("block_length", "diffusion.block_length")
)
AGREED = ("checkpoint", "load_format", "block_length", "max_model_len")  # between engine and draft.engine


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the keys and says why."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class ServerConfig(_Section):
    """What clients see. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = ""  # empty: the checkpoint's, org/name or the folder's
    ingress_replicas: int = 1
    ingress_per_node: int = (
        0  # of them, at most, so that one node's end does not cut every connection; 0: any number
    )
    max_body_bytes: int = 4 * limits.MIB
    default_max_tokens: int = 4096  # of a request that sets none; never more than its context leaves
    stream_interval_seconds: float = 0.01  # between a stream's chunks, where the engine is faster
    whole_interval_seconds: float = 0.1  # between engine and ingress, for answers that do not stream
    keep_alive_seconds: float = 15.0  # an SSE comment after so much silence


class ServeConfig(_Section):
    """How Ray Serve runs the application. Times in seconds."""

    proxy: Literal["python", "haproxy"] = "python"  # HAProxy carries more, but tells of some disconnects late
    max_ongoing_requests: int = 1024  # per engine replica; they wait in the engine, not in Serve
    max_queued_requests: int = 1024  # per ingress replica, beyond those; more are answered 503
    access_log: bool = False
    health_check_seconds: float = 1.0
    heartbeat_seconds: float = (
        5.0  # an engine with work and without a step gets no requests; its own go on elsewhere
    )
    stuck_seconds: float = 30.0  # such an engine is replaced
    start_seconds: float = 1800.0  # until every replica must be up
    drain_seconds: float = 600.0  # what a leaving replica's streams get
    stats_port: int = 8404  # HAProxy's own pages
    metrics_port: int = 9101


class DraftConfig(_Section):
    """The draft pool of a staged application."""

    replicas: int = 1
    patience_seconds: float = 0.25  # that an answer may take; later ones are drawn by who asked
    engine: EngineConfig = Field(default_factory=EngineConfig)  # what is not set here is as in `engine`


class AppConfig(_Section):
    """The whole application. Unknown keys are errors at every level."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    server: ServerConfig = ServerConfig()
    serve: ServeConfig = ServeConfig()
    replicas: int = 1  # of the engine
    topology: Literal["colocated", "staged"] = "colocated"  # staged: drafts are drawn by a pool of their own
    draft: DraftConfig = DraftConfig()  # for the staged topology
    ar_mode: bool = False  # another way to say engine.default_mode: ar

    @model_validator(mode="before")
    @classmethod
    def _read_keys(cls, raw: Any) -> Any:
        # Here and not in pydantic's own message, so that whoever validates gets the suggestion.
        unknown = list(_unknown_keys(cls, raw, ""))
        if unknown:
            raise ValueError("; ".join(unknown))
        return _inherited(raw) if isinstance(raw, Mapping) and raw.get("topology") == "staged" else raw

    @model_validator(mode="after")
    def _check_bounds(self) -> "AppConfig":
        for place, (least, most) in limits.CONFIG.items():
            value = _at(self, place)
            if not least <= value <= most:
                raise ValueError(f"{place} must be between {least} and {most}, not {value}")
        for place in BLOCK_PLACES:
            if _at(self, place) not in (0, *BLOCK_LENGTHS):
                raise ValueError(f"{place} must be 0 or one of {BLOCK_LENGTHS}, not {_at(self, place)}")
        if self.ar_mode and self.engine.default_mode not in ("auto", "ar"):
            raise ValueError(f"ar_mode contradicts engine.default_mode: {self.engine.default_mode}")
        for place, engine in self.engines.items():
            if engine.tensor_parallel > 1 and engine.device not in ("cpu", "cuda"):
                raise ValueError(
                    f"{place}.device must be cpu or cuda with {place}.tensor_parallel above 1, not {engine.device}: "
                    "each rank has a GPU of its own"
                )
        if self.engine.weights == "fp8":
            raise ValueError("engine.weights: fp8 may only draft, and this engine answers; use 'checkpoint'")
        if self.topology == "colocated" and self.draft != DraftConfig():
            raise ValueError("draft is for topology: staged, and topology is colocated")
        for name in AGREED if self.topology == "staged" else ():
            ours, theirs = getattr(self.engine, name), getattr(self.draft.engine, name)
            if ours != theirs:
                raise ValueError(f"draft.engine.{name} must be as in engine, {ours!r}, not {theirs!r}")
        return self

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        if self.server.model_name:
            return self.server.model_name
        if Path(self.engine.checkpoint) == Path(BUNDLED_CHECKPOINT):
            return "triserve-tiny"
        return short_name(self.engine.checkpoint)

    @property
    def engines(self) -> dict[str, EngineConfig]:
        """The configurations of all kinds of engines that run, by their places."""
        return {"engine": self.engine} | (
            {"draft.engine": self.draft.engine} if self.topology == "staged" else {}
        )

    @property
    def draft_canvases(self) -> bool:
        """Whether the draft pool draws the canvases that the engine would; drafts may be worse, since they are
        verified."""
        drafter = self.draft.engine
        return drafter.weights == "checkpoint" and drafter.dtype == self.engine.dtype

    @property
    def effective_engine(self) -> EngineConfig:
        """The engine's configuration with `ar_mode` applied."""
        return dataclasses.replace(self.engine, default_mode="ar") if self.ar_mode else self.engine


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> AppConfig:
    """Reads a YAML file, if any, and sets `overrides` (dotted key: value) in it. Raises ConfigError."""
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(path.read_text("utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: must hold a mapping, not {type(raw).__name__}")
    for place, value in (overrides or {}).items():
        *sections, name = place.split(".")
        section = raw
        for key in sections:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{path}: {key} must hold a mapping")
        section[name] = value
    try:
        return AppConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(detail) for detail in error.errors())) from error


def logging_config(config: AppConfig) -> dict[str, Any]:
    """How Serve's processes log: what goes wrong, and requests if asked to."""
    return {
        "log_level": "INFO" if config.serve.access_log else "WARNING",
        "enable_access_log": config.serve.access_log,
    }


def ray_environment(config: AppConfig) -> dict[str, str]:
    """The environment variables that Ray's processes need for `config`, all of them and nothing else.

    One event loop per replica and gRPC between deployments: cancellation is reliable in this combination, and a stream
    over two hops carries three times the chunks.
    """
    haproxy = config.serve.proxy == "haproxy"
    environment = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1" if haproxy else "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(config.serve.health_check_seconds),
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # what is logged of a failing replica is not to be lost
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung one would keep its GPU for `drain_seconds`
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if haproxy:
        drain = str(int(config.serve.drain_seconds))
        environment |= {
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": drain,
            "RAY_SERVE_HAPROXY_STATS_PORT": str(config.serve.stats_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(config.serve.metrics_port),
        }
    return environment


def _inherited(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with what `engine` sets under draft.engine, where that does not set it. What is no section is left for
    the validation of its place to refuse."""
    draft = raw.get("draft", {})
    if not isinstance(draft, Mapping):
        return raw
    engine, own = _keys(raw.get("engine", {})), _keys(draft.get("engine", {}))
    if engine is None or own is None:
        return raw
    engine.pop("rendezvous_port", None)  # two groups on one node cannot share it
    return {**raw, "draft": {**draft, "engine": {**engine, **own}}}


def _keys(section: Any) -> dict[str, Any] | None:
    """What a section sets; None if it is none."""
    if isinstance(section, EngineConfig):
        return dataclasses.asdict(section)
    return dict(section) if isinstance(section, Mapping) else None


def _at(value: Any, place: str) -> Any:
    for name in place.split("."):
        value = getattr(value, name)
    return value


def _fields(section: Any) -> dict[str, Any] | None:
    """The keys of a configuration class with their types; None for anything else."""
    if dataclasses.is_dataclass(section) and isinstance(section, type):
        return typing.get_type_hints(section)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return None


def _unknown_keys(section: Any, raw: Any, place: str) -> Iterator[str]:
    fields = _fields(section)
    if fields is None or not isinstance(raw, Mapping):
        return
    for key, value in raw.items():
        if key in fields:
            yield from _unknown_keys(fields[key], value, f"{place}{key}.")
            continue
        close = difflib.get_close_matches(str(key), fields, n=1)
        known = f"did you mean {place}{close[0]}?" if close else f"known: {', '.join(fields)}"
        yield f"unknown key {place}{key} ({known})"


def _sentence(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
