"""Tokens per second of every decode mode beside Hugging Face `generate` on the same weights.

Run: `python -m perf.bench_engine`.

Both sides run in this process on one torch thread, in float32, greedily, and take turns. Prompts are held-out tasks of
the bundled checkpoint. Seconds include prefill. Only tokens that a request asked for count.

Workloads: `equal` (every answer has the same length, eos ignored), `mixed` (lengths drawn log-uniformly; a batch of
Hugging Face's waits for its longest answer, the engine refills its rows) and `natural` (every answer ends at its eos).
"""

import argparse
import itertools
import json
import logging
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM

from engine.config import DiffusionParams, EngineConfig, ModelConfig, ModeName, SamplingParams
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.model import Model
from engine.output import HostOutput
from engine.request import DecodeStats, Request
from engine.runner import load_model
from engine.segment import Settle
from engine.step import COMMITS, SETTLE, Step
from engine.tiny.tasks import evaluation_tasks
from engine.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
HF = "hf generate"
DRAFT_BLOCK_LENGTHS = (8, 16, 32)
SHORTEST, LONGEST = 16, 256  # tokens, of mixed answers
GEOMETRY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)


@dataclass(frozen=True, slots=True)
class Job:
    """One request: `tokens` is the exact length of its answer, or with `natural` the most it may take."""

    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    batch: int
    jobs: list[Job]
    natural: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """One way of ours to decode. `block` 0 is the checkpoint's own block length, where the mode has one."""

    name: str
    mode: ModeName
    block: int = 0


@dataclass(slots=True)
class Sample:
    """One timed run of a workload. Seconds of wall time; `forward_seconds` of them in the model, its head included."""

    seconds: float
    answers: list[tuple[int, ...]]
    forward_seconds: float = 0.0
    stats: list[DecodeStats] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repeats of one side on one workload."""

    workload: str
    batch: int
    side: str
    tokens_per_second: float
    ratio_to_hf: float
    ratio_to_ar: float
    tokens_per_forward: float  # without prefill and the first token, which comes from it
    overhead_us_per_sequence: float  # engine time outside the model, per sequence and step
    overhead_percent: float  # of the engine's time
    equal_to_hf: int  # prompts with the same tokens as Hugging Face
    prompts: int


@dataclass(frozen=True, slots=True)
class SchedulerRow:
    """What the host's share of a step costs: scheduler, modes, packing and committing, without executing anything."""

    mode: ModeName
    sequences: int  # running
    waiting: int  # requests that the memory has no room for
    us_per_sequence: float  # microseconds per running sequence and step, mean of the steps


SIDES = (
    Side("ar", "ar"),
    Side("diffusion", "diffusion"),
    *(Side(f"linear_spec B={length}", "linear_spec", length) for length in DRAFT_BLOCK_LENGTHS),
    Side("quadratic_spec", "quadratic_spec"),
)


