"""Plans for pools that nobody here has."""

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gpu import GPUS
from cluster.plan import PlanError, Pool, idle_of, memory_of, placement_of, plan, replicas_of
from cluster.published import LARGE, PUBLISHED
from engine.config import EngineConfig
from engine.memory import SPARE, pool_tokens
from serve_app.config import load

MODEL = LARGE.geometry()
GPU = EngineConfig(device="cuda", dtype="bfloat16", page_size=64, kv_tokens=0, max_batch_tokens=2048)


def pool(name: str, nodes: int = 1, node_gpus: int = 0) -> Pool:
    return Pool(GPUS[name], nodes, node_gpus or GPUS[name].node_gpus)


def test_a_rack_of_gb200_serves_the_14b_with_a_replica_a_gpu() -> None:
    made = plan(MODEL, "x", pool("gb200", 18), context=8192, max_running=64)
    assert (made.ranks, made.replicas, made.idle) == (1, 72, 0)
    assert made.memory.tokens > made.needed_tokens >= 64 * 8192
    assert made.max_model_len == MODEL.max_position


def test_one_h100_has_room_for_short_contexts_and_says_what_longer_ones_need() -> None:
    one = pool("h100", node_gpus=1)
    made = plan(MODEL, "x", one, context=2048, max_running=64)
    assert (made.ranks, made.replicas) == (1, 1)
    with pytest.raises(
        PlanError, match="at 1 rank a h100 has a cache of .* 2 GPUs in one NVLink domain would do"
    ):
        plan(MODEL, "x", one, context=8192, max_running=64)
    assert plan(MODEL, "x", pool("h100"), context=8192, max_running=64).ranks == 2


def test_what_the_error_says_would_fit_fits() -> None:
    one = pool("h100", node_gpus=1)
    with pytest.raises(PlanError) as caught:
        plan(MODEL, "x", one, context=8192, max_running=64)
    shorter = int(str(caught.value).rpartition("sequences of ")[2].split()[0])
    assert plan(MODEL, "x", one, shorter, 64).ranks == 1
    with pytest.raises(PlanError):
        plan(MODEL, "x", one, shorter + 64, 64)


def test_a_model_that_fits_nowhere_names_no_number_of_gpus() -> None:
    with pytest.raises(PlanError) as caught:
        plan(MODEL, "x", pool("h100"), context=262_144, max_running=512)
    assert "at 8 ranks" in str(caught.value) and "would do" not in str(caught.value)


def test_long_contexts_take_more_ranks() -> None:
    made = [
        plan(MODEL, "x", pool("gb200", 18), context, 64).ranks for context in (8192, 30_000, 60_000, 131_072)
    ]
    assert made == [1, 2, 4, 8]


def test_a_group_of_eight_spans_two_trays_and_never_two_domains() -> None:
    made = plan(MODEL, "x", pool("gb200", 19), 8192, 64, ranks=8)
    assert (made.replicas, made.idle, made.idle_where) == (9, 4, "1 node of domain 2")
    assert made.placement.bundles == [{"GPU": 1}] * 8 and made.placement.strategy == ""
    assert made.placement.topology == {"ray.io/gpu-domain": "STRICT_PACK", "ray.io/node-id": "PACK"}
    odd = plan(MODEL, "x", pool("gb200", 37), 8192, 64, ranks=8)  # 18 + 18 + 1
    assert (odd.replicas, odd.idle) == (18, 4)


def test_a_group_on_one_node_is_packed_there() -> None:
    made = plan(MODEL, "x", pool("gb200", 3), 8192, 64, ranks=4)
    assert made.placement.bundles == [{"GPU": 1}] * 4
    assert made.placement.strategy == "STRICT_PACK" and made.placement.topology == {}
    assert made.replicas == 3


