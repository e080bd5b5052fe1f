"""Whole forwards, rounds and the engine at full depth, on dummy weights.

Run: `python -m perf.bench_forward`.

F1: a forward, its head and what ends its segments, beside the floor: the bytes it must read at the bandwidth of a
plain sum, or its operations at the rate of a large matrix product, both measured in the same run. F2: a draft and its
verification, executed together, beside two forwards. E1: the engine's AR decoding beside Hugging Face's eager
`generate` on the same weights. E2: self-speculation with a forced number of tokens a round, beside AR. E3: how far
AR's logits are from verification's, with `exact` and without, and what `exact` costs. E4: a step of AR decoding beside
the forward in it. L1: a server's engine from its start, with all the memory that is left as its cache.

Without CUDA a small geometry runs in float32, which shows that the benchmark runs and nothing else.
"""

import argparse
import asyncio
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig, ModeName, SamplingParams
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.loop import EngineLoop
from engine.model import Model
from engine.output import HostOutput
from engine.request import Request
from engine.runner import Runner, load_model
from engine.segment import Pattern
from engine.step import BLOCK, COMMITS, PATTERN, ROW, Step
from perf.geometry import raw_config, write_config
from perf.steps import draft_step, occupy, rewind, verify_step
from perf.timing import machine, matmul_rate, read_bandwidth, seconds_of, write_report


@dataclass(frozen=True, slots=True)
class Scale:
    """What is measured: on a GPU the published 14B, on a CPU a toy."""

    size: str
    dtype: str
    page_size: int
    tokens: tuple[int, ...]  # of a forward
    contexts: tuple[int, ...]
    rounds: tuple[tuple[int, int], ...]  # sequences, block
    prompt: int
    answer: int
    forced: tuple[int, ...]  # tokens a round
    block: int
    checked: int  # positions whose logits are compared
    rows: int


