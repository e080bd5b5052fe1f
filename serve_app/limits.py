"""Every bound on a number or a length that comes from outside: requests first, then the configuration."""

KIB = 1024
MIB = 1024 * KIB

# Requests. Bodies are bounded by the configuration (`server.max_body_bytes`), tokens by the model's context.
CHOICES = 8  # n
PROMPTS = 32  # prompts of one completion request
MESSAGES = 4096
PARTS = 1024  # text parts of one message
STOPS = 4
STOP_CHARACTERS = 256
STOP_TOKEN_IDS = 64
NAME_CHARACTERS = 256  # model names, request ids
TEMPERATURE = 2.0
MAX_TOKENS = 2**31 - 1
TOP_K = 2**31 - 1
SEED_BITS = 63
DENOISE_STEPS = 1024
TOKEN_ID = 2**31 - 1

# What an error may cost to report.
ERROR_CHARACTERS = 1000
NAMED_PARAMS = 16
INLINE_SIZE = 16 * KIB  # bodies and texts up to here are handled on the event loop

# Configuration: (least, most) of a number, by its place in AppConfig.
CONFIG: dict[str, tuple[float, float]] = {
    "replicas": (1, 1024),
    "engine.tensor_parallel": (1, 64),
    "engine.rendezvous_port": (0, 65535),
    "engine.rendezvous_seconds": (1, 24 * 3600),
    "engine.placement_seconds": (1, 24 * 3600),
    "engine.threads": (1, 256),
    "engine.page_size": (1, 1024),
    "engine.kv_tokens": (0, 2**40),
    "engine.max_running": (1, 4096),
    "engine.max_batch_tokens": (1, 2**20),
    "engine.max_model_len": (0, 2**24),
    "engine.quadratic_block_length": (2, 32),
    "engine.ridge_tokens": (0, 2**20),
    "engine.diffusion.threshold": (0, 1),
    "engine.diffusion.steps": (0, DENOISE_STEPS),
    "draft.replicas": (1, 1024),
    "draft.patience_seconds": (0.001, 60),
    "server.port": (1, 65535),
    "server.ingress_replicas": (1, 256),
    "server.ingress_per_node": (0, 100),
    "server.max_body_bytes": (KIB, 256 * MIB),
    "server.default_max_tokens": (1, MAX_TOKENS),
    "server.stream_interval_seconds": (0, 10),
    "server.whole_interval_seconds": (0, 10),
    "server.keep_alive_seconds": (0.05, 3600),
    "serve.max_ongoing_requests": (1, 10**6),
    "serve.max_queued_requests": (1, 10**6),
    "serve.health_check_seconds": (0.1, 600),
    "serve.heartbeat_seconds": (0.5, 600),
    "serve.stuck_seconds": (1, 24 * 3600),
    "serve.start_seconds": (1, 24 * 3600),
    "serve.drain_seconds": (0, 24 * 3600),
    "serve.stats_port": (1, 65535),
    "serve.metrics_port": (1, 65535),
}
CONFIG |= {f"draft.{place}": bounds for place, bounds in CONFIG.items() if place.startswith("engine.")}

# `triserve plan`: (least, most) of an option. As many one-GPU replicas as this allows are as many as may be configured.
PLAN = {
    "nodes": (1, 128),
    "gpus-per-node": (1, 8),
    "tp": (1, 64),
    "context": (1, 2**24),
    "max-running": (1, 4096),
}
