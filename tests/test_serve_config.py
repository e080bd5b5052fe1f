import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import DiffusionParams, EngineConfig
from serve_app import limits
from serve_app.config import AppConfig, ConfigError, load, ray_environment


def nested(place: str, value: Any) -> dict[str, Any]:
    *sections, name = place.split(".")
    raw = {name: value}
    for section in reversed(sections):
        raw = {section: raw}
    return raw


def test_no_file_and_no_options_give_the_bundled_model_on_loopback() -> None:
    config = load()
    assert config.engine == EngineConfig()
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)
    assert config.model_name == "triserve-tiny"


def test_a_file_sets_what_it_names_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "triserve.yaml"
    file.write_text(
        "replicas: 2\nengine: {checkpoint: /models/nld-3b, diffusion: {threshold: 0.5}}\nserver: {port: 1}\n"
    )
    config = load(file, {"server.port": 9000, "engine.default_mode": "ar"})
    assert config.replicas == 2
    assert config.engine.diffusion == DiffusionParams(threshold=0.5)
    assert config.engine.default_mode == "ar"
    assert config.server.port == 9000
    assert config.model_name == "nld-3b"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"replica": 2}, "unknown key replica (did you mean replicas?)"),
        ({"server": {"prot": 1}}, "unknown key server.prot (did you mean server.port?)"),
        ({"engine": {"page_sizes": 1}}, "unknown key engine.page_sizes (did you mean engine.page_size?)"),
        (
            {"engine": {"diffusion": {"treshold": 1}}},
            "unknown key engine.diffusion.treshold (did you mean engine.diffusion.threshold?)",
        ),
        ({"serve": {"xyzzy": 1}}, "unknown key serve.xyzzy (known: proxy, "),
        (
            {"topology": "staged", "draft": {"engine": {"treads": 1}}},
            "unknown key draft.engine.treads (did you mean draft.engine.threads?)",
        ),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate(raw)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("server: {port: x}", "server.port: Input should be a valid integer"),
        ("engine: {lag: 2}", "engine.lag: Input should be 0 or 1"),
        ("engine: {block_length: 5}", "engine.block_length must be 0 or one of"),
        (
            "engine: {diffusion: {threshold: .nan}}",
            "engine.diffusion.threshold: Input should be a finite number",
        ),
        (
            "ar_mode: true\nengine: {default_mode: diffusion}",
            "ar_mode contradicts engine.default_mode: diffusion",
        ),
        (
            "engine: {tensor_parallel: 2, device: 'cuda:1'}",
            "engine.device must be cpu or cuda with engine.tensor_parallel above 1, not cuda:1",
        ),
        ("engine: {tensor_parallel: 0}", "engine.tensor_parallel must be between 1 and 64, not 0"),
        ("engine: {weights: fp8}", "engine.weights: fp8 may only draft, and this engine answers"),
        ("draft: {replicas: 2}", "draft is for topology: staged, and topology is colocated"),
        ("topology: both", "topology: Input should be 'colocated' or 'staged'"),
        ("topology: staged\ndraft: {engine: {weights: fp9}}", "draft.engine.weights: Input should be"),
        (
            "topology: staged\ndraft: {engine: {checkpoint: other}}",
            "draft.engine.checkpoint must be as in engine, ",
        ),
        (
            "topology: staged\ndraft: {engine: {block_length: 5}}",
            "draft.engine.block_length must be 0 or one",
        ),
        ("topology: staged\ndraft: 1", "draft: Input should be"),
        ("topology: staged\ndraft: {engine: 1}", "draft.engine: "),
        ("- 1", "must hold a mapping"),
        ("server: [", "cannot read"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert sentence in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("place", limits.CONFIG)
def test_every_number_is_bounded(place: str) -> None:
    least, most = limits.CONFIG[place]
    staged = {"topology": "staged"} if place.startswith("draft.") else {}
    for value in (least, most):
        raw = nested(place, value)
        if place == "draft.engine.max_model_len":
            raw |= nested("engine.max_model_len", value)  # they must agree
        AppConfig.model_validate(staged | raw)
    for value in (least - 1, most + 1):
        with pytest.raises(ValidationError, match=place):
            AppConfig.model_validate(staged | nested(place, value))


def test_no_number_is_forgotten_by_the_bounds() -> None:
    def numbers(value: Any, place: str) -> list[str]:
        fields = (
            type(value).model_fields
            if isinstance(value, AppConfig)
            else getattr(value, "__dataclass_fields__", None)
        )
        fields = fields or getattr(type(value), "model_fields", None)
        if fields is not None:
            return [found for name in fields for found in numbers(getattr(value, name), f"{place}{name}.")]
        return [place.removesuffix(".")] if type(value) in (int, float) else []

    of_engine = {"engine.block_length", "engine.diffusion.block_length", "engine.lag"}
    elsewhere = of_engine | {f"draft.{place}" for place in of_engine}
    assert set(numbers(AppConfig(), "")) - elsewhere == set(limits.CONFIG)


def test_a_draft_pools_engine_is_the_engine_but_for_what_it_sets() -> None:
    raw = {
        "topology": "staged",
        "engine": {"kv_tokens": 4096, "threads": 2, "diffusion": {"steps": 3}},
        "draft": {"replicas": 2, "engine": {"threads": 3, "weights": "fp8"}},
    }
    config = AppConfig.model_validate(raw)
    assert config.draft.engine == EngineConfig(
        kv_tokens=4096, threads=3, weights="fp8", diffusion=DiffusionParams(steps=3)
    )
    assert AppConfig.model_validate(config.model_dump()) == config
    assert AppConfig.model_validate(config) == config
    assert not config.draft_canvases and AppConfig(topology="staged").draft_canvases
    assert AppConfig(topology="staged", engine=EngineConfig(threads=2)).draft.engine.threads == 2


def test_ar_mode_is_another_word_for_the_default_mode() -> None:
    config = AppConfig.model_validate({"ar_mode": True})
    assert config.effective_engine.default_mode == "ar"
    assert AppConfig().effective_engine.default_mode == "auto"


def test_rays_environment_follows_the_configuration() -> None:
    python = ray_environment(AppConfig())
    assert python["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert python["RAY_SERVE_ENABLE_HA_PROXY"] == python["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    raw = {"serve": {"proxy": "haproxy", "stats_port": 1234, "drain_seconds": 50, "health_check_seconds": 2}}
    haproxy = ray_environment(AppConfig.model_validate(raw))
    assert haproxy["RAY_SERVE_ENABLE_HA_PROXY"] == haproxy["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1"
    assert haproxy["RAY_SERVE_HAPROXY_STATS_PORT"] == "1234"
    assert haproxy["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "50"
    assert haproxy["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "2.0"


def test_ray_knows_every_variable_that_is_set() -> None:
    names = ray_environment(AppConfig.model_validate({"serve": {"proxy": "haproxy"}}))
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    sources = [package / "serve/_private/constants.py", package / "_common/usage/usage_constants.py"]
    known = "".join(source.read_text() for source in sources)
    assert [name for name in names if f'"{name}"' not in known] == []


def test_serve_validates_the_builders_arguments() -> None:
    code = """
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_with
from serve_app.app import build
print(build_with(build, {"replicas": 3})._bound_deployment.name)
try:
    build_with(build, {"replica": 3})
except ValueError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("ingress\n") and "did you mean replicas?" in answer.stdout


def test_the_ingress_and_the_builder_import_no_torch() -> None:
    code = "import serve_app.app, serve_app.ingress, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_drafters_ranks_meet_at_a_port_of_their_own() -> None:
    raw = {"topology": "staged", "engine": {"tensor_parallel": 2, "rendezvous_port": 18999}}
    config = AppConfig.model_validate(raw)
    assert (config.draft.engine.tensor_parallel, config.draft.engine.rendezvous_port) == (2, 0)
