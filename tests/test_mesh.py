"""Meshes and rules: logical names to shardings, and every way to get them wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import AXES, DEFAULT_RULES, MeshConfig, constrain, make_layout
from rlhfjax.stages import config_class


def sizes(layout) -> dict[str, int]:
    return {axis: n for axis, n in layout.mesh.shape.items() if n > 1}


def test_minus_one_takes_what_is_left():
    # An axis `expert` is there only if several devices lie along it.
    assert (*make_layout().mesh.axis_names, "expert") == AXES
    assert sizes(make_layout()) == {"data": 4}
    assert sizes(make_layout(MeshConfig(data=1, fsdp=-1))) == {"fsdp": 4}
    assert sizes(make_layout(MeshConfig(fsdp=2))) == {"data": 2, "fsdp": 2}
    assert sizes(make_layout(MeshConfig(data=1, fsdp=2, tensor=-1))) == {
        "fsdp": 2,
        "tensor": 2,
    }
    assert sizes(make_layout(devices=jax.devices()[:1])) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": 3}, "does not fit the 4 devices"),
        ({"data": 8}, "does not fit the 4 devices"),
        ({"data": 2}, "does not fit the 4 devices"),  # two would stand idle
        ({"fsdp": 3}, "does not fit the 4 devices"),
        ({"data": -1, "fsdp": -1}, "at most one size is -1"),
        (
            {"rules": {"embed": 0}},
            "mesh.rules.embed=0: expected a mesh axis, several or None",
        ),
        (
            {"rules": {"embed": ""}},
            "mesh.rules.embed: unknown mesh axes ['']; known: replica",
        ),
        (
            {"rules": {"bogus": "data"}},
            "mesh.rules.bogus: unknown logical axis; known: batch",
        ),
        (
            {"rules": {"embed": ("data", "bogus")}},
            "mesh.rules.embed: unknown mesh axes ['bogus']; known: replica",
        ),
    ],
)
def test_a_mesh_that_cannot_be(options, said):
    with pytest.raises(ConfigError) as caught:
        make_layout(MeshConfig(**options))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["mesh", "rollout_mesh", "frozen_mesh"])
def test_rules_that_name_no_axis_are_refused_with_the_config(name):
    """Whatever mesh of a stage it is, and before there are devices."""
    cls = config_class("ppo")
    needed = {"init_from": "x", "reward": "x", "steps": 1, "batch_size": 4}
    needed |= {"prompt_length": 4, "max_new_tokens": 4}
    build(cls, needed | {name: {"rules": {"embed": None, "vocab": ["tensor"]}}})
    for rules, said in (
        (
            {"bogus": "data"},
            "mesh.rules.bogus: unknown logical axis; known: batch, embed",
        ),
        (
            {"embed": ["fsdp", "x"]},
            "unknown mesh axes ['x']; known: replica, data, fsdp",
        ),
        ({"embed": 3}, "mesh.rules.embed=3: expected a mesh axis, several or None"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(cls, needed | {name: {"rules": rules}})
        assert said in str(caught.value)


def test_rules_lay_names_over_axes():
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2))
    assert layout.spec(("embed", "mlp")) == P("fsdp", "tensor")
    assert layout.spec(("heads", None, "embed")) == P("tensor", None, "fsdp")
    assert layout.spec(("layers", "positions")) == P(None, None)
    assert make_layout(devices=jax.devices()[:1]).spec(("embed", "mlp")) in (
        P(None, None),
        P(),
    )


def test_an_axis_shards_one_dimension_only_the_first_that_asks():
    """An activation's batch takes fsdp, so its embed is whole; a parameter's is sharded."""
    layout = make_layout(MeshConfig(data=2, fsdp=2))
    assert layout.spec(("batch", "time", "embed")) == P(
        ("replica", "data", "fsdp"), None, None
    )
    assert layout.spec(("embed", "embed")) == P("fsdp", None)


def test_rules_can_be_overridden_and_switched_off():
    layout = make_layout(
        MeshConfig(
            data=1, fsdp=2, tensor=2, rules={"vocab": ("tensor", "fsdp"), "embed": None}
        )
    )
    assert layout.spec(("vocab", "embed")) == P(("tensor", "fsdp"), None)
    assert layout.rules["mlp"] == DEFAULT_RULES["mlp"]


def test_wrong_names_and_sizes_are_named():
    layout = make_layout(MeshConfig(data=1, fsdp=4))
    with pytest.raises(
        ConfigError, match="logical axis 'bogus' is not in the mesh rules: batch"
    ):
        layout.spec(("bogus",))
    with pytest.raises(
        ConfigError,
        match=r"axis 'embed' of size 6 is not divisible by the 4 devices of mesh axes",
    ):
        layout.spec(("embed", "mlp"), (6, 8))
    assert layout.spec(("embed", "mlp"), (8, 6)) == P(
        "fsdp", None
    )  # tensor has one device: 6 may stay whole


def test_batches_are_shared_by_the_data_like_axes():
    layout = make_layout(MeshConfig(data=2, fsdp=2))
    assert layout.batch_shards == 4
    layout.validate_batch(8)
    with pytest.raises(
        ConfigError,
        match=r"ppo\.batch_size=6 is not divisible by the 4 devices .*replica, data, fsdp",
    ):
        layout.validate_batch(6, "ppo.batch_size")
    placed = layout.put({"x": np.arange(8.0).reshape(8, 1)})["x"]
    assert [s.data.ravel().tolist() for s in placed.addressable_shards] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    np.testing.assert_array_equal(placed, np.arange(8.0).reshape(8, 1))
    again = layout.put_rows(placed)
    assert again is placed
    assert (
        layout.put_rows(np.arange(8.0)).sharding.spec == layout.sharding("batch").spec
    )


@pytest.mark.parametrize(
    ("axes", "first", "last"),
    [
        ({"data": 4}, [0], [2, 3]),
        ({"data": 2, "fsdp": 2}, [0], [2, 3]),
        ({"data": 2, "tensor": 2}, [0, 1], [2, 3]),  # two devices with the same rows
        (
            {"data": 1, "tensor": 4},
            [0, 1, 2, 3],
            [0, 1, 2, 3],
        ),  # `tensor` spans the hosts: all have all rows
    ],
)
def test_a_hosts_own_parts_of_a_batch_are_those_with_rows_on_its_devices(
    axes, first, last, monkeypatch
):
    """A host has the first device, the last two, or two that are not neighbors (TPU slices)."""
    layout = make_layout(MeshConfig(**axes))
    assert layout.own_parts(8, 4) == (0, 1, 2, 3)

    def of_host(devices, parts):
        def held(sharding, shape):
            return {
                d: index
                for d, index in sharding.devices_indices_map(shape).items()
                if d in devices
            }

        with monkeypatch.context() as patch:
            patch.setattr(NamedSharding, "addressable_devices_indices_map", held)
            return list(layout.own_parts(8, parts))

    devices = layout.mesh.devices.ravel().tolist()
    assert of_host(devices[:1], 4) == first and of_host(devices[-2:], 4) == last
    assert of_host(devices[:1], 1) == [0]
    if axes == {"data": 4}:
        assert of_host([devices[0], devices[3]], 4) == [0, 3]
        assert of_host([devices[0], devices[3]], 8) == [0, 1, 6, 7]
        assert of_host([devices[1]], 2) == [0]  # a part that two devices share


def test_tensor_parallel_devices_share_a_batch():
    assert make_layout(MeshConfig(data=1, fsdp=2, tensor=2)).batch_shards == 2


def test_constrain_places_within_a_layout_and_is_nothing_outside_of_one():
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2))
    x = jnp.ones((4, 8))
    assert constrain(x, ("batch", "mlp")) is x
    with layout.use():
        inside = jax.jit(lambda x: constrain(x * 2, ("batch", "mlp")))(x)
        with pytest.raises(ConfigError, match="bogus"):
            constrain(x, ("batch", "bogus"))
    assert inside.addressable_shards[0].data.shape == (2, 4)
    assert constrain(x, ("batch", "bogus")) is x
    one = make_layout(devices=jax.devices()[:1])
    with one.use():
        assert constrain(x, ("batch", "mlp")) is x


# ------------------------------------------------------------------ slices


class Chip:
    """A stand-in for a TPU of one of several slices."""

    __class__ = jax.Device  # what a checked annotation asks for
    platform, device_kind, process_index = "cpu", "stand-in", 0

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


@pytest.mark.parametrize("replica", [2, 4])
def test_replica_alone_lies_across_slices(replica):
    """Two slices of four, named in turn: a replica is in one slice, and every slice has as many."""
    chips = [Chip(i, i % 2) for i in range(8)]
    mesh = make_layout(MeshConfig(replica=replica, data=1, fsdp=-1), chips).mesh
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices).reshape(
        replica, -1
    )
    assert slices.tolist() == [
        [row * 2 // replica] * (8 // replica) for row in range(replica)
    ]
    assert {chip.id for chip in mesh.devices.flat} == set(range(8))


def test_replica_is_a_multiple_of_the_slices():
    with pytest.raises(
        ConfigError, match=r"mesh\.replica=1: the devices are in 2 slices"
    ):
        make_layout(MeshConfig(), [Chip(i, i % 2) for i in range(4)])
    one_slice = make_layout(MeshConfig(), [Chip(i, 3) for i in range(4)])
    assert one_slice.mesh.shape["data"] == 4
