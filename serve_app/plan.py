"""`triserve plan`: how a pool of GPUs would serve a model, as a configuration with its reasons in comments."""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from cluster.forecast import Speed
from cluster.gpu import GPUS
from cluster.plan import Plan, PlanError, Pool, plan
from cluster.published import PUBLISHED
from engine.config import ModelConfig
from serve_app import limits

GIB = 2**30
BASIS = """PREDICTED, not measured: decode forwards alone, without prefill, scheduling and HTTP. A formula fitted to
another server's forwards of the 14B on one B200 (median error 3 %, at most 13 %; of the 8B 4 and 16 %), scaled
by data sheets for other GPUs and by published all-reduce times for TP; tokens per round as on public
benchmarks, of which open chat reaches about half. That server as a whole, at short contexts, reached 26 to
67 % of what its forwards allow. The formula and its sources: docs/topology.md."""


def add_options(command: argparse.ArgumentParser) -> None:
    names = ", ".join(published.repository for published in PUBLISHED)
    command.add_argument("--model", required=True, metavar="NAME|DIR", help=f"a folder, or one of {names}")
    command.add_argument("--gpu", required=True, choices=list(GPUS))
    command.add_argument("--json", action="store_true", help="JSON instead of YAML")
    for name, default, text in (
        ("nodes", 1, "in whole NVLink domains as far as they go; default: 1"),
        ("gpus-per-node", None, "default: what such nodes have"),
        ("context", 8192, "cached tokens of each running sequence; default: 8192"),
        ("max-running", 64, "sequences that decode at once in a replica; default: 64"),
        ("tp", 0, "ranks of a replica; default: what gives the pool most tokens a second"),
    ):
        command.add_argument(f"--{name}", type=_within(name), default=default, metavar="N", help=text)


def run(options: argparse.Namespace) -> str:
    """The answer of `triserve plan`. Raises PlanError or CheckpointError."""
    checkpoint, model = _model(options.model)
    gpu = GPUS[options.gpu]
    pool = Pool(gpu, options.nodes, options.gpus_per_node or gpu.node_gpus)
    made = plan(model, checkpoint, pool, options.context, options.max_running, options.tp)
    if options.json:
        return json.dumps({**made.as_dict(), "basis": " ".join(BASIS.split())}, indent=2)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in page(options.model, made, options.context))
    return comments + yaml.safe_dump(made.settings, sort_keys=False).rstrip()


def page(name: str, made: Plan, context: int) -> list[str]:
    """What a reader wants to know before the settings, line by line."""
    pool, memory = made.pool, made.memory
    shape = (
        f"{pool.nodes} x {pool.node_gpus} {pool.gpu.name}, NVLink domains of {_listed(pool.domains)} nodes"
    )
    group = made.placement
    how = group.strategy or json.dumps(group.topology)
    idle = f", {made.idle} GPUs idle: {made.idle_where}" if made.idle else ", no GPU idle"
    lines = [
        f"{name} on {shape}",
        "",
        f"tensor parallel {made.ranks}, replicas {made.replicas}{idle}",
        f"placement group of a replica: {_bundles(group.bundles)}, {how}",
        *(
            f"  TP {option.ranks}, replicas {option.replicas}: {option.tokens:,} cached tokens each, "
            f"{option.tokens_per_second:,.0f} tokens/s in all"
            for option in made.options
        ),
        "",
        "memory of a GPU      GiB",
    ]
    each = memory.tokens // made.engine.max_running
    notes = {
        "driver": "",
        "weights": "with draft adapter and rotary tables",
        "cache": f"{memory.tokens:,} tokens ({each:,} for each of {made.engine.max_running} sequences; "
        f"{made.needed_tokens:,} wanted)",
        "step": f"logits and activations of {made.engine.max_batch_tokens} query tokens, tables",
        "reserve": "captured graphs, allocator",
        "unused": "less than a page",
        "total": f"longest request: {made.max_model_len:,} tokens",
    }
    lines += [
        f"  {part:<12} {getattr(memory, part) / GIB:9.2f}  {note}".rstrip() for part, note in notes.items()
    ]
    lines += ["", f"tokens/s of a replica with {context:,} cached tokens a sequence (block length)"]
    lines += _table(made)
    return [*lines, "", *BASIS.splitlines(), ""]


def _table(made: Plan) -> list[str]:
    batches = sorted({speed.batch for speed in made.speeds})
    heads = "".join(f"{f'batch {batch}':>15}" for batch in batches)
    lines = [f"  {'':<15}{heads}{f'pool at {batches[-1]}':>15}"]
    for mode in dict.fromkeys(speed.mode for speed in made.speeds):
        own = [speed for speed in made.speeds if speed.mode == mode]
        cells = "".join(f"{_cell(speed):>15}" for speed in own)
        lines.append(f"  {mode:<15}{cells}{own[-1].tokens_per_second * made.replicas:>15,.0f}")
    return lines


def _cell(speed: Speed) -> str:
    block = f" ({speed.block_length})" if speed.block_length > 1 else ""
    return f"{speed.tokens_per_second:,.0f}{block}"


def _bundles(bundles: list[dict[str, float]]) -> str:
    return f"{len(bundles)} x {json.dumps(bundles[0])}"


def _listed(counts: list[int]) -> str:
    different = dict.fromkeys(counts)
    return " and ".join(map(str, different))


def _model(name: str) -> tuple[str, ModelConfig]:
    """What `engine.checkpoint` must say, and the geometry."""
    for published in PUBLISHED:
        if name == published.repository:
            return f"{published.repository}@{published.commit}", published.geometry()
    folder = Path(name)
    if not folder.is_dir():
        known = ", ".join(published.repository for published in PUBLISHED)
        raise PlanError(f"{name} is neither a folder nor one of {known}")
    return str(folder.resolve()), ModelConfig.from_json(folder / "config.json")


def _within(name: str) -> Any:
    least, most = limits.PLAN[name]

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number between {least} and {most}, not {text}")
        return int(text)

    return parse
