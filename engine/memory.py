"""What a GPU's memory goes to: the arithmetic by which an engine sizes its page pool, and by which a plan foresees it.

Bytes throughout. Standard library only.
"""

import math

from engine.config import EngineConfig, ModelConfig, Sizes
from engine.shapes import PUBLISHED_RANK, adapter_shapes, expected_shapes, share

PAGE_SIZE = (
    64  # two programs of attention fit an SM; longer pages spill, shorter ones starve its matrix units
)
SPARE = 0.08  # of a GPU's memory, for what captured graphs and the allocator need
WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}


def spare_bytes(total: int) -> int:
    """What is left alone of a GPU with so much memory."""
    return int(SPARE * total)


def resident_bytes(config: EngineConfig, model: ModelConfig, ranks: int) -> int:
    """One rank's weights, with a draft adapter of the published rank, and its rotary tables."""
    shapes = expected_shapes(model) | adapter_shapes(model, PUBLISHED_RANK)
    weights: int = sum(
        math.prod(part.stop - part.start for part in share(name, shape, 0, ranks))
        for name, shape in shapes.items()
    )
    sizes = Sizes.of(config, model)
    rotary = (sizes.max_model_len + sizes.slack) * (2 * model.head_dim + 1)
    return (weights + rotary) * WIDTH[config.dtype]


def step_bytes(config: EngineConfig, model: ModelConfig, ranks: int = 1) -> int:
    """One rank's logits and activations of the largest step, and the tables of all rows."""
    sizes = Sizes.of(config, model)
    logits = 4 * config.max_batch_tokens * model.vocab_size
    if ranks > 1:
        logits *= 2  # gathered, and laid side by side
    shared = model.num_heads * model.head_dim + 3 * model.intermediate_size
    activations = config.max_batch_tokens * (shared // ranks + 6 * model.hidden_size) * WIDTH[config.dtype]
    tables = 8 * (config.max_running + 1) * (sizes.max_model_len + sizes.slack)
    return logits + activations + tables


def token_bytes(config: EngineConfig, model: ModelConfig, ranks: int = 1) -> int:
    """One rank's KV of a token."""
    return 2 * model.num_layers * (model.num_kv_heads // ranks) * model.head_dim * WIDTH[config.dtype]


def pool_tokens(free: int, total: int, config: EngineConfig, model: ModelConfig, ranks: int = 1) -> int:
    """The tokens of a rank's page pool, in whole pages, on a GPU with `total` bytes of which `free` are left once the
    weights are there; 0 if there is no room."""
    room = free - spare_bytes(total) - step_bytes(config, model, ranks)
    pages = room // token_bytes(config, model, ranks) // config.page_size
    return max(0, pages) * config.page_size
