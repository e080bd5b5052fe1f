"""From a geometry and a pool of nodes to tensor parallelism, replicas, their bundles and their memory.

Pure functions of plain values: no Ray, no torch, no GPU. docs/topology.md has the formulas.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.forecast import Speed, rounds, speed
from cluster.gpu import Gpu
from cluster.placement import DOMAIN_LABELS, Node, Placement, place
from engine.config import CheckpointError, EngineConfig, ModelConfig, ModeName, Sizes
from engine.memory import PAGE_SIZE, pool_tokens, resident_bytes, spare_bytes, step_bytes, token_bytes
from engine.shapes import check_ranks

DRIVER = 2**29  # bytes that CUDA and its libraries take of a GPU before the first tensor; a round figure
BATCH_TOKENS = 2048  # query tokens of a step: 64 sequences with blocks of 32
BATCHES = (1, 8, 32, 64)


class PlanError(ValueError):
    """The pool cannot serve the model as asked; the message says what would."""


@dataclass(frozen=True, slots=True)
class Pool:
    """`nodes` with `node_gpus` each; NVLink joins `gpu.domain_nodes` of them, and what is left over."""

    gpu: Gpu
    nodes: int
    node_gpus: int

    @property
    def domains(self) -> list[int]:
        """Nodes of each NVLink domain."""
        whole, rest = divmod(self.nodes, self.gpu.domain_nodes)
        return [self.gpu.domain_nodes] * whole + [rest] * (rest > 0)

    @property
    def gpus(self) -> int:
        return self.nodes * self.node_gpus


@dataclass(frozen=True, slots=True)
class Memory:
    """Where one GPU's bytes go; they add up to its HBM. tokens: what the cache holds on every rank alike."""

    driver: int
    weights: int
    cache: int
    step: int
    reserve: int
    unused: int
    tokens: int

    @property
    def total(self) -> int:
        return self.driver + self.weights + self.cache + self.step + self.reserve + self.unused


