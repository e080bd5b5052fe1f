"""The process that owns the cluster of a chaos test: Ray nodes on one machine, Serve and the application.

Run as a program by `chaos.ChaosCluster`. It is a process of its own because Ray reads its environment when it is
imported, and because whatever ends it also ends all that it has started. It reads commands, a line each, and answers
each with a line of JSON; it ends with its standard input.
"""

import json
import logging
import os
import sys
from typing import Any

from serve_app.config import AppConfig
from serve_app.local_server import OBJECT_STORE_BYTES, LocalServer
from serve_app.supervisor import supervise


class ClusterServer(LocalServer):
    """A server on a cluster of several nodes, with so many processors each as `cpus` says, head first."""

    def __init__(self, config: AppConfig, cpus: list[int]) -> None:
        super().__init__(config)
        self._cpus = cpus

    def _start_ray(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        logging.getLogger("ray").setLevel(logging.ERROR)
        head, *others = self._cpus
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            },
        )
        for cpus in others:
            self.add_node(cpus)
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def _start_serve(self) -> None:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        server = self.config.server
        # All nodes have one address here, so that there is room for one proxy only.
        serve.start(http_options={"host": server.host, "port": server.port, "location": "HeadOnly"})

    def add_node(self, cpus: int) -> None:
        self._cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES)

    def replicas(self) -> list[dict[str, Any]]:
        """What Serve's controller knows of every replica."""
        from ray.serve.context import _get_global_client

        client = _get_global_client()
        details = {} if client is None else client.get_serve_details()
        return [
            {"role": role, "id": replica["replica_id"], "pid": replica.get("pid"), "state": replica["state"]}
            for application in details.get("applications", {}).values()
            for role, deployment in application["deployments"].items()
            for replica in deployment["replicas"]
        ]


def host(raw: str, cpus: list[int]) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray and its workers have to say is no answer
    server = ClusterServer(AppConfig.model_validate_json(raw), cpus)
    server.start()
    print(json.dumps(server.phases), file=answers, flush=True)
    for line in sys.stdin:
        answer: Any = None
        try:
            if line.strip() == "add_node":
                server.add_node(cpus[-1])
            elif line.strip() == "replicas":
                answer = server.replicas()
        except Exception as error:  # a controller that is down, above all: for the test to judge
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(supervise(lambda: host(sys.argv[1], json.loads(sys.argv[2]))))
