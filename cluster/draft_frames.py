"""What crosses between a verify and a draft stage, as frames of little-endian uint32: token ids and the bits of
sampling parameters, nothing else.

A frame begins with its kind and version and what it counts. One that is not what it says raises FrameError: whatever
comes from outside is checked here.
"""

import math
import struct
from collections.abc import Sequence as Seq

from engine.config import SamplingParams
from engine.drafts import Answer, Ask, Verdict, Wanted

ASKS, ANSWERS = 0x54534101, 0x54534201  # what a frame starts with
MAX_BYTES = 1 << 27  # a frame: the longest text fits
MAX_ITEMS = 1 << 14  # of a kind in a frame
MAX_POSITION = 1 << 24
MAX_BLOCK, MAX_STEPS = 1 << 10, 1 << 16
TOKENS = 1 << 31

_HEAD = struct.Struct("<III")  # kind, items, dropped keys
# key, number, position, block, canvas, steps, threshold, temperature, top_p, min_p, top_k, seed, tokens
_ASK = struct.Struct("<QIIIIIddddIQI")
_ANSWER = struct.Struct("<QIIII")  # key, number, verdict, passes, tokens
_KEY = struct.Struct("<Q")


class FrameError(ValueError):
    """A frame cannot be read."""


def pack_asks(asks: Seq[Ask], dropped: Seq[int]) -> bytes:
    """Asks for any number of sequences, and the keys of those that have ended."""
    parts = [_HEAD.pack(ASKS, len(asks), len(dropped))]
    for ask in asks:
        wanted, sampling = ask.wanted, ask.sampling
        parts.append(
            _ASK.pack(
                ask.key,
                ask.number,
                ask.position,
                wanted.block,
                wanted.canvas,
                wanted.steps,
                wanted.threshold,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.top_k,
                sampling.seed,
                len(ask.tokens),
            )
        )
        parts.append(struct.pack(f"<{len(ask.tokens)}I", *ask.tokens))
    parts += map(_KEY.pack, dropped)
    return b"".join(parts)


def unpack_asks(frame: bytes) -> tuple[list[Ask], list[int]]:
    """The asks, whose sampling parameters are those that choose a token, and the dropped keys."""
    reader = _Reader(frame, ASKS)
    asks = []
    for _ in range(reader.items):
        (
            key,
            number,
            position,
            block,
            canvas,
            steps,
            threshold,
            temperature,
            top_p,
            min_p,
            top_k,
            seed,
            count,
        ) = reader.take(_ASK)
        _check(0 < position <= MAX_POSITION and count <= position, "a position out of bounds")
        _check(0 < block <= MAX_BLOCK and canvas <= 1 and steps <= MAX_STEPS, "a block out of bounds")
        reals = (threshold, temperature, top_p, min_p)
        _check(all(math.isfinite(real) and real >= 0 for real in reals), "a parameter that is no number")
        _check(
            max(threshold, top_p, min_p) <= 1 and top_k < TOKENS and seed < 1 << 63,
            "a parameter out of bounds",
        )
        wanted = Wanted(block, bool(canvas), threshold, steps)
        sampling = SamplingParams(temperature, top_k, top_p, min_p, seed)
        asks.append(Ask(key, number, position, reader.tokens(count), wanted, sampling))
    dropped = [reader.take(_KEY)[0] for _ in range(reader.dropped)]
    reader.end()
    return asks, dropped


def pack_answers(answers: Seq[Answer]) -> bytes:
    parts = [_HEAD.pack(ANSWERS, len(answers), 0)]
    for answer in answers:
        count = len(answer.tokens)
        parts.append(_ANSWER.pack(answer.key, answer.number, answer.verdict, answer.passes, count))
        parts.append(struct.pack(f"<{count}I", *answer.tokens))
    return b"".join(parts)


def unpack_answers(frame: bytes) -> list[Answer]:
    reader = _Reader(frame, ANSWERS)
    answers = []
    for _ in range(reader.items):
        key, number, verdict, passes, count = reader.take(_ANSWER)
        _check(
            verdict <= max(Verdict) and passes <= MAX_STEPS and count <= MAX_BLOCK, "an answer out of bounds"
        )
        answers.append(Answer(key, number, Verdict(verdict), reader.tokens(count), passes))
    _check(not reader.dropped, "answers with dropped keys")
    reader.end()
    return answers


def sent(sampling: SamplingParams) -> SamplingParams:
    """What the other side learns of sampling parameters: those that choose a token."""
    return SamplingParams(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)


class _Reader:
    def __init__(self, frame: bytes, kind: int) -> None:
        _check(_HEAD.size <= len(frame) <= MAX_BYTES, f"a frame of {len(frame)} bytes")
        self._frame, self._at = frame, 0
        found, self.items, self.dropped = self.take(_HEAD)
        _check(found == kind, f"a frame of kind {found:#x}")
        _check(max(self.items, self.dropped) <= MAX_ITEMS, "too many items")

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        self._need(layout.size)
        values = layout.unpack_from(self._frame, self._at)
        self._at += layout.size
        return values

    def tokens(self, count: int) -> tuple[int, ...]:
        self._need(4 * count)
        values = struct.unpack_from(f"<{count}I", self._frame, self._at)
        self._at += 4 * count
        _check(not count or max(values) < TOKENS, "a token id out of bounds")
        return values

    def end(self) -> None:
        _check(self._at == len(self._frame), f"{len(self._frame) - self._at} bytes too many")

    def _need(self, size: int) -> None:
        _check(self._at + size <= len(self._frame), "a frame that is cut short")


def _check(good: bool, what: str) -> None:
    if not good:
        raise FrameError(what)