SCALES = {
    "cuda": Scale("14b", "bfloat16", 64, (1, 8, 32, 128, 512), (1024, 8192, 32768), ((1, 32), (8, 16), (64, 8)),
                  512, 256, (1, 4, 8, 12), 32, 256, 64),
    "cpu": Scale("toy", "float32", 16, (1, 8, 32), (32, 64), ((1, 8), (2, 4)), 24, 16, (1, 4), 8, 16, 4),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside what it is compared with."""

    suite: str
    shape: str
    value: float
    unit: str
    against: str
    other: float
    ratio: float  # the better, the higher
    bar: str = ""


class Bench:
    """The model, loaded once, and what it is measured with."""

    def __init__(self, scale: Scale, device: torch.device, repeats: int) -> None:
        self.scale, self.device, self.repeats = scale, device, repeats
        dtype: torch.dtype = getattr(torch, scale.dtype)
        self.bandwidth, self.rate = read_bandwidth(device), matmul_rate(device, dtype)
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), scale.size)
            self.config = EngineConfig(
                checkpoint=folder,
                load_format="dummy",
                device=device.type,
                dtype=scale.dtype,  # type: ignore[arg-type]
                page_size=scale.page_size,
                kv_tokens=max(rows for rows, _ in scale.rounds) * (min(scale.contexts) + 192) + 2**15,
                max_running=scale.rows,
                max_batch_tokens=512,
                max_model_len=max(*scale.contexts, scale.prompt + scale.answer) + 1024,
                lag=1 if device.type == "cuda" else 0,
            )
            self.model = load_model(self.config)
        self.roomy = replace(self.config, kv_tokens=self._kv_tokens())

    def _kv_tokens(self) -> int:
        """As many as the longest contexts need, and fit."""
        scale, shape = self.scale, self.model.config
        most = max(max(1, t // 32) * (c + 128) for t in scale.tokens for c in scale.contexts)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            a_token = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * self.model.dtype.itemsize
            most = min(most, int(0.8 * free) // a_token)
        return most // scale.page_size * scale.page_size

    def runner(self, exact: bool = False, roomy: bool = False) -> Runner:
        """A new one, once what others held is given back: a runner and its graphs hold one another."""
        tidy()
        return Runner(with_exact(self.model, exact), self.roomy if roomy else self.config)

    def forward(self, runner: Runner, rows: int, block: int, context: int) -> float:
        """Seconds of a verification of `rows` blocks behind a context each, graph included. Raises ValueError where the
        contexts do not fit."""
        occupy(runner, rows, context, block + 1)
        step = verify_step(rows, block)

        def run() -> None:
            rewind(runner, rows, context)
            runner.run([step])

        return seconds_of(run, self.device, self.repeats, eager=True, ahead=True)

    def floor(self, rows: int, block: int, context: int) -> float:
        """The least seconds that a forward of rows x block query tokens can take."""
        shape, model = self.model.config, self.model
        tokens = rows * block
        weights = [model.output]
        weights += [
            w.values for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)
        ]
        attended = rows * context * shape.num_layers
        read = sum(w.numel() * w.element_size() for w in weights)
        read += attended * 2 * shape.num_kv_heads * shape.head_dim * model.dtype.itemsize
        operations = 2 * tokens * sum(w.numel() for w in weights)
        operations += 4 * attended * block * shape.num_heads * shape.head_dim
        return max(read / self.bandwidth, operations / self.rate)


def tidy() -> None:
    """Gives back the memory of runners that nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_exact(model: Model, exact: bool) -> Model:
    """The same weights, exact or not."""
    other = Model.__new__(Model)
    vars(other).update(vars(model))
    other.exact = exact
    return other


def f1(bench: Bench) -> Iterator[Row]:
    runner = bench.runner(roomy=True)
    for tokens in bench.scale.tokens:
        rows, block = max(1, tokens // 32), min(tokens, 32)
        for context in bench.scale.contexts:
            try:
                seconds = bench.forward(runner, rows, block, context)
            except ValueError as error:
                print(f"F1 T={tokens} ctx {context} is skipped: {error}", file=sys.stderr)
                continue
            floor = bench.floor(rows, block, context)
            bar = "0.80" if tokens <= 32 else "0.70" if tokens == 512 else ""
            shape = f"T={tokens} ({rows} x {block}) ctx {context}"
            yield Row("F1", shape, 1e3 * seconds, "ms", "floor", 1e3 * floor, floor / seconds, bar)


def f2(bench: Bench) -> Iterator[Row]:
    runner, context = bench.runner(), min(bench.scale.contexts)
    for rows, block in bench.scale.rounds:
        forward = bench.forward(runner, rows, block, context)
        steps = [draft_step(rows, block, lora=True), verify_step(rows, block)]

        def run(rows: int = rows, steps: list[Step] = steps) -> None:
            rewind(runner, rows, context)
            runner.run(steps)

        both = seconds_of(run, bench.device, bench.repeats, eager=True, ahead=True)
        shape = f"C={rows} B={block} ctx {context}"
        yield Row("F2", shape, 1e3 * both, "ms", "two forwards", 2e3 * forward, 2 * forward / both, "0.95")


def e1(bench: Bench) -> Iterator[Row]:
    from perf.hugging_face import hugging_face  # transformers may be missing

    prompt, answer = a_prompt(bench), bench.scale.answer
    engine = Engine(bench.config, LocalExecutor(bench.model, bench.config))
    generate = hugging_face(bench.model, raw_config(bench.scale.size))
    ours, theirs = [], []
    for _ in range(3):  # the first warms up
        mine, seconds = answered(engine, prompt, answer, "ar")
        ours.append(answer / seconds)
        start = time.perf_counter()
        other = generate(prompt, answer)
        theirs.append(answer / (time.perf_counter() - start))
    alike = sum(a == b for a, b in zip(mine, other, strict=True))
    shape = f"AR, {len(prompt)} in, {answer} out, {alike} tokens alike"
    best, reference = max(ours[1:]), max(theirs[1:])
    yield Row("E1", shape, best, "tok/s", "hf generate, eager", reference, best / reference, "3")


def e2(bench: Bench) -> Iterator[Row]:
    """In exact mode, so that what AR says is what verification says. An answer's first token comes from prefill."""
    prompt, answer, block = a_prompt(bench), bench.scale.answer, bench.scale.block
    model, config = with_exact(bench.model, True), replace(bench.config, block_length=block, exact=True)
    plain = Engine(config, LocalExecutor(model, config))
    answered(plain, prompt, answer, "ar")
    truth, alone = answered(plain, prompt, answer, "ar")
    del plain
    tidy()
    for tokens in bench.scale.forced:
        executor = ForcedExecutor(model, config, tokens)
        executor.truth = torch.tensor((*prompt, *truth, *([0] * block)), device=bench.device)
        engine = Engine(config, executor)
        answered(engine, prompt, answer, "linear_spec")
        executor.rounds = 0
        said, seconds = answered(engine, prompt, answer, "linear_spec")
        agrees = sum(a == b for a, b in zip(said, truth, strict=True))
        shape = f"B={block}, {tokens} tokens a round asked, {(answer - 1) / max(1, executor.rounds):.1f} had"
        if agrees < answer:
            shape += f", {answer - agrees} tokens unlike AR's"
        yield Row("E2", shape, answer / seconds, "tok/s", "ar", answer / alone, alone / seconds)
        del engine, executor
        tidy()


def e3(bench: Bench) -> Iterator[Row]:
    context, count = min(bench.scale.contexts), bench.scale.checked
    forwards = {}
    for exact in (True, False):
        tidy()
        model = Listening(with_exact(bench.model, exact))
        runner = Runner(model, bench.config)
        runner.graphs = None
        occupy(runner, 1, context, count + 1)
        for _ in range(count):
            runner.run([verify_step(1, 1)])
        alone = torch.cat(model.heard)
        worst, flips, equal = 0.0, 0, 0
        for first in range(0, count, bench.scale.block):
            block = min(bench.scale.block, count - first)
            rewind(runner, 1, context + first)
            model.heard.clear()
            line = runner.tables.tokens[0].clone()
            runner.run([verify_step(1, block)])
            runner.tables.tokens[0] = line
            together, before = model.heard[0], alone[first : first + block]
            worst = max(worst, float((together - before).abs().max()))
            flips += int((together.argmax(-1) != before.argmax(-1)).sum())
            equal += int((together == before).all(-1).sum())
        name = "exact" if exact else "not exact"
        shape = f"{name}: largest difference {worst:.3g}, argmax differs at {flips} of {count}"
        yield Row(
            "E3", shape, equal, "rows bitwise equal", "rows", count, equal / count, "1" if exact else ""
        )
        del runner
        forwards[exact] = bench.forward(bench.runner(exact), 1, bench.scale.block, context)
    shape = f"a forward of {bench.scale.block} tokens, exact"
    yield Row(
        "E3",
        shape,
        1e3 * forwards[True],
        "ms",
        "not exact",
        1e3 * forwards[False],
        forwards[False] / forwards[True],
    )


def e4(bench: Bench) -> Iterator[Row]:
    """Every sequence decodes while steps are timed; what their forward does not take is the host, where nothing hides
    it."""
    prompt, answer = a_prompt(bench), bench.scale.answer
    context = len(prompt) + answer // 2
    for rows in sorted({1, 8, bench.scale.rows}):
        if rows > bench.scale.rows:
            continue
        forward = bench.forward(bench.runner(), rows, 1, context)
        tidy()
        engine = Engine(bench.config, LocalExecutor(bench.model, bench.config))
        sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
        for row in range(rows):
            engine.add(Request(str(row), prompt[row:] + prompt[:row], sampling, "ar"))
        silent = {str(row) for row in range(rows)}
        while silent:
            silent -= engine.step().keys()
        for _ in range(2):
            engine.step()  # the first of all rows, which may have to be captured
        count = answer // 4
        start = time.perf_counter()
        for _ in range(count):
            engine.step()
        step = (time.perf_counter() - start) / count
        shape = f"AR step, C={rows} ctx about {context}"
        yield Row("E4", shape, 1e3 * step, "ms", "its forward", 1e3 * forward, forward / step, "0.90")
        del engine


def l1(bench: Bench) -> Iterator[Row]:
    """Checks its kernels, captures its graphs, measures its steps and answers; the weights are there already."""
    tidy()
    cuda = bench.device.type == "cuda"
    config = replace(bench.config, kv_tokens=0) if cuda else bench.config
    with patch("engine.executor.load_model", return_value=bench.model):
        loop = EngineLoop(config)
    try:
        said = asyncio.run(_streamed(loop, bench))
        assert said == [bench.scale.answer] * bench.scale.rows, f"answers have {said} tokens"
        total = sum(loop.phases.values())
        for phase, seconds in loop.phases.items():
            yield Row("L1", f"start: {phase}", seconds, "s", "whole start", total, seconds / total)
        free, all_of_it = torch.cuda.mem_get_info(bench.device) if cuda else (0, 1)
        cached = loop.engine.config.kv_tokens
        shape = f"the cache, and what is free beside it after {len(said)} answers"
        yield Row("L1", shape, cached, "tokens", "GiB", free / 2**30, free / all_of_it)
    finally:
        loop.close()


async def _streamed(loop: EngineLoop, bench: Bench) -> list[int]:
    """The lengths of as many answers as run at a time."""
    prompt, sampling = a_prompt(bench), SamplingParams(max_tokens=bench.scale.answer, ignore_eos=True)

    async def one(row: int) -> int:
        request = Request(str(row), prompt[row:] + prompt[:row], replace(sampling, seed=row))
        return sum([len(delta.token_ids) async for delta in loop.stream(request)])

    return list(await asyncio.gather(*(one(row) for row in range(bench.scale.rows))))


class Listening(Model):
    """A model that keeps the logits of its steps."""

    def __init__(self, model: Model) -> None:
        vars(self).update(vars(model))
        self.heard: list[Tensor] = []

    def head(self, hidden: Tensor) -> Tensor:
        logits = super().head(hidden)
        self.heard.append(logits.clone())
        return logits


class ForcedExecutor(LocalExecutor):
    """Replaces every linear draft so that exactly `tokens` tokens a round stand, if AR says `truth`, by position."""

    truth: Tensor

    def __init__(self, model: Model, config: EngineConfig, tokens: int) -> None:
        super().__init__(model, config)
        self.tokens, self.rounds = tokens, 0

    def run(self, steps: Sequence[Step]) -> HostOutput:
        for step in steps:
            output = self.runner.run([step])
            segments = step.segments
            for segment in segments[(segments[:, PATTERN] == Pattern.CANVAS) & (segments[:, COMMITS] == 0)]:
                self._force(int(segment[ROW]), int(segment[BLOCK]))
                self.rounds += 1
        return output

    @torch.inference_mode()
    def _force(self, row: int, block: int) -> None:
        tables = self.runner.tables
        column = torch.arange(1, block, device=tables.device)
        position = tables.cached[row] + column
        true = self.truth[position.clamp(max=len(self.truth) - 1)]
        wrong = torch.where(true == 0, 1, 0)  # neither is the mask
        tables.tokens[row, position] = torch.where(column < self.tokens, true, wrong)


def a_prompt(bench: Bench) -> tuple[int, ...]:
    shape: ModelConfig = bench.model.config
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(shape.mask_id + 1, shape.vocab_size, (bench.scale.prompt,), generator=draw)
    return tuple(drawn.tolist())


def answered(engine: Engine, prompt: tuple[int, ...], tokens: int, mode: ModeName) -> tuple[list[int], float]:
    """A greedy answer and the seconds it took."""
    said: list[int] = []
    start = time.perf_counter()
    engine.add(
        Request("one", prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True), mode)
    )
    while not engine.idle:
        for delta in engine.step().values():
            said += delta.token_ids
    return said, time.perf_counter() - start


SUITES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "F1": f1, "F2": f2, "E1": e1, "E2": e2, "E3": e3, "E4": e4, "L1": l1,
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':<4}{'':<62}{'ours':>9}  {'unit':<19}{'against':<20}{'it':>9}{'ratio':>7}  bar"]
    for row in rows:
        lines.append(
            f"{row.suite:<4}{row.shape:<62}{row.value:>9.2f}  {row.unit:<19}{row.against:<20}{row.other:>9.2f}"
            f"{row.ratio:>7.2f}  {row.bar}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.bench_forward", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="where the results go; by default nowhere")
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="SUITE")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("no CUDA: a toy in float32 on the torch references; the bars do not apply", file=sys.stderr)
        torch.set_num_threads(1)
    bench = Bench(SCALES[device.type], device, options.repeats)
    about = machine() | {
        "size": bench.scale.size,
        "read_bandwidth": bench.bandwidth,
        "matmul_rate": bench.rate,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)
    rows: list[Row] = []
    problems: list[str] = []
    for suite in options.only:
        try:
            for row in SUITES[suite](bench):
                rows.append(row)
                print(table([row]).partition("\n")[2], file=sys.stderr, flush=True)
        except (RuntimeError, AssertionError, ImportError, ValueError) as error:
            problems.append(f"{suite}: {type(error).__name__}: {error}")
            print(problems[-1], file=sys.stderr)
        tidy()
        report = {"machine": about, "rows": [asdict(row) for row in rows], "problems": problems}
        write_report(options.json, report)
    print(table(rows))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
