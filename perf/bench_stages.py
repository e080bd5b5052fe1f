"""What draft and verify stages cost and bring: the exchange alone, and tokens per second beside colocated engines.

Run: `python -m perf.bench_stages`.

Every engine and drafter is a process of its own with one torch thread, on the bundled checkpoint. The exchange is timed
against a drafter that computes nothing: from an ask to its answer, with both processes, frames and encryption.
Throughput compares equal numbers of processes and of sequences at a time: two colocated engines with half of the
prompts each, and a verifier with all of them beside a drafter. Both answer greedily, and the texts must be equal.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cluster.draft_server import DraftServer, Endpoint
from cluster.remote_drafts import RemoteDrafts
from engine.asking import Asking
from engine.checkpoint import local_folder
from engine.config import EngineConfig, ModeName, SamplingParams
from engine.drafter import Drafter, load_drafter
from engine.drafts import Answer, Ask, Verdict, Wanted
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.request import DecodeStats, Request
from engine.runner import load_model
from engine.tiny.tasks import evaluation_tasks
from engine.tokenizer import Tokenizer
from perf.bench_engine import RESULTS, machine

MODES: tuple[ModeName, ...] = ("linear_spec", "diffusion")
BLOCK = 32
WARM_UP = 50  # rounds
Prompt = tuple[int, ...]
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class ExchangeRow:
    """Microseconds from ask to answer, of frames that hold asks for so many sequences."""

    sequences: int
    rounds: int
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class ThroughputRow:
    """Medians over the repeats, of as many processes on either side."""

    mode: str
    prompts: int
    running: int  # sequences at a time, of both engines together
    tokens: int
    colocated: float  # tokens per second
    staged: float
    ratio: float  # staged to colocated
    drafted_elsewhere: int  # rounds of the staged side
    drafts_missed: int


class InstantDrafter(Drafter):
    """Answers every ask at once, with the same tokens."""

    def add(self, peer: bytes, ask: Ask) -> None:
        tokens = (1,) * (ask.wanted.block - 1)
        self._answers.append((peer, Answer(ask.key, ask.number, Verdict.DRAWN, tokens)))


def serve_drafts(config: EngineConfig, instant: bool, pipe: "Connection[Endpoint, str]") -> None:
    """A process that draws drafts until it is told to stop."""
    drafter = load_drafter(config, LocalExecutor.load)
    if instant:
        drafter = InstantDrafter(config, drafter.executor)
    server = DraftServer(drafter, "127.0.0.1")
    pipe.send(server.endpoint)
    pipe.recv()
    server.close()


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine's process says of one run: when its first step began and its last ended (time.monotonic, the same
    clock in all processes), the answers in order, rounds drafted elsewhere and asks missed."""

    began: float
    ended: float
    answers: list[Prompt]
    drafted_elsewhere: int
    missed: int


def serve_engine(
    config: EngineConfig,
    endpoint: Endpoint | None,
    pipe: "Connection[Told | None, tuple[ModeName, list[Prompt], int] | None]",
) -> None:
    """A process that answers prompts: (mode, prompts, most tokens), until it is told None."""
    torch.set_num_threads(1)
    source = None if endpoint is None else RemoteDrafts()
    asking = None if source is None else Asking(source, patience=1.0)
    engine = Engine(config, LocalExecutor(load_model(config), config), asking)
    if source is not None and endpoint is not None:
        source.use([endpoint])
    pipe.send(None)
    while (work := pipe.recv()) is not None:
        pipe.send(_answered(engine, *work))


def _answered(engine: Engine, mode: ModeName, prompts: list[Prompt], most: int) -> Told:
    sampling = SamplingParams(temperature=0, max_tokens=most)
    answers: dict[str, list[int]] = {}
    stats: list[DecodeStats] = []
    missed = engine.status().drafts_missed
    began = time.monotonic()
    for index, prompt in enumerate(prompts):
        answers[f"{index}"] = []
        engine.add(Request(f"{index}", prompt, sampling, mode))
    while not engine.idle:
        for name, delta in engine.step().items():
            answers[name] += delta.token_ids
            stats += [delta.stats] if delta.stats else []
    elsewhere = sum(each.drafted_elsewhere for each in stats)
    return Told(
        began,
        time.monotonic(),
        [tuple(answer) for answer in answers.values()],
        elsewhere,
        engine.status().drafts_missed - missed,
    )


class Process:
    """One of the processes that take part."""

    def __init__(self, target: object, *arguments: object) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=target, args=(*arguments, theirs), daemon=True)  # type: ignore[arg-type]
        self.process.start()

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join(10)


def time_exchange(config: EngineConfig, sequences: int, rounds: int) -> ExchangeRow:
    """Asks about as many sequences in every frame, each with as many new tokens as a good round brings."""
    process = Process(serve_drafts, config, True)
    source = RemoteDrafts()
    source.use([process.pipe.recv()])
    new = tuple(range(100, 108))
    while not all(answer.verdict is Verdict.DRAWN for answer in exchanged(source, 0, new, sequences)):
        time.sleep(0.1)  # not connected yet
    seconds: list[float] = []
    for number in range(1, rounds + WARM_UP):
        start = time.perf_counter()
        answers = exchanged(source, number, new, sequences)
        seconds.append(time.perf_counter() - start)
        assert all(answer.verdict is Verdict.DRAWN for answer in answers)
    source.close()
    process.stop()
    kept = sorted(seconds[WARM_UP - 1 :])
    return ExchangeRow(sequences, rounds, 1e6 * statistics.median(kept), 1e6 * kept[int(0.99 * len(kept))])


