"""The Ray Serve application: the only place where its deployments are put together.

Without `from __future__ import annotations`: it would hide the type of `args` from Serve, which would then pass the raw
mapping instead of a validated AppConfig.
"""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

import cluster.routing
from engine.config import EngineConfig
from serve_app.config import AppConfig, logging_config
from serve_app.engine_replica import EngineReplica
from serve_app.ingress import Ingress
from serve_app.stages import DraftStage, VerifyStage

NAME = "triserve"
ROUTER: Any = cluster.routing.FreshRouter  # Serve takes a class here, whatever its annotation says
INGRESS_ONGOING = 4096  # requests that one ingress replica follows at a time


def build(args: AppConfig) -> Application:
    """The application for a configuration: an ingress in front of the engine's replicas; staged, with a pool of
    drafters behind them."""
    common: dict[str, Any] = {
        "logging_config": logging_config(args),
        "health_check_period_s": args.serve.health_check_seconds,
        "health_check_timeout_s": args.serve.heartbeat_seconds,  # three in a row end a replica
        "graceful_shutdown_timeout_s": args.serve.drain_seconds,
    }
    staged = args.topology == "staged"
    engine = serve.deployment(
        name="engine",
        num_replicas=args.replicas,
        max_ongoing_requests=args.serve.max_ongoing_requests,
        max_queued_requests=args.serve.max_queued_requests,
        ray_actor_options=_resources(args.engine),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **common,
    )(VerifyStage if staged else EngineReplica)
    per_node = args.server.ingress_per_node
    spread: dict[str, Any] = {"max_replicas_per_node": per_node} if per_node else {}
    ingress = serve.deployment(
        name="ingress",
        num_replicas=args.server.ingress_replicas,
        **spread,
        max_ongoing_requests=INGRESS_ONGOING,
        ray_actor_options={"num_cpus": 0},
        **common,
    )(Ingress)
    of_engine = (args.effective_engine, args.serve.heartbeat_seconds, args.serve.stuck_seconds)
    if not staged:
        return ingress.bind(args, engine.bind(*of_engine))
    draft = serve.deployment(
        name="draft",
        num_replicas=args.draft.replicas,
        ray_actor_options=_resources(args.draft.engine),
        **common,
    )(DraftStage)
    drafts = draft.bind(args.draft.engine, args.serve.stuck_seconds)
    verify = engine.bind(*of_engine, drafts, args.draft.patience_seconds, args.draft_canvases)
    return ingress.bind(args, verify)


def _resources(engine: EngineConfig) -> dict[str, Any]:
    # ranks have GPUs of their own, which the replica asks for itself
    gpus = 1 if engine.device.startswith("cuda") and engine.tensor_parallel == 1 else 0
    return {"num_cpus": 1, "num_gpus": gpus}
