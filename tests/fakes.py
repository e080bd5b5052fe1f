"""Random checkpoints of the family's layout, and engines on them, for tests of exactness."""

import json
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.asking import Asking
from engine.config import EngineConfig, ModelConfig, RopeConfig, Sizes
from engine.drafter import Drafter
from engine.drafts import Answer, Ask, DraftSource
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.model import Model
from engine.output import HostOutput
from engine.request import Delta, Request
from engine.runner import Runner
from engine.segment import Pattern
from engine.shapes import expected_shapes, share
from engine.step import BLOCK, PATTERN, ROW, Step
from engine.tp import Group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the Triton kernels are tested
torch.set_num_threads(1)  # more threads than idle cores only wait for each other

TOY = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position=256,
    block_length=32,
    mask_id=7,
    bos_id=1,
    eos_ids=(3,),
    rope=RopeConfig(1e4, 16.0, 16, 32.0, 1.0, 1.0, 0.1),
)
WIDE = replace(TOY, num_heads=8, num_kv_heads=4, head_dim=4)  # what four ranks can share
TOY_ENGINE = EngineConfig(dtype="float64", page_size=4, kv_tokens=2048, max_running=8, max_batch_tokens=160)


def random_weights(
    config: ModelConfig, seed: int, dtype: torch.dtype, adapter: bool = True
) -> dict[str, Tensor]:
    """Random weights. The seed decides how flat the logits are: where they are flat, sampled drafts are mostly right,
    since they share their noise with the verifier, and where they are steep hardly ever."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)

    weights: dict[str, Tensor] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            weights[name] = 1 + random(*shape, scale=0.1)
        else:
            gain = 1.0 if name == "encoder.embed_tokens.weight" else 1.2 / shape[1] ** 0.5
            weights[name] = random(*shape, scale=gain)
    weights["diffusion_head.weight"] *= (4.0, 1.0, 0.2)[seed % 3]
    if adapter:
        for index in range(config.num_layers):
            prefix = f"encoder.layers.{index}.self_attn.o_proj"
            weights[f"{prefix}.lora_A"] = random(4, config.num_heads * config.head_dim, scale=0.3)
            weights[f"{prefix}.lora_B"] = random(config.hidden_size, 4, scale=0.3)
    return weights


def toy_model(
    seed: int,
    config: EngineConfig,
    geometry: ModelConfig = TOY,
    adapter: bool = True,
    group: Group | None = None,
) -> Model:
    """A random model in the engine's dtype, or a rank's share of it."""
    sizes, dtype = Sizes.of(config, geometry), getattr(torch, config.dtype)
    weights = random_weights(geometry, seed, dtype, adapter)
    if group is not None:
        for name, whole in weights.items():
            stored = name if name.endswith(".weight") else f"{name}.weight"
            index = share(stored, tuple(whole.shape), group.rank, group.size)
            weights[name] = whole[index].clone(memory_format=torch.contiguous_format)
    return Model(geometry, weights, sizes.max_model_len + sizes.slack, config.exact, group)


def toy_engine(
    seed: int = 0, adapter: bool = True, geometry: ModelConfig = TOY, **settings: object
) -> Engine:
    """An engine on a random model, on as many ranks as the settings say, which replace those of TOY_ENGINE."""
    config = replace(TOY_ENGINE, **settings)  # type: ignore[arg-type]
    return Engine(config, toy_executor(seed, config, geometry, adapter))


def toy_executor(
    seed: int, config: EngineConfig, geometry: ModelConfig = TOY, adapter: bool = True
) -> "LocalExecutor | ThreadedExecutor":
    """A random model on as many ranks as the configuration says."""
    if config.tensor_parallel == 1:
        return LocalExecutor(toy_model(seed, config, geometry, adapter), config)
    groups = thread_groups(config.tensor_parallel)
    models = [toy_model(seed, config, geometry, adapter, group) for group in groups]
    return ThreadedExecutor(groups, models, config)


class ThreadGroup:
    """A rank of several that are threads of one process and take turns, so that their kernels may share an interpreter
    that knows of no threads. Sums are made in rank order."""

    def __init__(
        self, rank: int, parts: list[list[Tensor]], barrier: threading.Barrier, turn: threading.Lock
    ) -> None:
        """parts: two lists of a tensor per rank, used in turn, since a rank may be one exchange ahead."""
        self.rank, self.size = rank, len(parts[0])
        self._parts, self._barrier, self._turn, self._exchanges = parts, barrier, turn, 0

    def sum(self, x: Tensor) -> Tensor:
        first, *others = self._exchange(x)
        total = first.clone()
        for part in others:
            total += part
        return total

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), 1)

    def work(self, runner: Runner, steps: Sequence[Step]) -> HostOutput:
        """Runs a rank's steps while it is its turn."""
        with self._turn:
            try:
                return runner.run(steps)
            except BaseException:
                self._barrier.abort()
                raise

    def _exchange(self, x: Tensor) -> list[Tensor]:
        parts = self._parts[self._exchanges % 2]
        self._exchanges += 1
        parts[self.rank] = x
        self._turn.release()
        try:
            self._barrier.wait(60)
        finally:
            self._turn.acquire()
        return list(parts)


def thread_groups(size: int) -> list[ThreadGroup]:
    parts = [[torch.empty(0)] * size for _ in range(2)]
    barrier, turn = threading.Barrier(size), threading.Lock()
    return [ThreadGroup(rank, parts, barrier, turn) for rank in range(size)]


