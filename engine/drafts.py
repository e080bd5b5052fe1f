"""Drafts that are drawn elsewhere: what is asked for, what is answered, and what a sequence knows of it.

Only token ids and sampling parameters are in it, so that whoever draws may be another process on another device.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from engine.config import SamplingParams


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a mode wants behind the seed token: `block` - 1 tokens, drawn in one pass with the draft adapter, or as a
    whole canvas, denoised as `threshold` and `steps` say."""

    block: int
    canvas: bool = False
    threshold: float = 0.0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """Asks for what stands behind the first `position` tokens of a sequence, of which `tokens` are the last: all, or
    those since the ask before. `key` names the sequence and `number` the ask."""

    key: int
    number: int
    position: int
    tokens: tuple[int, ...]
    wanted: Wanted
    sampling: SamplingParams


class Verdict(IntEnum):
    """DRAWN: here they are. FORGOTTEN: the ask does not follow what is known of the sequence; send all its tokens.
    DECLINED: draw them yourself."""

    DRAWN = 0
    FORGOTTEN = 1
    DECLINED = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """To the ask of that number; `passes` counts those that a canvas took."""

    key: int
    number: int
    verdict: Verdict
    tokens: tuple[int, ...] = ()
    passes: int = 0


class DraftSource(Protocol):
    """Whoever draws. Asks may be lost, and answered late or wrongly; nothing here raises because of that."""

    def send(self, asks: Seq[Ask], dropped: Seq[int]) -> None:
        """Asks for many sequences at once, and names those that will not be asked about again. Does not wait."""
        ...

    def poll(self) -> list[Answer]:
        """What has arrived since the last time. Does not wait."""
        ...

    def wait(self, seconds: float) -> None:
        """Returns when there may be something to poll, or the time is over."""
        ...


@dataclass(slots=True)
class DraftState:
    """What a sequence knows of drafts drawn elsewhere. Positions count committed tokens.

    `asked` is what was asked for last, and where, with the `whole` text or not; `answer` what came of it. The source
    has been told the first `told` tokens. `here` is where a round is drawn without it, after a miss; `off` says that
    all are, for a while.
    """

    key: int = -1
    number: int = 0
    told: int = 0
    whole: bool = False
    asked: tuple[int, Wanted] | None = None
    since: float = 0.0
    answer: Answer | None = None
    here: int = -1
    missed: int = 0  # in a row
    off: bool = False
    off_until: float = 0.0
