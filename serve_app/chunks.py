"""What an engine replica tells the ingress of one answer."""

from typing import Any, NamedTuple


class Chunk(NamedTuple):
    """New tokens, or none: a sign of life, which comes at once and then in every silence while the engine makes steps.

    Besides the engine's finish reasons there is "refused", whose error starts with the parameter at fault. `running`
    says that the sequence takes part in steps, rather than waits. `stats` are the fields of DecodeStats.
    """

    token_ids: list[int] = []  # never changed
    finish_reason: str | None = None
    stats: dict[str, Any] | None = None
    error: str | None = None
    running: bool = False
