"""What only a GPU can prove: bits, captured graphs, collectives, and the 14B at full size.

`perf/gpu_suite.sh` runs these. Two layers of the 14B stand for forty where depth does not matter.
"""

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import EngineConfig, ModeName, SamplingParams
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.layers import rope_table
from engine.loop import EngineLoop
from engine.model import Model
from engine.request import Request
from engine.runner import Runner, load_model
from engine.step import Step
from engine.tp import Distributed
from engine.weights import dummy_weights
from fakes import generate
from kernels.attention import Ragged, plan_attention, plan_attention_reference, ragged_attention
from kernels.attention import ragged_attention_reference as attention_in_torch
from kernels.rope import rope_and_store, rope_and_store_reference
from perf.bench_forward import Listening
from perf.geometry import geometry, raw_config, write_config
from perf.steps import denoise_step, draft_step, occupy, rewind, verify_step

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA"),
]

DEVICE = torch.device("cuda")
SIZE, DTYPE, PAGE = "14b", torch.bfloat16, 64
CONTEXTS = (100, 20_000)
LONG = (20_000, 40_000)  # beyond the original window of 16,384, once and twice


@pytest.fixture(scope="module")
def model() -> Model:
    """Two layers, exact."""
    shape = replace(geometry(SIZE), num_layers=2)
    return Model(shape, dummy_weights(shape, DTYPE, DEVICE), max(LONG) + 2048, exact=True)


def runner(model: Model) -> Runner:
    config = EngineConfig(
        dtype="bfloat16",
        page_size=PAGE,
        kv_tokens=8 * (max(CONTEXTS) + 1024),
        max_running=8,
        max_model_len=max(CONTEXTS) + 512,
        exact=True,
    )
    return Runner(model, config)


def prepared(model: Model, rows: int, context: int, graphs: bool = True) -> Runner:
    """A runner with the same random contexts every time."""
    ready = runner(model)
    if not graphs:
        ready.graphs = None
    torch.manual_seed(0)
    occupy(ready, rows, context, 128)
    return ready


def logits_of(model: Model, rows: int, context: int, steps: list[Step]) -> list[Tensor]:
    """Each step's logits, on rows that stand behind a context."""
    listening = Listening(model)
    ready = prepared(listening, rows, context, graphs=False)
    for step in steps:
        ready.run([step])
    return listening.heard


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("block", [8, 32])
def test_ar_and_verification_have_the_same_logits_to_the_bit(model: Model, context: int, block: int) -> None:
    listening = Listening(model)
    ready = prepared(listening, 1, context, graphs=False)
    for _ in range(block):
        ready.run([verify_step(1, 1)])
    alone = torch.cat(listening.heard)
    listening.heard.clear()
    rewind(ready, 1, context)  # what AR has said is now the draft
    ready.run([verify_step(1, block)])
    assert torch.equal(listening.heard[0], alone)


@pytest.mark.parametrize("context", CONTEXTS)
def test_neighbours_change_no_bit(model: Model, context: int) -> None:
    (alone,) = logits_of(model, 5, context, [verify_step(1, 8)])
    (together,) = logits_of(model, 5, context, [verify_step(5, 8)])
    assert torch.equal(together[:8], alone)


@pytest.mark.parametrize(
    "step", [verify_step(3, 1), verify_step(2, 8), draft_step(2, 32, lora=True), denoise_step(3, 16)]
)
def test_a_graph_does_what_the_same_code_does_without_one(model: Model, step: Step) -> None:
    captured, eager = prepared(model, 4, 100), prepared(model, 4, 100, graphs=False)
    for _ in range(3):  # the first captures, the others replay
        assert captured.run([step]).committed() == eager.run([step]).committed()
    own = captured.tables.pages[:4, :4].flatten()
    assert torch.equal(captured.tables.tokens[:4], eager.tables.tokens[:4])
    assert torch.equal(captured.tables.cached[:4], eager.tables.cached[:4])
    assert torch.equal(captured.kv[:, own], eager.kv[:, own])


def test_a_round_in_one_graph_is_its_two_steps(model: Model) -> None:
    together, apart = prepared(model, 2, 100), prepared(model, 2, 100)
    steps = [draft_step(2, 16, lora=True), verify_step(2, 16)]
    for _ in range(3):
        said = together.run(steps).committed()
        for step in steps:
            output = apart.run([step])
        assert said == output.committed()
    assert torch.equal(together.tables.tokens[:2], apart.tables.tokens[:2])


def test_the_captured_draft_has_the_adapter(model: Model) -> None:
    """A graph that was captured without it would draft what the base model drafts, and nobody would notice."""
    held: dict[tuple[bool, bool], Tensor] = {}
    for graphs in (False, True):
        for lora in (False, True):
            ready = prepared(model, 1, 100, graphs)
            for _ in range(2):
                ready.run([draft_step(1, 32, lora)])
            own = ready.tables.pages[0, :4]
            held[graphs, lora] = torch.cat(
                (ready.kv[:, own].flatten(), ready.tables.tokens[0].to(ready.kv.dtype))
            )
    assert torch.equal(held[True, True], held[False, True])
    assert torch.equal(held[True, False], held[False, False])
    assert not torch.equal(held[True, True], held[True, False])


