"""One choice of a response: tokens in, text out, cut at the first stop string."""

from collections.abc import Sequence

from engine.request import DecodeStats, Request
from engine.tokenizer import Detokenizer, Tokenizer


class Answer:
    """The growing text of one sequence. What could become a stop string is held back until it is known not to."""

    def __init__(self, request: Request, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.request = request
        self.tokens = 0  # completion tokens, up to and including the one that ended the answer
        self.finish_reason: str | None = None
        self.stats = DecodeStats()
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that `push` has returned."""
        return "".join(self._pieces)

    def push(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        """The text that these tokens release. Sets `finish_reason` when the answer has ended."""
        if self._stops:
            text = self._push_until_stop(token_ids)
        else:
            self.tokens += len(token_ids)
            text = self._detokenizer.push(token_ids)
        if finish_reason is not None and self.finish_reason is None:
            text += self._release(self._detokenizer.finish(), final=True)
            self.finish_reason = self.finish_reason or finish_reason
        self._pieces.append(text)
        return text

    def _push_until_stop(self, token_ids: Sequence[int]) -> str:
        """Token by token, so that the count does not depend on how many came in one step."""
        text = ""
        for token in token_ids:
            self.tokens += 1
            text += self._release(self._detokenizer.push((token,)), final=False)
            if self.finish_reason is not None:
                break
        return text

    def _release(self, new: str, *, final: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.finish_reason = "stop"
            self._held = ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
