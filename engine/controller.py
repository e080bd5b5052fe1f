"""Decides, before each step, how every sequence is decoded and how many tokens prefill may take.

The rule so far: what a request asks for, it gets. `auto` drafts with the longest block that keeps the step's query
tokens under the ridge, where more tokens cost hardly more time, and decodes AR beyond it; it is lossless either way.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.config import BLOCK_LENGTHS, EngineConfig, ModeName
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Decision:
    """Mode and block length of each running sequence, in order, and the query tokens kept for prefill."""

    modes: list[tuple[ModeName, int]]
    prefill_tokens: int


def decide(running: Seq[Sequence], prefill_waits: bool, config: EngineConfig, block_length: int) -> Decision:
    """Decides for the sequences that decode now. block_length: the engine's default, in tokens."""
    auto = auto_mode(len(running), config.ridge_tokens, block_length)
    modes = [auto if sequence.choice == "auto" else (sequence.choice, block_length) for sequence in running]
    return Decision(modes, config.max_batch_tokens // 4 if prefill_waits else 0)


def auto_mode(running: int, ridge_tokens: int, block_length: int) -> tuple[ModeName, int]:
    """Linear self-speculation with the longest block under the ridge, or AR where not even the shortest fits."""
    for block in sorted(BLOCK_LENGTHS, reverse=True):
        if block <= block_length and block * running <= ridge_tokens:
            return "linear_spec", block
    return "ar", 1