class HuggingFace:
    """transformers' Ministral3ForCausalLM, which computes what NLD's causal passes compute, with an NLD's weights."""

    def __init__(self, checkpoint: Path, geometry: ModelConfig) -> None:
        raw = json.loads((checkpoint / "config.json").read_text())
        config = Ministral3Config(**{key: raw[key] for key in GEOMETRY}, bos_token_id=None, eos_token_id=None)
        self.model = Ministral3ForCausalLM(config).train(False)
        tensors: dict[str, Tensor] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            tensors |= load_file(file)
        self.model.load_state_dict({hf_name(name): tensor for name, tensor in tensors.items()})
        self.eos_ids = list(geometry.eos_ids)

    def run(self, workload: Workload) -> Sample:
        start, answers = time.perf_counter(), []
        for first in range(0, len(workload.jobs), workload.batch):
            answers += self.generate(workload.jobs[first : first + workload.batch], workload.natural)
        return Sample(time.perf_counter() - start, answers)

    def generate(self, jobs: Sequence[Job], natural: bool) -> list[tuple[int, ...]]:
        """One padded batch: prompts on the right edge, as `generate` wants them; it runs until the last one is done."""
        width = max(len(job.prompt) for job in jobs)
        pad = self.eos_ids[0]
        ids = torch.tensor([(pad,) * (width - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(job.tokens for job in jobs),
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=self.eos_ids if natural else None,
            )
        answers = [tuple(row[: job.tokens]) for row, job in zip(out[:, width:].tolist(), jobs, strict=True)]
        return [until_eos(answer, self.eos_ids) for answer in answers] if natural else answers


class NoExecutor:
    """Executes nothing, and says at once that up to four tokens of each draft stand, and all of a canvas every second
    time: the least that a canvas takes is a pass and its commit."""

    has_adapter, device_name = True, "none"

    def __init__(self, geometry: ModelConfig, config: EngineConfig) -> None:
        self.model_config, self.config, self.phases = geometry, config, dict[str, float]()
        self.seconds, self.committing = 0.0, False

    def run(self, steps: Sequence[Step]) -> HostOutput:
        start, step = time.thread_time(), steps[-1]
        count = torch.from_numpy(step.segments[:, COMMITS])
        settle = torch.from_numpy(step.segments[:, SETTLE])
        count = torch.where(settle == Settle.VERIFY, count.clamp(max=4), count)
        self.committing = not self.committing
        if not self.committing:
            count = torch.where(settle == Settle.DENOISE, 0, count)
        tokens = torch.full((len(count), int(count.max())), self.model_config.bos_id)
        self.seconds += time.thread_time() - start
        return HostOutput(torch.cat((count[:, None], tokens), 1))

    def close(self) -> None:
        pass


def scheduler_cost(geometry: ModelConfig, sequences: int = 256, steps: int = 200) -> list[SchedulerRow]:
    """Times the engine without its model, in seconds of its thread, at a lag of one step, for each mode."""
    legal = [token for token in range(geometry.vocab_size) if token != geometry.mask_id]
    prompts = [tuple(random.Random(index).choices(legal, k=64)) for index in range(sequences)]
    kv_tokens = sequences * 32 * (steps + 20) * 2
    config = EngineConfig(
        page_size=64,
        kv_tokens=kv_tokens,
        max_running=sequences + 1,
        max_batch_tokens=sequences * 128,
        lag=1,
    )
    geometry = replace(geometry, max_position=kv_tokens)
    sampling = SamplingParams(max_tokens=32 * (steps + 20), ignore_eos=True)
    rows: list[SchedulerRow] = []
    for mode, waiting in itertools.product(get_args(ModeName), (0, 1)):
        executor = NoExecutor(geometry, config)
        engine = Engine(config, executor)
        for index, prompt in enumerate(prompts):
            engine.add(Request(f"{index}", prompt, sampling, mode))
        engine.step()
        if waiting:
            everything = (legal[0],) * (engine.max_model_len - 1)
            engine.add(Request("waits", everything, SamplingParams(max_tokens=1), mode))
        costs: list[float] = []
        for _ in range(steps):
            start, executor.seconds, before = time.thread_time(), 0.0, engine.steps
            engine.step()
            spent = time.thread_time() - start - executor.seconds
            costs.append(spent / (engine.steps - before))  # a draft and its verification are two steps
        assert (engine.status().running, engine.status().waiting) == (sequences, waiting)
        cost = 1e6 * statistics.fmean(costs[20:]) / sequences
        rows.append(SchedulerRow(mode, sequences, waiting, cost))
    return rows


def scheduler_table(rows: Sequence[SchedulerRow]) -> str:
    lines = [f"{'scheduler':<17}{'running':>8}{'waiting':>8}{'us/seq':>8}"]
    for row in rows:
        lines.append(f"{row.mode:<17}{row.sequences:>8}{row.waiting:>8}{row.us_per_sequence:>8.2f}")
    return "\n".join(lines)


def hf_name(name: str) -> str:
    return "lm_head.weight" if name == "diffusion_head.weight" else name.replace("encoder.", "model.", 1)


def until_eos(answer: tuple[int, ...], eos_ids: Sequence[int]) -> tuple[int, ...]:
    ends = [index for index, token in enumerate(answer) if token in eos_ids]
    return answer[: ends[0] + 1] if ends else answer


class Ours:
    """The engine with `batch` rows and one mode's block length."""

    def __init__(self, side: Side, batch: int, model: Model, config: EngineConfig) -> None:
        self.mode = side.mode
        # Hugging Face's side has no cache that outlives a run, and all runs have the same prompts
        config = replace(config, max_running=batch, block_length=side.block, prefix_cache=False)
        self.executor = LocalExecutor(model, config)
        self.engine = Engine(config, self.executor)

    def run(self, workload: Workload) -> Sample:
        requests = [
            Request(
                str(index),
                job.prompt,
                SamplingParams(temperature=0.0, max_tokens=job.tokens, ignore_eos=not workload.natural),
                self.mode,
                DiffusionParams(),
            )
            for index, job in enumerate(workload.jobs)
        ]
        tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        stats: list[DecodeStats] = []
        before = self.executor.runner.forward_seconds
        start = time.perf_counter()
        for request in requests:
            self.engine.add(request)
        while not self.engine.idle:
            for request_id, delta in self.engine.step().items():
                tokens[request_id] += delta.token_ids
                if delta.stats is not None:
                    stats.append(delta.stats)
        seconds = time.perf_counter() - start
        answers = [tuple(tokens[request.id]) for request in requests]
        return Sample(seconds, answers, self.executor.runner.forward_seconds - before, stats)


def workloads(prompts: Sequence[tuple[int, ...]], tokens: int) -> list[Workload]:
    draw = random.Random(0)
    mixed = [round(SHORTEST * (LONGEST / SHORTEST) ** draw.random()) for _ in prompts]
    equal = [Job(prompt, tokens) for prompt in prompts]
    return [
        Workload("equal", 1, equal[:8]),
        Workload("equal", 8, equal),
        Workload("mixed", 8, [Job(prompt, length) for prompt, length in zip(prompts, mixed, strict=True)]),
        Workload("natural", 1, [Job(prompt, LONGEST) for prompt in prompts[:8]], natural=True),
        Workload("natural", 8, [Job(prompt, LONGEST) for prompt in prompts], natural=True),
    ]


def measure(
    workload: Workload, runs: dict[str, Callable[[Workload], Sample]], repeats: int
) -> dict[str, list[Sample]]:
    """Every side in turn, `repeats` times, after one untimed run of each on the first jobs."""
    warm_up = Workload(workload.name, workload.batch, workload.jobs[: workload.batch], workload.natural)
    for run in runs.values():
        run(warm_up)
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            samples[name].append(run(workload))
            done = f"{workload.name} batch {workload.batch}, repeat {repeat + 1}/{repeats}: {name}"
            print(f"{done:<70} {samples[name][-1].seconds:8.2f} s", file=sys.stderr, flush=True)
    return samples


def summarise(workload: Workload, samples: dict[str, list[Sample]]) -> list[Row]:
    def speed(sample: Sample) -> float:
        return sample.tokens / sample.seconds

    def ratio(name: str, base: str) -> float:
        pairs = zip(samples[name], samples[base], strict=True)
        return statistics.median(speed(ours) / speed(theirs) for ours, theirs in pairs)

    reference = samples[HF][0].answers
    rows = []
    for name, runs in samples.items():
        forwards = sum(stats.forwards for stats in runs[0].stats)
        overhead = [run.seconds - run.forward_seconds for run in runs]
        rows.append(
            Row(
                workload.name,
                workload.batch,
                name,
                statistics.median(map(speed, runs)),
                ratio(name, HF),
                ratio(name, "ar"),
                sum(stats.tokens for stats in runs[0].stats) / forwards if forwards else 1.0,
                1e6 * statistics.median(overhead) / forwards if forwards else 0.0,
                100 * statistics.median(o / run.seconds for o, run in zip(overhead, runs, strict=True))
                if forwards
                else 0.0,
                sum(a == b for a, b in zip(runs[0].answers, reference, strict=True)),
                len(reference),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'workload':<9}{'batch':>5}  {'side':<17}{'tok/s':>8}{'x HF':>7}{'x AR':>7}{'TPF':>6}"
        f"{'us/seq':>8}{'% step':>8}  equal"
    ]
    for row in rows:
        engine = (
            f"{row.overhead_us_per_sequence:>8.0f}{row.overhead_percent:>8.1f}"
            if row.side != HF
            else " " * 16
        )
        lines.append(
            f"{row.workload:<9}{row.batch:>5}  {row.side:<17}{row.tokens_per_second:>8.0f}{row.ratio_to_hf:>7.2f}"
            f"{row.ratio_to_ar:>7.2f}{row.tokens_per_forward:>6.2f}{engine}  {row.equal_to_hf}/{row.prompts}"
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The README's table: a line per workload, a column per side."""
    sides = list(dict.fromkeys(row.side for row in rows))
    lines = ["| workload | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for name, batch in dict.fromkeys((row.workload, row.batch) for row in rows):
        cells = {row.side: row for row in rows if (row.workload, row.batch) == (name, batch)}
        shown = [
            f"{cells[side].tokens_per_second:.0f}"
            + (
                f" ({cells[side].ratio_to_hf:.2f} x, TPF {cells[side].tokens_per_forward:.2f})"
                if side != HF
                else ""
            )
            for side in sides
        ]
        lines.append(f"| {name}, batch {batch} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf.bench_engine", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "bench_engine.json", help="where the results go"
    )
    parser.add_argument("--checkpoint", default=EngineConfig().checkpoint, help="by default the bundled one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--prompts", type=int, default=32, help="held-out prompts; a batch of 1 takes the first 8"
    )
    parser.add_argument("--tokens", type=int, default=128, help="length of every answer in `equal`")
    parser.add_argument("--markdown", action="store_true", help="print the README's table too")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = EngineConfig(checkpoint=options.checkpoint, threads=1, max_batch_tokens=1024)
    checkpoint = Path(config.checkpoint)
    geometry = ModelConfig.from_json(checkpoint / "config.json")
    tokenizer = Tokenizer(checkpoint)
    prompts = [tuple(tokenizer.encode_chat(task.prompt)) for task in evaluation_tasks(options.prompts)]
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items()), file=sys.stderr)

    planning = scheduler_cost(geometry)
    print(scheduler_table(planning))
    model, hugging_face = load_model(config), HuggingFace(checkpoint, geometry)
    rows: list[Row] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    for workload in workloads(prompts, options.tokens):
        runs: dict[str, Callable[[Workload], Sample]] = {HF: hugging_face.run}
        runs |= {side.name: Ours(side, workload.batch, model, config).run for side in SIDES}
        samples = measure(workload, runs, options.repeats)
        rows += summarise(workload, samples)
        timed = {name: [round(s.seconds, 4) for s in of_side] for name, of_side in samples.items()}
        seconds[f"{workload.name} batch {workload.batch}"] = timed
    print(table(rows))
    if options.markdown:
        print(f"\n{markdown(rows)}")
    report = {"machine": here, "options": {k: vars(options)[k] for k in ("repeats", "prompts", "tokens")},
              "rows": [asdict(row) for row in rows], "scheduler": [asdict(row) for row in planning],
              "seconds": seconds}  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
