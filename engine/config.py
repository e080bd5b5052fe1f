"""Plain settings of the engine: the checkpoint's geometry, the engine's sizes, and what one request may ask for.

Standard library only, so that reading a configuration costs no torch. The application's pydantic model nests these
very classes.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

MODES = ("ar", "diffusion", "linear_spec", "quadratic_spec")
ModeName = Literal["ar", "diffusion", "linear_spec", "quadratic_spec"]
ModeChoice = Literal["auto", "ar", "diffusion", "linear_spec", "quadratic_spec"]
BLOCK_LENGTHS = (4, 8, 16, 32)
ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "max_position_embeddings",
             "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta"}  # fmt: skip


class CheckpointError(ValueError):
    """The checkpoint folder cannot be served; the message names what is wrong with it."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """YaRN rotary embedding with llama-4 query scaling.

    `attention_factor` multiplies cos and sin; `query_scaling_beta` scales the query at position p by
    `1 + beta * log(1 + floor(p / original_max_position))`.
    """

    theta: float
    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    query_scaling_beta: float

    @staticmethod
    def from_dict(rope: dict[str, Any]) -> "RopeConfig":
        if rope.get("rope_type") != "yarn":
            raise CheckpointError(f"rope_parameters.rope_type must be 'yarn', not {rope.get('rope_type')!r}")
        if unknown := rope.keys() - ROPE_KEYS:
            raise CheckpointError(f"rope_parameters has keys that nothing here reads: {sorted(unknown)}")
        factor = float(rope["factor"])

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        return RopeConfig(
            theta=float(rope["rope_theta"]),
            factor=factor,
            original_max_position=int(rope["original_max_position_embeddings"]),
            beta_fast=float(rope["beta_fast"]),
            beta_slow=float(rope["beta_slow"]),
            attention_factor=mscale(float(rope["mscale"])) / mscale(float(rope["mscale_all_dim"])),
            query_scaling_beta=float(rope["llama_4_scaling_beta"]),
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Geometry and special ids of an NLD checkpoint. Nothing here has a default: a wrong mask id is silent garbage."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    block_length: int
    mask_id: int
    bos_id: int
    eos_ids: tuple[int, ...]
    rope: RopeConfig

    def share(self, ranks: int) -> "ModelConfig":
        """The geometry of what one of `ranks` ranks computes by itself: its heads and its part of the MLP."""
        return replace(
            self,
            num_heads=self.num_heads // ranks,
            num_kv_heads=self.num_kv_heads // ranks,
            intermediate_size=self.intermediate_size // ranks,
        )

    @staticmethod
    def from_json(path: Path) -> "ModelConfig":
        """Reads a checkpoint's config.json. Raises CheckpointError naming the key that is missing or unsupported."""
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                 "sliding_window": None, "model_type": "nemotron_labs_diffusion"}  # fmt: skip
        try:
            for key, wanted in fixed.items():
                if raw[key] != wanted:
                    raise CheckpointError(f"{path}: {key} must be {wanted!r}, not {raw[key]!r}")
            eos = raw["eos_token_id"]
            config = ModelConfig(
                vocab_size=int(raw["vocab_size"]),
                hidden_size=int(raw["hidden_size"]),
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=int(raw["num_attention_heads"]),
                num_kv_heads=int(raw["num_key_value_heads"]),
                head_dim=int(raw["head_dim"]),
                rms_norm_eps=float(raw["rms_norm_eps"]),
                max_position=int(raw["max_position_embeddings"]),
                block_length=int(raw["block_size"]),
                mask_id=int(raw["mask_token_id"]),
                bos_id=int(raw["bos_token_id"]),
                eos_ids=tuple(int(i) for i in eos) if isinstance(eos, list) else (int(eos),),
                rope=RopeConfig.from_dict(raw["rope_parameters"]),
            )
            counts = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers,
                      config.num_heads, config.num_kv_heads, config.head_dim, config.max_position,
                      config.block_length - 1, config.rope.original_max_position)  # fmt: skip
            sizes = (config.rms_norm_eps, config.rope.theta, config.rope.factor)
            if min(counts) < 1 or not all(0 < size < math.inf for size in sizes):
                raise CheckpointError(f"{path}: the geometry has a value that is not positive")
            if not all(0 <= token < config.vocab_size for token in (config.bos_id, *config.eos_ids)):
                raise CheckpointError(f"{path}: a special token is not in the vocabulary")
            if config.num_heads % config.num_kv_heads or not 0 <= config.mask_id < config.vocab_size:
                raise CheckpointError(f"{path}: the head counts or the mask id do not fit the geometry")
            return config
        except KeyError as error:
            raise CheckpointError(f"{path}: key {error} is missing") from error
        except CheckpointError:
            raise
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{path}: a value cannot be used: {error}") from error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy; filters apply in the order top_k, top_p, min_p."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """Refinement budget of diffusion mode: `steps` caps the passes of a canvas (0: no cap)."""

    threshold: float = 0.9
    steps: int = 0
    block_length: int = 0  # 0: the engine's default


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine. Lengths are in tokens."""

    checkpoint: str = str(Path(__file__).parent / "tiny" / "checkpoint")  # a folder, or org/name@commit
    load_format: Literal["safetensors", "dummy"] = "safetensors"  # dummy: random weights, for benchmarks
    weights: Literal["checkpoint", "fp8"] = (
        "checkpoint"  # fp8 may only draft: its text is not the checkpoint's
    )
    device: str = "cpu"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    tensor_parallel: int = 1  # ranks that share one model, each a GPU or a process of its own
    rendezvous_port: int = 0  # where its ranks find each other, on the engine's node; 0: any that is free
    rendezvous_seconds: float = 120.0  # until all ranks have found each other
    placement_seconds: float = 300.0  # until a cluster has room for all ranks
    threads: int = 1  # torch threads; more than one pays only on idle cores
    page_size: int = 16
    kv_tokens: int = 32768  # the page pool, in tokens; 0: as many as a GPU has memory for
    max_running: int = 16
    max_batch_tokens: int = 512  # query tokens in one step
    max_model_len: int = 0  # prompt + answer; 0: the checkpoint's
    block_length: int = 0  # of linear self-speculation and diffusion; 0: the checkpoint's
    quadratic_block_length: int = 8
    ridge_tokens: int = 64  # query tokens per step up to which drafting is nearly free, so that `auto` drafts
    draft_lora: bool = True  # draft with the checkpoint's adapter, where it has one
    exact: bool = (
        False  # on a GPU: a token's logits are the same to the bit in AR, verification and every batch
    )
    lag: Literal[0, 1] = 0  # steps by which the host reads results late
    prefix_cache: bool = True  # keep the pages of texts, for others that begin the same
    cost_file: str = ""  # where measured step costs are kept; "": measured at every start
    default_mode: ModeChoice = "auto"
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What follows from an engine's settings and its model's geometry, in tokens."""

    block_length: int  # where nobody asks for another
    segment_tokens: int  # of the longest segment of any mode
    slack: int  # behind prompt and answer, what segments may write
    max_model_len: int  # prompt and answer together

    @staticmethod
    def of(config: EngineConfig, model: ModelConfig) -> "Sizes":
        """Raises ValueError for settings under which no request could run."""
        block_length, quadratic = config.block_length or model.block_length, config.quadratic_block_length
        segment_tokens = max(block_length, quadratic * (quadratic + 1))
        # a host that lags plans from a context that a whole block may since have been added to
        slack = segment_tokens + 1 + config.lag * max(block_length, quadratic)
        longest = min(config.max_model_len or model.max_position, model.max_position)
        held = config.kv_tokens - slack - config.page_size if config.kv_tokens else longest
        max_model_len = min(longest, held)
        if quadratic < 2:
            raise ValueError(f"quadratic_block_length must be at least 2, not {quadratic}")
        if config.diffusion.block_length > block_length:
            raise ValueError(f"diffusion.block_length must be at most block_length, {block_length}")
        if max_model_len < 2:
            raise ValueError(f"kv_tokens must be above {slack + config.page_size + 2}, to hold any request")
        if config.max_batch_tokens * 3 // 4 < segment_tokens:
            raise ValueError(
                f"max_batch_tokens must be at least {-(-segment_tokens * 4 // 3)}, to hold any segment"
            )
        return Sizes(block_length, segment_tokens, slack, max_model_len)