@pytest.mark.parametrize("exact", [False, True])
def test_a_server_checks_its_kernels_captures_its_graphs_and_answers(tmp_path: Path, exact: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config(SIZE) | {"num_hidden_layers": 2}))
    config = EngineConfig(
        checkpoint=str(tmp_path),
        load_format="dummy",
        device=DEVICE.type,
        dtype="bfloat16",
        page_size=PAGE,
        kv_tokens=2**16,
        max_model_len=4096,
        exact=exact,
        lag=1,
    )
    loop = EngineLoop(config)

    async def answer(mode: ModeName) -> list[int]:
        sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=5, max_tokens=70, ignore_eos=True)
        request = Request(mode, tuple(range(200, 300)), sampling, mode)
        return [token async for delta in loop.stream(request) for token in delta.token_ids]

    async def answers() -> list[list[int]]:
        return await asyncio.gather(*map(answer, ("ar", "linear_spec", "quadratic_spec", "diffusion")))  # type: ignore[arg-type]

    try:
        said = asyncio.run(answers())
        assert loop.status().error is None
    finally:
        loop.close()
    assert [len(tokens) for tokens in said] == [70] * 4
    if exact:
        assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("context", LONG)
@pytest.mark.parametrize("exact", [False, True])
def test_long_contexts_agree_with_a_plain_attention(context: int, exact: bool) -> None:
    """Rotation, query scaling beyond the original window, the store and attention, 40 tokens behind a context."""
    shape, tokens = geometry(SIZE), 40
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    columns = -(-(context + tokens) // PAGE)
    torch.manual_seed(0)
    kv = torch.randn(columns, PAGE, 2 * kv_heads, dim, device=DEVICE, dtype=DTYPE)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE, dtype=DTYPE)
    position = torch.arange(context, context + tokens, device=DEVICE)
    pages = torch.randperm(columns, device=DEVICE)
    slots = pages[position // PAGE] * PAGE + position % PAGE
    index = torch.arange(tokens, device=DEVICE)

    def one(value: int) -> Tensor:
        return torch.tensor([value], device=DEVICE)

    ragged = Ragged(
        first=one(0),
        length=one(tokens),
        context=one(context),
        row=one(0),
        open=one(0).bool(),
        upto=index + 1,
        lo=torch.zeros_like(index),
        hi=torch.zeros_like(index),
        pages=torch.cat((pages, pages[:1]))[None],
        lengths=[tokens],
    )
    rope = rope_table(shape.rope, dim, context + tokens, DTYPE, DEVICE).at(position)
    assert float(rope.scale.min()) > 1
    plain_kv = kv.float()
    q = rope_and_store(qkv, rope.cos, rope.sin, rope.scale, kv, slots, heads)
    ours = ragged_attention(q, kv, plan_attention(ragged, PAGE, heads, kv_heads, dim, DTYPE, exact))
    exactly = rope_table(shape.rope, dim, context + tokens, torch.float32, DEVICE).at(position)
    plain_q = rope_and_store_reference(
        qkv.float(), exactly.cos, exactly.sin, exactly.scale, plain_kv, slots, heads
    )
    plan = plan_attention_reference(ragged, PAGE, heads, kv_heads, dim, torch.float32, exact)
    theirs = attention_in_torch(plain_q, plain_kv, plan)
    torch.testing.assert_close(ours.float(), theirs, atol=5e-3, rtol=5e-2)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    """A process group of this process alone."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield str(dist.group.WORLD.group_name) if dist.group.WORLD is not None else ""
    finally:
        dist.destroy_process_group()


def test_nccl_adds_up_in_a_graph(group: str) -> None:
    x = torch.arange(5120.0, device=DEVICE).to(DTYPE)
    before = x.clone()
    dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(x, before)


def test_symmetric_memory_adds_up(group: str) -> None:
    symmetric = pytest.importorskip("torch.distributed._symmetric_memory")
    x = symmetric.empty(5120, dtype=DTYPE, device=DEVICE)
    symmetric.rendezvous(x, group=group)
    x.copy_(torch.arange(5120.0))
    assert torch.equal(torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group), x)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("exact", [False, True])
def test_steps_whose_ranks_talk_are_captured_and_change_no_bit(model: Model, exact: bool) -> None:
    assert dist.group.WORLD is not None
    shared = copy.copy(model)
    shared.group = Distributed(dist.group.WORLD, DTYPE, DEVICE, exact)
    talking, alone = prepared(shared, 4, 100), prepared(model, 4, 100)
    for _ in range(3):
        for step in (draft_step(2, 32, lora=True), verify_step(3, 8)):
            assert talking.run([step]).committed() == alone.run([step]).committed()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, EngineConfig]:
    """All layers, dummy weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_config(folder, SIZE)
    config = EngineConfig(
        checkpoint=str(folder),
        load_format="dummy",
        device=DEVICE.type,
        dtype="bfloat16" if DTYPE is torch.bfloat16 else "float32",
        page_size=PAGE,
        kv_tokens=16384,
        max_running=8,
        max_model_len=2048,
        exact=True,
    )
    return load_model(config), config


@pytest.mark.parametrize("lag", [0, 1])
def test_the_whole_model_says_the_same_in_every_lossless_mode(
    full: tuple[Model, EngineConfig], lag: int
) -> None:
    model, config = full
    config = replace(config, lag=lag)  # type: ignore[arg-type]
    engine = Engine(config, LocalExecutor(model, config))
    modes: tuple[ModeName, ...] = ("ar", "linear_spec", "quadratic_spec", "diffusion")
    torch.manual_seed(0)
    prompt = tuple(torch.randint(200, model.config.vocab_size, (50,)).tolist())
    requests = [
        Request(
            f"{mode} {temperature}",
            prompt,
            SamplingParams(temperature=temperature, seed=3, max_tokens=24, ignore_eos=True),
            mode,
        )
        for mode in modes
        for temperature in (0.0, 1.0)
    ]
    answers = generate(engine, requests)
    assert all(len(answer) == 24 for answer in answers.values())
    for temperature in (0.0, 1.0):
        ar = answers[f"ar {temperature}"]
        assert answers[f"linear_spec {temperature}"] == ar
        assert answers[f"quadratic_spec {temperature}"] == ar