def exchanged(source: RemoteDrafts, number: int, new: Prompt, sequences: int) -> list[Answer]:
    """The answers to one frame of asks, each `new` tokens after the one before."""
    position, sampling = len(new) * (number + 1), SamplingParams(temperature=0)
    asks = [Ask(key, number, position, new, Wanted(BLOCK), sampling) for key in range(sequences)]
    source.send(asks, ())
    answers: list[Answer] = []
    while len(answers) < sequences:
        source.wait(0.1)
        answers += source.poll()
    return answers


def run(
    engines: Sequence[Process], mode: ModeName, prompts: list[Prompt], most: int
) -> tuple[float, list[Told]]:
    """Seconds from the first engine's first step to the last one's last, and what each said. Prompts are dealt out."""
    for index, engine in enumerate(engines):
        engine.pipe.send((mode, prompts[index :: len(engines)], most))
    told: list[Told] = [engine.pipe.recv() for engine in engines]
    return max(t.ended for t in told) - min(t.began for t in told), told


def dealt(told: Sequence[Told]) -> list[Prompt]:
    """The answers in the order of the prompts."""
    count = sum(len(t.answers) for t in told)
    return [told[index % len(told)].answers[index // len(told)] for index in range(count)]


def time_throughput(
    config: EngineConfig, prompts: list[Prompt], most: int, repeats: int
) -> list[ThroughputRow]:
    """Both sides stand ready, take turns, and rest while the other runs. Raises AssertionError for unequal texts."""
    double = replace(config, max_running=2 * config.max_running, max_batch_tokens=2 * config.max_batch_tokens)
    drafter = Process(serve_drafts, double, False)
    colocated = [Process(serve_engine, config, None) for _ in range(2)]
    staged = [Process(serve_engine, double, drafter.pipe.recv())]
    for process in (*colocated, *staged):
        process.pipe.recv()
    rows = []
    for mode in MODES:
        for side in (colocated, staged):
            run(side, mode, prompts[:4], most)  # warms up
        seconds: dict[str, list[float]] = {"colocated": [], "staged": []}
        for repeat in range(repeats):
            together, plain = run(colocated, mode, prompts, most)
            apart, drafted = run(staged, mode, prompts, most)
            assert dealt(plain) == dealt(drafted), "the stages have changed a text"
            seconds["colocated"].append(together)
            seconds["staged"].append(apart)
            print(
                f"{mode}, repeat {repeat + 1}: {together:.2f} s, staged {apart:.2f} s",
                file=sys.stderr,
                flush=True,
            )
        tokens = sum(map(len, dealt(plain)))
        per_second = {side: tokens / statistics.median(all_) for side, all_ in seconds.items()}
        ratio = per_second["staged"] / per_second["colocated"]
        rows.append(
            ThroughputRow(
                mode,
                len(prompts),
                min(len(prompts), double.max_running),
                tokens,
                per_second["colocated"],
                per_second["staged"],
                ratio,
                drafted[0].drafted_elsewhere,
                drafted[0].missed,
            )
        )
    for process in (drafter, *colocated, *staged):
        process.stop()
    return rows


def table(exchange: Sequence[ExchangeRow], throughput: Sequence[ThroughputRow]) -> str:
    lines = [f"{'sequences':>9}{'rounds':>8}{'p50 us':>9}{'p99 us':>9}"]
    lines += [f"{r.sequences:>9}{r.rounds:>8}{r.p50_us:>9.0f}{r.p99_us:>9.0f}" for r in exchange]
    lines.append(
        f"\n{'mode':<14}{'running':>8}{'2 colocated':>13}{'1 + 1 staged':>14}{'ratio':>8}{'missed':>8}"
    )
    for row in throughput:
        lines.append(
            f"{row.mode:<14}{row.running:>8}{row.colocated:>9.0f} t/s{row.staged:>10.0f} t/s{row.ratio:>8.2f}"
            f"{row.drafts_missed:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf.bench_stages", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "bench_stages.json", help="where the results go"
    )
    parser.add_argument("--checkpoint", default=EngineConfig().checkpoint, help="by default the bundled one")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--rounds", type=int, default=1000, help="of the exchange")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = local_folder(options.checkpoint)
    config = EngineConfig(options.checkpoint, block_length=BLOCK)
    exchange = []
    for sequences in (1, 4, 16):
        exchange.append(time_exchange(config, sequences, options.rounds))
        print(f"exchange of {sequences} sequences is done", file=sys.stderr, flush=True)
    tokenizer = Tokenizer(folder)
    prompts = [tuple(tokenizer.encode_chat(task.prompt)) for task in evaluation_tasks(options.prompts)]
    throughput = time_throughput(config, prompts, 256, options.repeats)
    print(table(exchange, throughput))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = {"exchange": [asdict(r) for r in exchange], "throughput": [asdict(r) for r in throughput]}
    options.json.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
