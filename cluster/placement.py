"""Where in a cluster the ranks of one model go: one node, or nodes of one NVLink domain. Pure functions.

Decides by what nodes have, not by what is free, since what is busy now may be free in time.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

# labels whose nodes reach each other's GPUs by NVLink: Ray's own name, then the one of NVIDIA's device plugin
DOMAIN_LABELS = ("ray.io/gpu-domain", "nvidia.com/gpu.clique")
NODE_LABEL = "ray.io/node-id"


class PlacementError(RuntimeError):
    """The cluster has no room for the ranks; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of a cluster has, free or not."""

    labels: Mapping[str, str]
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Placement:
    """One replica's Ray placement group: `strategy`, or else `topology`, says how its bundles lie."""

    bundles: list[dict[str, float]]
    strategy: str
    topology: dict[str, str]


def place(ranks: int, bundle: Mapping[str, float], nodes: Seq[Node]) -> Placement:
    """Places ranks that take a bundle each on one node if one is large enough, else in one NVLink domain. Raises
    PlacementError."""
    bundles = [dict(bundle) for _ in range(ranks)]
    largest = max((_ranks_on(node, bundle) for node in nodes), default=0)
    if largest >= ranks:
        return Placement(bundles, "STRICT_PACK", {})
    domains: dict[tuple[str, str], int] = {}
    for node in nodes:
        for label in DOMAIN_LABELS:
            if label in node.labels:
                domain = label, node.labels[label]
                domains[domain] = domains.get(domain, 0) + _ranks_on(node, bundle)
    for label in DOMAIN_LABELS:
        if any(of == label and count >= ranks for (of, _), count in domains.items()):
            return Placement(bundles, "", {label: "STRICT_PACK", NODE_LABEL: "PACK"})
    one = " and ".join(f"{amount:g} {resource}" for resource, amount in bundle.items())
    if domains:
        (label, value), count = max(domains.items(), key=lambda domain: domain[1])
        more = f"the largest domain, {label}={value}, for {count}"
    else:
        more = f"no node has a label {' or '.join(DOMAIN_LABELS)} that says which share a domain"
    raise PlacementError(
        f"tensor_parallel: {ranks} ranks of {one} each must stand in one node or one NVLink domain; of "
        f"{len(nodes)} nodes the largest has room for {largest}, and {more}"
    )


def _ranks_on(node: Node, bundle: Mapping[str, float]) -> int:
    return int(min(node.resources.get(resource, 0) // amount for resource, amount in bundle.items()))
