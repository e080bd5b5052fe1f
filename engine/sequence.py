"""One sequence being generated: a few counters, the committed tokens, and who decodes it."""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from engine.config import ModeChoice, ModeName, SamplingParams
from engine.drafts import DraftState
from engine.pages import page_key, salt_key
from engine.request import DecodeStats, Request

if TYPE_CHECKING:
    from engine.modes import Mode
    from engine.segment import Segment, Settled


def stop_ids(sampling: SamplingParams, eos_ids: Iterable[int]) -> frozenset[int]:
    """The tokens that end an answer."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_ids))


class Sequence:
    """The host's view of a request inside the engine.

    `tokens` holds prompt and committed answer. `prefilled` counts the tokens whose causal KV the cache had, the first
    `found`, or prefill has asked for, up to `prefill_target`. Segments that run on the device but have not been
    reported yet are counted by `in_flight`, and the most tokens that they can commit by `uncertain`. At all times
    0 <= found <= prefilled <= prefill_target <= len(tokens).
    """

    def __init__(self, request: Request, choice: ModeChoice, eos_ids: Iterable[int], arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.tokens: list[int] = [*request.prompt, *request.generated]
        self.num_prompt = len(request.prompt)
        self.stop_ids = stop_ids(request.sampling, eos_ids)
        self.choice = choice
        self.decided: tuple[ModeName, int] | None = None  # by the controller: mode and block length
        self.mode: Mode | None = None
        self.wanted: Mode | None = None  # takes over at the next seam
        self.last: Segment | None = None  # the segment planned last, since the last restart
        self.restart = False  # what stands after the seed token on the device is void
        self.canvas_open = False  # the last report left a canvas with masks
        self.row = -1
        self.pages: list[int] = []
        self.registered = 0  # the first of the pages, which others may share
        self.found = 0
        self.cached_tokens: int | None = None  # of the prompt, found at the first start
        self.prefilled = 0
        self.prefill_target = 0
        self.in_flight = 0
        self.uncertain = 0
        self.finish_reason: str | None = None
        self.modes_used: list[str] = []
        self.forwards = self.decoded = 0
        self.drafted = self.accepted = self.denoise_passes = self.canvases = 0
        self.draft = DraftState()
        self.drafted_elsewhere = 0
        self._keys: list[bytes] = []

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def decoding(self) -> bool:
        return self.row >= 0 and self.prefilled == self.prefill_target

    @property
    def max_context(self) -> int:
        """The most tokens that can have causal KV once everything in flight has settled."""
        return self.prefilled if not self.decoding else len(self.tokens) - 1 + self.uncertain

    @property
    def final_context(self) -> int:
        """The slots whose causal KV is there once the steps launched so far have run, and which no later one writes."""
        return self.prefilled if not self.decoding else max(self.prefilled, len(self.tokens) - 1)

    def page_key(self, index: int, page_size: int) -> bytes:
        """The identity of a page that the tokens fill, worked out once."""
        while len(self._keys) <= index:
            parent = self._keys[-1] if self._keys else salt_key(self.request.cache_salt)
            first = len(self._keys) * page_size
            self._keys.append(page_key(parent, self.tokens[first : first + page_size]))
        return self._keys[index]

    def start(self, row: int, found: int) -> None:
        """Takes a row of the device tables; prefill starts after the first `found` tokens, whose pages it has."""
        assert self.row < 0 and not self.in_flight
        self.row, self.found, self.prefilled = row, found, found
        self.prefill_target = max(self.num_prompt, len(self.tokens) - 1)
        if self.cached_tokens is None:
            self.cached_tokens = min(found, self.num_prompt)

    def check(self) -> None:
        """Asserts the invariant."""
        assert 0 <= self.found <= self.prefilled <= self.prefill_target <= len(self.tokens)
        assert self.in_flight >= 0 and self.uncertain >= 0 and (self.row >= 0 or not self.pages)

    def switch(self, mode: "Mode") -> None:
        """Hands the sequence, which stands at a seam, to another mode."""
        # a row that has just been filled has nothing behind its seed token
        self.last, self.restart, self.canvas_open = None, self.mode is not None, False
        self.mode, self.wanted = mode, None
        if mode.name not in self.modes_used:
            self.modes_used.append(mode.name)

    def append(self, tokens: Iterable[int]) -> list[int]:
        """Commits tokens up to the first stop id or the length limit; returns those that count."""
        if self.finish_reason is not None:
            return []
        room = self.request.sampling.max_tokens - self.num_generated
        new = list(islice(tokens, room))
        if not self.stop_ids.isdisjoint(new):
            del new[next(index for index, token in enumerate(new) if token in self.stop_ids) + 1 :]
            self.finish_reason = "stop"
        elif len(new) == room:
            self.finish_reason = "length"
        self.tokens += new
        return new

    def append_verified(self, settled: "Settled") -> list[int]:
        """Commits what a verification let stand and counts its drafts."""
        if settled.segment.drafted:
            self.drafted += settled.segment.drafted
            self.accepted += len(settled.tokens) - 1
        return self.append(settled.tokens)

    def stats(self) -> DecodeStats:
        return DecodeStats(
            tuple(self.modes_used),
            self.forwards,
            self.decoded,
            self.drafted,
            self.accepted,
            self.denoise_passes,
            self.canvases,
            self.cached_tokens or 0,
            self.drafted_elsewhere,
        )
