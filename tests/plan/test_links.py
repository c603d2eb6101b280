"""What devices send, by hand: within a TPU slice, a GPU node, and across nodes."""

import pytest

from rlhfjax.plan import estimate, links
from rlhfjax.plan.chips import CHIPS, Work
from rlhfjax.plan.memory import parameters
from rlhfjax.strategy import AXES
from tests.plan.test_estimate import MODEL, an_sft


def axes(**sizes):
    return {**dict.fromkeys(AXES, 1), **sizes}


@pytest.mark.parametrize(
    ("sizes", "axis", "expected"),
    [
        ({"fsdp": 8}, "fsdp", (8, 1)),
        ({"fsdp": 64}, "fsdp", (8, 8)),
        ({"fsdp": 8, "tensor": 4}, "fsdp", (2, 4)),  # tensor takes half of a node
        ({"fsdp": 8, "tensor": 4}, "tensor", (4, 1)),
        ({"data": 4, "fsdp": 8}, "data", (1, 4)),
        ({"tensor": 16}, "tensor", (8, 2)),
    ],
)
def test_axes_and_nodes(sizes, axis, expected):
    assert links.span(axis, axes(**sizes), node=8) == expected


def test_all_that_is_sent_arrives():
    """Of 64 parts, 8 devices of a node receive the 56 of other nodes, 7 each, and share them."""
    sent = links.gather(64.0, "fsdp", axes(fsdp=64), node=8)
    assert sent == Work(ici_bytes=56.0, dcn_bytes=7.0)
    assert links.gather(64.0, "fsdp", axes(fsdp=8), node=8) == Work(ici_bytes=56.0)
    assert links.gather(64.0, "fsdp", axes(fsdp=64)) == Work(ici_bytes=63.0)  # a slice
    assert links.gather(64.0, "replica", axes(replica=4)) == Work(dcn_bytes=48.0)


def test_a_node_boundary_bounds_the_step():
    """Gradients of 1.3B in float32, all-reduced over 8 nodes of one GPU each: 25 GB/s a GPU."""
    n, a100 = parameters(MODEL), CHIPS["a100-80gb"]
    across = estimate.estimate(an_sft(batch_size=64), axes(data=64), a100)
    # within a node 7/8 of 2 x 4 n bytes, across nodes 7/8 of an eighth
    flops = 64 * 2048 * (6 * n + 12 * 24 * 16 * 128 * 2048) * 4 / 3 / 64
    network = 2 * 4 * n * 7 / 8 / 8 / 25e9
    assert across.seconds == pytest.approx(max(flops / 312e12, network))
    alone = estimate.estimate(an_sft(batch_size=64), axes(data=8, fsdp=8), a100)
    # fsdp within the nodes: all-gathers are on NVLink, an eighth of the gradients crosses
    assert alone.seconds == pytest.approx(max(flops / 312e12, n * 8 * 7 / 8 / 300e9))
