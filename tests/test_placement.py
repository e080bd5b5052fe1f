"""Where ranks go, on made-up clusters."""

import pytest

from cluster.placement import Node, PlacementError, place

CLIQUE, DOMAIN = "nvidia.com/gpu.clique", "ray.io/gpu-domain"


def trays(count: int, domain: str = "", label: str = DOMAIN) -> list[Node]:
    """Nodes of four GPUs and eight CPUs."""
    return [Node({label: domain} if domain else {}, {"GPU": 4, "CPU": 8})] * count


def test_ranks_that_fit_one_node_stand_on_one() -> None:
    placement = place(4, {"GPU": 1}, trays(2, "a"))
    assert placement.bundles == [{"GPU": 1}] * 4
    assert (placement.strategy, placement.topology) == ("STRICT_PACK", {})


@pytest.mark.parametrize("label", [DOMAIN, CLIQUE])
def test_more_ranks_than_a_node_holds_stand_in_one_domain(label: str) -> None:
    placement = place(8, {"GPU": 1}, trays(1, "a", label) + trays(2, "b", label))
    assert placement.topology == {label: "STRICT_PACK", "ray.io/node-id": "PACK"}
    assert placement.strategy == ""


def test_rays_own_label_comes_first_and_the_device_plugins_serves_where_it_does_not() -> None:
    both = [Node({DOMAIN: "a", CLIQUE: "x"}, {"GPU": 4})] * 2
    assert DOMAIN in (place(8, {"GPU": 1}, both).topology)
    split = [Node({DOMAIN: str(i), CLIQUE: "x"}, {"GPU": 4}) for i in range(2)]
    assert CLIQUE in (place(8, {"GPU": 1}, split).topology)


def test_every_resource_of_a_bundle_counts() -> None:
    with pytest.raises(PlacementError, match="2 ranks of 1 GPU and 5 CPU each .* has room for 1"):
        place(2, {"GPU": 1, "CPU": 5}, trays(1))


def test_domains_are_not_mixed_and_the_refusal_names_the_largest() -> None:
    with pytest.raises(PlacementError) as refusal:
        place(12, {"GPU": 1}, trays(2, "a") + trays(1, "b"))
    assert str(refusal.value) == (
        "tensor_parallel: 12 ranks of 1 GPU each must stand in one node or one NVLink domain; of 3 nodes the largest "
        "has room for 4, and the largest domain, ray.io/gpu-domain=a, for 8"
    )


def test_nodes_without_a_label_share_no_domain() -> None:
    with pytest.raises(
        PlacementError, match="no node has a label ray.io/gpu-domain or nvidia.com/gpu.clique"
    ):
        place(8, {"GPU": 1}, trays(4))


def test_an_empty_cluster_has_room_for_nothing() -> None:
    with pytest.raises(PlacementError, match="of 0 nodes the largest has room for 0"):
        place(1, {"CPU": 0.5}, [])
