"""Measure the tiny checkpoint on held-out prompts, through the engine: `python -m engine.tiny.evaluate`.

Prints a table and writes evaluation.json beside the weights.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.config import DiffusionParams, EngineConfig, ModeName, SamplingParams
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.request import Request
from engine.runner import load_model
from engine.tiny import checkpoint
from engine.tiny.rows import encode
from engine.tiny.tasks import FAMILIES, Task, evaluation_tasks
from engine.tiny.vocabulary import EOS

LIMIT = 256
THRESHOLD = 0.9


@dataclass(frozen=True)
class Mode:
    """A row of the table."""

    label: str
    name: ModeName
    block_length: int = 0
    draft_lora: bool = False


MODES = (
    Mode("ar", "ar"),
    Mode("linear 8", "linear_spec", 8),
    Mode("linear 16", "linear_spec", 16),
    Mode("linear 32", "linear_spec", 32),
    Mode("linear 8 + lora", "linear_spec", 8, draft_lora=True),
    Mode("linear 16 + lora", "linear_spec", 16, draft_lora=True),
    Mode("linear 32 + lora", "linear_spec", 32, draft_lora=True),
    Mode("quadratic 8", "quadratic_spec"),
    Mode("diffusion 8", "diffusion", 8),
    Mode("diffusion 16", "diffusion", 16),
    Mode("diffusion 32", "diffusion", 32),
)


@dataclass(frozen=True)
class Generation:
    """New tokens (the end token excluded) and the forwards after the prompt's that made them."""

    tokens: list[int]
    forwards: int


@dataclass(frozen=True)
class Score:
    exact: float
    tokens_per_forward: float


def generate(folder: Path, prompts: list[list[int]], mode: Mode) -> list[Generation]:
    """Greedy answers in fp32."""
    config = EngineConfig(
        checkpoint=str(folder),
        block_length=mode.block_length,
        draft_lora=mode.draft_lora,
        default_mode=mode.name,
    )
    engine = Engine(config, LocalExecutor(load_model(config), config))
    sampling = SamplingParams(temperature=0.0, max_tokens=LIMIT)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), sampling, mode.name, DiffusionParams(threshold=THRESHOLD)))
    tokens: dict[str, list[int]] = defaultdict(list)
    forwards: dict[str, int] = {}
    while not engine.idle:
        for name, delta in engine.step().items():
            tokens[name] += delta.token_ids
            if delta.stats is not None:
                forwards[name] = delta.stats.forwards
    return [
        Generation([token for token in tokens[str(i)] if token != EOS], forwards[str(i)])
        for i in range(len(prompts))
    ]


def score(results: list[tuple[Task, str, Generation]]) -> Score:
    """Of the tokens, the first one comes from the prompt's forward, but the end token counts too."""
    exact = sum(text == task.answer for task, text, _ in results) / len(results)
    tokens = sum(len(made.tokens) for _, _, made in results)
    return Score(exact, tokens / sum(made.forwards for _, _, made in results))


def evaluate(folder: Path, tokenizer: Tokenizer, tasks: list[Task], mode: Mode) -> dict[str, Score]:
    """Scores per family and over all."""
    rows = [encode(tokenizer, task.messages) for task in tasks]
    made = generate(folder, [row.tokens[: row.answers[-1][0]] for row in rows], mode)
    families: dict[str, list[tuple[Task, str, Generation]]] = defaultdict(list)
    for task, generation in zip(tasks, made, strict=True):
        text = tokenizer.decode(generation.tokens, skip_special_tokens=False)
        for family in (task.family, "all"):
            families[family].append((task, text, generation))
    return {family: score(results) for family, results in families.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=440)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint.FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    tasks = evaluation_tasks(options.prompts)
    columns = [*FAMILIES, "all"]
    print(
        f"exact % / tokens per forward; {len(tasks)} held-out prompts, greedy, diffusion threshold {THRESHOLD}"
    )
    print("mode".ljust(18) + "".join(column.rjust(14) for column in columns) + "seconds".rjust(9), flush=True)
    report = {}
    for mode in MODES:
        start = time.monotonic()
        scores = evaluate(options.checkpoint, tokenizer, tasks, mode)
        cells = (
            f"{100 * scores[c].exact:.0f} / {scores[c].tokens_per_forward:.2f}".rjust(14) for c in columns
        )
        spent = f"{time.monotonic() - start:.0f}".rjust(9)
        print(mode.label.ljust(18) + "".join(cells) + spent, flush=True)
        report[mode.label] = {family: asdict(result) for family, result in scores.items()}
    figures = {"prompts": len(tasks), "max_tokens": LIMIT, "threshold": THRESHOLD, "modes": report}
    checkpoint.write_json(options.checkpoint / "evaluation.json", figures)


if __name__ == "__main__":
    main()