class ThreadedExecutor:
    """All ranks of a model in this process. Asserts that they commit the same."""

    def __init__(self, groups: Sequence[ThreadGroup], models: Sequence[Model], config: EngineConfig) -> None:
        self.model_config, self.has_adapter, self.config = models[0].config, models[0].has_adapter, config
        self.device_name, self.phases = "threads", dict[str, float]()
        self.groups, self.runners = groups, [Runner(model, config) for model in models]
        self._threads = ThreadPoolExecutor(len(groups))

    def run(self, steps: Sequence[Step]) -> HostOutput:
        runs = [
            self._threads.submit(group.work, runner, steps)
            for group, runner in zip(self.groups, self.runners, strict=True)
        ]
        first, *others = [run.result() for run in runs]
        assert all(first.committed() == other.committed() for other in others)
        return first

    def close(self) -> None:
        self._threads.shutdown()


class DrafterExecutor(LocalExecutor):
    """Replaces every linear draft by what `drafter(row, position)` says."""

    def __init__(self, model: Model, config: EngineConfig, drafter: Callable[[int, int], int]) -> None:
        super().__init__(model, config)
        self.drafter = drafter

    def run(self, steps: Sequence[Step]) -> HostOutput:
        tables = self.runner.tables
        for step in steps:
            output = super().run([step])
            for segment in step.segments[step.segments[:, PATTERN] == Pattern.CANVAS]:
                row, cached = int(segment[ROW]), int(tables.cached[segment[ROW]])
                for position in range(cached + 1, cached + int(segment[BLOCK])):
                    tables.tokens[row, position] = self.drafter(row, position)
        return output


def random_prompt(chance: random.Random, length: int) -> tuple[int, ...]:
    """Any tokens but the mask."""
    return tuple(chance.choice([t for t in range(TOY.vocab_size) if t != TOY.mask_id]) for _ in range(length))


def ar_answer(seed: int, request: Request) -> list[int]:
    """What a plain AR engine, all by itself, answers to the request."""
    alone = replace(request, mode="ar", generated=())
    return generate(toy_engine(seed), [alone])[request.id]


def generate(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Runs the requests to their ends; returns the answer of each, journalled tokens included."""
    for request in requests:
        engine.add(request)
    answers = {request.id: list(request.generated) for request in requests}
    for delta in run(engine):
        for name, change in delta.items():
            answers[name].extend(change.token_ids)
    return answers


def run(engine: Engine) -> list[dict[str, Delta]]:
    """Steps an engine until it is idle, checking its pages all the way."""
    reports = []
    while not engine.idle:
        reports.append(engine.step())
        engine.scheduler.pool.check([s.pages for s in engine.scheduler.running])
        assert len(reports) < 5000, "the engine makes no progress"
    return reports


def write_checkpoint(folder: Path, config: ModelConfig, seed: int = 0, adapter: bool = True) -> None:
    """Writes a random checkpoint in the family's layout, adapter scale 4."""
    weights = random_weights(config, seed, torch.float32, adapter)
    names = expected_shapes(config)
    save_file({name: weights[name] for name in names}, folder / "model.safetensors")
    rope = config.rope
    raw = {
        "model_type": "nemotron_labs_diffusion",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "block_size": config.block_length,
        "mask_token_id": config.mask_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": rope.query_scaling_beta,
        },
    }
    (folder / "config.json").write_text(json.dumps(raw))
    if adapter:
        lora = folder / "linear_spec_lora"
        lora.mkdir()
        settings = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["o_proj"],
            "use_dora": False,
        }
        (lora / "adapter_config.json").write_text(json.dumps(settings))
        tensors = {
            f"base_model.model.{name}.weight": tensor / 4 if name.endswith("B") else tensor
            for name, tensor in weights.items()
            if name not in names
        }
        save_file(tensors, lora / "adapter_model.safetensors")


class DrafterBeside:
    """A drafter in the same process, one step whenever it is polled. Tests overwrite its methods to misbehave."""

    def __init__(self, drafter: Drafter, peer: bytes = b"") -> None:
        self.drafter, self.peer = drafter, peer
        self.answers: list[Answer] = []

    def send(self, asks: Sequence[Ask], dropped: Sequence[int]) -> None:
        for key in dropped:
            self.drafter.drop(self.peer, key)
        for ask in asks:
            self.drafter.add(self.peer, ask)

    def poll(self) -> list[Answer]:
        if not self.drafter.idle:
            self.answers += [answer for _, answer in self.drafter.step()]
        answers, self.answers = self.answers, []
        return answers

    def wait(self, seconds: float) -> None:
        pass


def toy_drafter(seed: int = 0, adapter: bool = True, **settings: object) -> Drafter:
    """A drafter on the random model of that seed; settings replace those of TOY_ENGINE."""
    config = replace(TOY_ENGINE, **settings)  # type: ignore[arg-type]
    return Drafter(config, toy_executor(seed, config, adapter=adapter))


def staged_engine(source: DraftSource, seed: int = 0, patience: float = 3600.0, **settings: object) -> Engine:
    """An engine on a random model whose drafts `source` draws."""
    config = replace(TOY_ENGINE, **settings)  # type: ignore[arg-type]
    return Engine(config, toy_executor(seed, config), Asking(source, patience))


def check_drafter_is_empty(drafter: Drafter) -> None:
    """Nothing is followed, and no page or row is held."""
    status = drafter.status()
    assert status.followed == status.asks == 0 and status.free_pages == status.total_pages
    drafter.pool.check([])
    assert sorted(drafter._rows) == list(range(drafter.config.max_running))
