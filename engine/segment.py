"""What one sequence asks of the next step, run-length: never a list of tokens."""

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.modes import Mode
    from engine.sequence import Sequence


class Pattern(IntEnum):
    """Who sees whom inside the segment.

    CAUSAL: each token itself and those before. CANVAS: every token all others, while the canvas still has masks;
    a canvas without masks is run causally, so that its KV can be kept. QUADRATIC: `block` drafts, causal, then
    `block` groups of `block` masks; group g sees itself and the drafts 0..g. PAD fills a batch up and is nobody's.
    The codes are those of kernels/expand.py.
    """

    CAUSAL = 0
    CANVAS = 1
    QUADRATIC = 2
    PAD = 3


class Settle(IntEnum):
    """What ends the segment on the device, in the order in which a step holds its segments.

    KEEP: the KV alone (a prefill chunk). SAMPLE: the next token. DENOISE: commit confident tokens into the canvas, or
    the whole canvas if it had no masks left. VERIFY: the longest accepted prefix and one token more. NOTHING: what
    padding does. The codes are those of kernels/settle.py.
    """

    KEEP = 0
    SAMPLE = 1
    DENOISE = 2
    VERIFY = 3
    NOTHING = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """`block` tokens from the sequence's first uncached one; in a quadratic segment also their mask groups.

    `mode` planned it; prefill chunks are the scheduler's own and have none. `commits` is the most tokens that settling
    can commit, `drafted` how many drafts it verifies. `restart` voids first what stands after the seed token.
    `threshold` and `steps` belong to DENOISE; `lora` says that the draft adapter is on. `ahead` tokens are run by an
    earlier segment of the same step, which keeps their KV, so that this one's context starts after them. `drafts` were
    drawn elsewhere, and stand behind the seed token when the segment runs; they come at a seam with nothing in flight.
    """

    sequence: "Sequence"
    mode: "Mode | None"
    block: int
    pattern: Pattern
    settle: Settle
    commits: int
    drafted: int = 0
    restart: bool = False
    threshold: float = 0.0
    steps: int = 0
    lora: bool = False
    ahead: int = 0
    drafts: tuple[int, ...] = ()

    @property
    def query_tokens(self) -> int:
        return self.block * (self.block + 1) if self.pattern is Pattern.QUADRATIC else self.block

    def edits(self) -> list[tuple[int, int, int]]:
        """Where the drafts go: (row, column, token)."""
        behind = len(self.sequence.tokens)
        return [(self.sequence.row, behind + index, token) for index, token in enumerate(self.drafts)]


@dataclass(frozen=True, slots=True)
class Settled:
    """What the host learns of a settled segment: the tokens it committed, possibly none."""

    segment: Segment
    tokens: list[int]