@dataclass(frozen=True, slots=True)
class Option:
    """A tensor parallelism that the pool could run: of the whole pool, in tokens a second at the largest batch."""

    ranks: int
    replicas: int
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Plan:
    """idle: GPUs that no replica uses, and where they are. needed_tokens: what each cache must hold. options: all
    that fit."""

    pool: Pool
    ranks: int
    replicas: int
    idle: int
    idle_where: str
    placement: Placement
    memory: Memory
    needed_tokens: int
    max_model_len: int
    speeds: list[Speed]
    options: list[Option]
    engine: EngineConfig

    @property
    def settings(self) -> dict[str, Any]:
        """What `triserve serve --config` takes, as plain values."""
        names = (
            "checkpoint",
            "device",
            "dtype",
            "page_size",
            "kv_tokens",
            "max_running",
            "max_batch_tokens",
            "ridge_tokens",
            "tensor_parallel",
        )
        return {"replicas": self.replicas, "engine": {name: getattr(self.engine, name) for name in names}}

    def as_dict(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        values = asdict(self)
        del values["engine"]
        return {**values, "settings": self.settings}


def plan(
    model: ModelConfig, checkpoint: str, pool: Pool, context: int, max_running: int, ranks: int = 0
) -> Plan:
    """The tensor parallelism for which the pool's predicted tokens a second are most, of those whose caches hold
    `max_running` sequences of `context` tokens; the smaller of equals. ranks: takes this one instead.

    Raises PlanError.
    """
    if context > model.max_position:
        raise PlanError(f"the model's context ends at {model.max_position} tokens, before {context}")
    config = EngineConfig(
        checkpoint=checkpoint,
        device="cuda",
        dtype="bfloat16",
        page_size=PAGE_SIZE,
        kv_tokens=0,  # the engine fills what is free, which it knows better than a plan
        max_running=max_running,
        max_batch_tokens=max(BATCH_TOKENS, max_running),
    )
    pages = -(-(context + Sizes.of(config, model).slack) // PAGE_SIZE)
    needed = max_running * pages * PAGE_SIZE
    if ranks:
        _check_reach(model, pool, ranks)

    def predicted(count: int) -> float:
        """Tokens a second of the whole pool at the largest batch, in the better of the modes that `auto` has."""
        modes: tuple[ModeName, ...] = ("ar", "linear_spec")
        return replicas_of(pool, count) * max(
            speed(model, pool.gpu, count, config, mode, max_running, context).tokens_per_second
            for mode in modes
        )

    shared = [ranks] if ranks else _divisors(model)
    reached = [count for count in shared if replicas_of(pool, count)]
    memories = {count: memory_of(config, model, pool.gpu, count) for count in shared}
    options = [
        Option(count, replicas_of(pool, count), memories[count].tokens, predicted(count))
        for count in reached
        if memories[count].tokens >= needed
    ]
    if not options:
        raise PlanError(_what_would_fit(config, model, pool, reached, needed, context))
    best = max(options, key=lambda option: (option.tokens_per_second, -option.ranks))
    batches = sorted({batch for batch in BATCHES if batch <= max_running} | {max_running})
    speeds = [
        speed(model, pool.gpu, best.ranks, config, mode, batch, context)
        for mode in dict.fromkeys(item.mode for item in rounds(model, config.quadratic_block_length))
        for batch in batches
    ]
    held = replace(config, kv_tokens=best.tokens)
    drafted = speed(model, pool.gpu, best.ranks, config, "linear_spec", max_running, context)
    plain = speed(model, pool.gpu, best.ranks, config, "ar", max_running, context)
    config = replace(config, tensor_parallel=best.ranks)
    if drafted.tokens_per_second > plain.tokens_per_second:  # `auto` then still drafts in a full batch
        config = replace(config, ridge_tokens=max_running * drafted.block_length)
    return Plan(
        pool,
        best.ranks,
        best.replicas,
        pool.gpus - best.replicas * best.ranks,
        idle_of(pool, best.ranks),
        placement_of(pool, best.ranks),
        memories[best.ranks],
        needed,
        Sizes.of(held, model).max_model_len,
        speeds,
        options,
        config,
    )


def memory_of(config: EngineConfig, model: ModelConfig, gpu: Gpu, ranks: int) -> Memory:
    """How a rank's GPU is filled. No cache (0 tokens) means that not even the weights and a step may fit; `unused` is
    negative then."""
    weights, step = resident_bytes(config, model, ranks), step_bytes(config, model, ranks)
    tokens = pool_tokens(gpu.hbm - DRIVER - weights, gpu.hbm, config, model, ranks)
    cache, reserve = tokens * token_bytes(config, model, ranks), spare_bytes(gpu.hbm)
    unused = gpu.hbm - DRIVER - weights - cache - step - reserve
    return Memory(DRIVER, weights, cache, step, reserve, unused, tokens)


def replicas_of(pool: Pool, ranks: int) -> int:
    """How many groups of so many ranks the pool takes: inside a node, or else whole nodes of one NVLink domain."""
    if ranks <= pool.node_gpus:
        return pool.nodes * (pool.node_gpus // ranks)
    nodes, rest = divmod(ranks, pool.node_gpus)
    return 0 if rest else sum(domain // nodes for domain in pool.domains)


def idle_of(pool: Pool, ranks: int) -> str:
    """Which GPUs no group of so many ranks uses; "" if there are none."""
    if ranks <= pool.node_gpus:
        rest = pool.node_gpus % ranks
        return f"{rest} of each node" if rest else ""
    nodes = ranks // pool.node_gpus
    rests = [(number, domain % nodes) for number, domain in enumerate(pool.domains, 1) if domain % nodes]
    return ", ".join(f"{rest} {'node' if rest == 1 else 'nodes'} of domain {n}" for n, rest in rests)


def placement_of(pool: Pool, ranks: int) -> Placement:
    """One replica's placement group, as an engine asks for it on such nodes."""
    nodes = [
        Node({DOMAIN_LABELS[0]: str(domain)}, {"GPU": pool.node_gpus})
        for domain, count in enumerate(pool.domains)
        for _ in range(count)
    ]
    return place(ranks, {"GPU": 1}, nodes)


def _divisors(model: ModelConfig) -> list[int]:
    found = []
    for ranks in range(1, model.num_kv_heads + 1):
        try:
            check_ranks(model, ranks)
        except CheckpointError:
            continue
        found.append(ranks)
    return found


def _check_reach(model: ModelConfig, pool: Pool, ranks: int) -> None:
    """Raises PlanError if the model cannot be shared so, or the pool has no room for one such group."""
    try:
        check_ranks(model, ranks)
    except CheckpointError as error:
        raise PlanError(f"{error}; possible are {_listed(_divisors(model))}") from error
    largest = max(pool.domains) * pool.node_gpus
    if ranks > largest:
        raise PlanError(f"{ranks} ranks would cross NVLink domains: the pool's have at most {largest} GPUs")
    if not replicas_of(pool, ranks):
        raise PlanError(f"{ranks} ranks are no whole number of nodes with {pool.node_gpus} GPUs")


def _what_would_fit(
    config: EngineConfig, model: ModelConfig, pool: Pool, reached: list[int], needed: int, context: int
) -> str:
    most = max(reached, key=lambda count: memory_of(config, model, pool.gpu, count).tokens)
    memory = memory_of(config, model, pool.gpu, most)
    lacks = "no room for a cache" if not memory.tokens else f"a cache of {memory.tokens} tokens"
    text = (
        f"at {most} {'rank' if most == 1 else 'ranks'} a {pool.gpu.name} has {lacks}, and {needed} tokens are wanted "
        f"for {config.max_running} running sequences of {context}"
    )
    enough = [
        count for count in _divisors(model) if memory_of(config, model, pool.gpu, count).tokens >= needed
    ]
    if enough:
        text += f"; {enough[0]} GPUs in one NVLink domain would do"
    each = memory.tokens // config.max_running // PAGE_SIZE * PAGE_SIZE - Sizes.of(config, model).slack
    if each > 0:
        text += f"; as it is, sequences of {each} tokens fit"
    return text


def _listed(counts: list[int]) -> str:
    return ", ".join(map(str, counts))