@pytest.mark.parametrize(
    ("name", "nodes", "node_gpus", "ranks", "sentence"),
    [
        ("gb200", 1, 4, 8, "8 ranks would cross NVLink domains: the pool's have at most 4 GPUs"),
        (
            "h100",
            16,
            8,
            16,
            "16 ranks cannot share out num_key_value_heads 8 evenly; possible are 1, 2, 4, 8",
        ),
        ("gb200", 18, 4, 3, "3 ranks cannot share out .* possible are 1, 2, 4, 8"),
        ("gb200", 18, 3, 8, "8 ranks are no whole number of nodes with 3 GPUs"),
        ("h100", 4, 4, 8, "8 ranks would cross NVLink domains"),
    ],
)
def test_a_forced_number_of_ranks_that_cannot_be_is_refused(
    name: str, nodes: int, node_gpus: int, ranks: int, sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan(MODEL, "x", pool(name, nodes, node_gpus), 8192, 64, ranks=ranks)


def test_a_forced_number_of_ranks_without_room_names_the_one_that_has_it() -> None:
    with pytest.raises(PlanError, match="2 GPUs in one NVLink domain would do"):
        plan(MODEL, "x", pool("h100"), 8192, 64, ranks=1)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(PlanError, match="ends at 262144 tokens, before 300000"):
        plan(MODEL, "x", pool("gb300", 18), 300_000, 1)


def test_gpus_that_no_group_can_use_are_named() -> None:
    three = pool("h100", 2, 3)
    assert (replicas_of(three, 2), idle_of(three, 2)) == (2, "1 of each node")
    assert idle_of(pool("gb200", 20), 8) == "" and replicas_of(pool("gb200", 20), 8) == 10


pools = st.builds(pool, st.sampled_from(sorted(GPUS)), st.integers(1, 80), st.integers(1, 8))


@given(pools, st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=200)
def test_no_gpu_is_counted_twice_and_no_group_leaves_its_domain(pool: Pool, ranks: int) -> None:
    replicas = replicas_of(pool, ranks)
    assert 0 <= replicas * ranks <= pool.gpus and sum(pool.domains) == pool.nodes
    assert max(pool.domains) <= pool.gpu.domain_nodes
    if replicas:
        placement = placement_of(pool, ranks)
        assert sum(bundle["GPU"] for bundle in placement.bundles) == ranks
        assert ranks <= pool.gpu.domain_nodes * pool.node_gpus
        assert (placement.strategy == "STRICT_PACK") == (ranks <= pool.node_gpus)
        assert bool(idle_of(pool, ranks)) == (replicas * ranks < pool.gpus)


@pytest.mark.parametrize("published", PUBLISHED)
@pytest.mark.parametrize("name", sorted(GPUS))
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_memory_of_a_gpu_adds_up(published: Any, name: str, ranks: int) -> None:
    model = published.geometry()
    memory = memory_of(GPU, model, GPUS[name], ranks)
    page = 64 * 2 * model.num_layers * (model.num_kv_heads // ranks) * model.head_dim * 2
    assert memory.total == GPUS[name].hbm and memory.cache == memory.tokens // 64 * page
    assert 0 <= memory.unused < page and memory.reserve == int(SPARE * memory.total)


def test_a_rank_holds_its_share_of_the_weights() -> None:
    assert 27.0e9 < memory_of(GPU, MODEL, GPUS["gb200"], 1).weights < 27.3e9
    whole, eighth = (memory_of(GPU, MODEL, GPUS["gb200"], ranks).weights for ranks in (1, 8))
    assert whole / 8 < eighth < whole / 8 + 0.2e9  # norms and rotary tables are everywhere


@given(st.integers(40, 400), st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_more_memory_never_means_less_cache(gib: int, more: int, ranks: int) -> None:
    less, gpu = GPUS["gb200"], GPUS["gb200"]
    less, gpu = replace(less, hbm=gib * 2**30), replace(gpu, hbm=(gib + more) * 2**30)
    assert memory_of(GPU, MODEL, less, ranks).tokens <= memory_of(GPU, MODEL, gpu, ranks).tokens
    assert pool_tokens(0, less.hbm, GPU, MODEL, ranks) == 0


def test_the_choice_is_the_best_option_of_those_that_fit() -> None:
    for context in (2048, 8192, 60_000):
        made = plan(MODEL, "x", pool("h200", 2), context, 64)
        best = max(made.options, key=lambda option: option.tokens_per_second)
        assert (best.ranks, best.replicas) == (made.ranks, made.replicas)
        assert all(option.tokens >= made.needed_tokens for option in made.options)


def test_the_printed_settings_are_a_configuration() -> None:
    made = plan(MODEL, "nvidia/x@" + "0" * 40, pool("gb200", 18), 8192, 64)
    raw = yaml.safe_load(yaml.safe_dump(made.settings))
    assert raw == made.settings and raw["engine"]["tensor_parallel"] == 1
    given = {f"engine.{key}": value for key, value in raw["engine"].items()}
    config = load(None, {**given, "replicas": raw["replicas"]})
    assert config.replicas == 72 and config.engine == made.engine


def test_the_plan_as_json_keeps_its_shape() -> None:
    made = json.loads(json.dumps(plan(MODEL, "x", pool("gb200", 18), 8192, 64).as_dict()))
    assert list(made) == [
        "pool", "ranks", "replicas", "idle", "idle_where", "placement", "memory", "needed_tokens", "max_model_len",
        "speeds", "options", "settings",
    ]  # fmt: skip
    assert list(made["pool"]) == ["gpu", "nodes", "node_gpus"]
    assert list(made["placement"]) == ["bundles", "strategy", "topology"]
    assert list(made["memory"]) == ["driver", "weights", "cache", "step", "reserve", "unused", "tokens"]
    assert list(made["speeds"][0]) == ["mode", "batch", "block_length", "tokens_per_second"]
    assert list(made["options"][0]) == ["ranks", "replicas", "tokens", "tokens_per_second"]
    assert [(s["mode"], s["batch"]) for s in made["speeds"][:4]] == [("ar", b) for b in (1, 8, 32, 64)]
