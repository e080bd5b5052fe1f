"""What drafting with FP8 weights costs in accepted tokens, on held-out tasks of the bundled checkpoint.

Run: `python -m perf.bench_fp8`.

A second executor, with every linear quantised and dequantised (its arithmetic stays in float32, so only the weights'
rounding is seen), runs every step beside the plain one on its own KV memory, as a draft-only runner would, and its
drafts replace the plain one's. Texts must be equal, since verification stays with the plain weights.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.checkpoint import local_folder
from engine.config import EngineConfig, ModelConfig, SamplingParams, Sizes
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.fp8 import dequantise
from engine.model import Model
from engine.output import HostOutput
from engine.request import DecodeStats, Request
from engine.segment import Pattern
from engine.step import PATTERN, ROW, Step
from engine.tiny.tasks import evaluation_tasks
from engine.tokenizer import Tokenizer
from engine.weights import load_weights
from perf.bench_engine import RESULTS, machine

LONGEST = 256  # tokens of an answer


class DraftedElsewhere(LocalExecutor):
    """Takes every draft from another model, which follows along on KV memory of its own."""

    def __init__(self, model: Model, drafter: Model, config: EngineConfig) -> None:
        super().__init__(model, config)
        self.drafter = LocalExecutor(drafter, config).runner

    def run(self, steps: Sequence[Step]) -> HostOutput:
        return [self._run(step) for step in steps][-1]

    def _run(self, step: Step) -> HostOutput:
        output = super().run([step])
        self.drafter.run([step])
        ours, theirs = self.runner.tables, self.drafter.tables
        drafts = step.segments[:, PATTERN] == Pattern.CANVAS
        for row in step.segments[drafts, ROW].tolist():
            ours.tokens[row] = theirs.tokens[row]
        for row in step.segments[~drafts, ROW].tolist():
            theirs.tokens[row], theirs.cached[row] = ours.tokens[row], ours.cached[row]
        return output


@dataclass(frozen=True, slots=True)
class Row:
    """Totals over all prompts of one block length, of drafts by the same weights and by the quantised ones."""

    block_length: int
    prompts: int
    tokens_per_forward: float
    tokens_per_forward_fp8: float
    ratio: float
    accepted: float  # share of the drafted tokens
    accepted_fp8: float
    slower: int  # prompts that took more forwards with the quantised weights
    faster: int


def weights_in_fp8(folder: Path, geometry: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The checkpoint's weights with every linear quantised and dequantised."""
    weights = load_weights(folder, geometry, dtype, torch.device("cpu"), fp8=True)
    for name in [name for name in weights if name.endswith(".scale")]:
        layer = f"{name.removesuffix('.scale')}.weight"
        weights[layer] = dequantise(weights[layer], weights.pop(name), dtype)
    return weights


def answers(
    executor: LocalExecutor, config: EngineConfig, prompts: Sequence[tuple[int, ...]]
) -> tuple[list[list[int]], list[DecodeStats]]:
    """Greedy answers by linear self-speculation, up to their eos."""
    engine = Engine(config, executor)
    sampling = SamplingParams(temperature=0.0, max_tokens=LONGEST)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    stats: dict[str, DecodeStats] = {}
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, sampling, "linear_spec"))
    while not engine.idle:
        for request_id, delta in engine.step().items():
            tokens[request_id] += delta.token_ids
            if delta.stats is not None:
                stats[request_id] = delta.stats
    return list(tokens.values()), [stats[request_id] for request_id in tokens]


def measure(config: EngineConfig, block_length: int, count: int) -> Row:
    """Raises AssertionError if the drafter's weights change a text."""
    folder = local_folder(config.checkpoint)
    geometry = ModelConfig.from_json(folder / "config.json")
    config = EngineConfig(config.checkpoint, block_length=block_length, max_batch_tokens=1024)
    sizes, dtype = Sizes.of(config, geometry), torch.float32
    positions = sizes.max_model_len + sizes.slack
    plain = Model(geometry, load_weights(folder, geometry, dtype, torch.device("cpu")), positions)
    rounded = Model(geometry, weights_in_fp8(folder, geometry, dtype), positions)
    tokenizer = Tokenizer(folder)
    prompts = [tuple(tokenizer.encode_chat(task.prompt)) for task in evaluation_tasks(count)]
    texts, own = answers(LocalExecutor(plain, config), config, prompts)
    texts_fp8, fp8 = answers(DraftedElsewhere(plain, rounded, config), config, prompts)
    assert texts == texts_fp8, "drafts have changed a text"
    per_forward, per_forward_fp8 = (
        sum(s.tokens for s in of) / sum(s.forwards for s in of) for of in (own, fp8)
    )
    accepted, accepted_fp8 = (sum(s.accepted for s in of) / sum(s.drafted for s in of) for of in (own, fp8))
    pairs = [(a.forwards, b.forwards) for a, b in zip(own, fp8, strict=True)]
    slower, faster = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    ratio = per_forward_fp8 / per_forward
    return Row(
        block_length, count, per_forward, per_forward_fp8, ratio, accepted, accepted_fp8, slower, faster
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'block':>5}{'prompts':>9}{'TPF':>7}{'TPF fp8':>9}{'ratio':>8}{'accepted':>10}{'fp8':>8}"
        f"{'slower':>8}{'faster':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row.block_length:>5}{row.prompts:>9}{row.tokens_per_forward:>7.2f}{row.tokens_per_forward_fp8:>9.2f}"
            f"{row.ratio:>8.3f}{row.accepted:>10.3f}{row.accepted_fp8:>8.3f}{row.slower:>8}{row.faster:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.bench_fp8", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_fp8.json", help="where the results go")
    parser.add_argument("--checkpoint", default=EngineConfig().checkpoint, help="by default the bundled one")
    parser.add_argument("--prompts", type=int, default=220, help="held-out prompts")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32], help="block lengths")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for block_length in options.blocks:
        rows.append(measure(EngineConfig(options.checkpoint), block_length, options.prompts))
        print(f"block length {block_length} is done", file=sys.stderr, flush=True)
    print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"machine": machine(), "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
