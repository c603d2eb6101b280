"""Strategies: their sizes and rules, and what `auto` picks, by hand.

What it counts of a stage is in test_footprint.py.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from rlhfjax import strategy
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.strategy import GIB, Need, choose


def sizes(**config) -> dict[str, int]:
    return {
        axis: n
        for axis, n in make_layout(MeshConfig(**config)).mesh.shape.items()
        if n > 1
    }


def test_a_strategy_completes_the_sizes():
    assert sizes(strategy="data") == {"data": 4}
    assert sizes(strategy="fsdp") == {"fsdp": 4}
    assert sizes(strategy="fsdp", fsdp=2) == {"data": 2, "fsdp": 2}
    assert sizes(strategy="fsdp_tensor", tensor=2) == {"fsdp": 2, "tensor": 2}
    assert sizes(strategy="fsdp_tensor", data=1, tensor=4) == {"tensor": 4}
    assert sizes(strategy="context", sequence=2) == {"fsdp": 2, "sequence": 2}
    assert sizes(strategy="hsdp", replica=2) == {"replica": 2, "fsdp": 2}
    nothing = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert strategy.sizes("hsdp", nothing, slices=2) == nothing | {
        "replica": 2,
        "data": 1,
        "fsdp": -1,
    }


def test_a_strategy_has_its_own_rules():
    """For a parameter [embed, mlp] and an activation [batch, time, embed], with overrides."""
    kernel, hidden = ("embed", "mlp"), ("batch", "time", "embed")
    assert make_layout(MeshConfig(strategy="data")).spec(kernel) == P(None, None)
    assert make_layout(MeshConfig(strategy="fsdp")).spec(kernel) == P("fsdp", None)
    assert make_layout(MeshConfig(strategy="fsdp_tensor", tensor=2)).spec(kernel) == P(
        "fsdp", "tensor"
    )
    assert (
        make_layout(MeshConfig(strategy="context", sequence=2)).spec(hidden)[1]
        == "sequence"
    )
    hsdp = make_layout(MeshConfig(strategy="hsdp", replica=2))
    assert (hsdp.spec(kernel), hsdp.spec(hidden)[0]) == (
        P("fsdp", None),
        ("replica", "data", "fsdp"),
    )
    assert make_layout(MeshConfig(strategy="fsdp", rules={"embed": None})).spec(
        kernel
    ) == P(None, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"strategy": "zero"},
            "mesh.strategy='zero' is unknown: accepted are given, data, fsdp",
        ),
        (
            {"strategy": "data", "fsdp": 2},
            "mesh.fsdp=2: strategy 'data' has replica, data",
        ),
        (
            {"strategy": "fsdp", "tensor": 2},
            "mesh.tensor=2: strategy 'fsdp' has data, fsdp",
        ),
        (
            {"strategy": "fsdp_tensor"},
            "mesh.strategy='fsdp_tensor' needs mesh.tensor above 1",
        ),
        ({"strategy": "context", "tensor": 2}, "needs mesh.sequence above 1"),
        ({"strategy": "hsdp"}, "mesh.strategy='hsdp' needs mesh.replica above 1"),
        ({"strategy": "fsdp", "fsdp": 3}, "does not fit the 4 devices"),
        (
            {"strategy": "auto", "tensor": 2},
            "mesh.strategy='auto' chooses the sizes itself",
        ),
    ],
)
def test_a_strategy_that_cannot_be(config, message):
    with pytest.raises(ConfigError) as caught:
        make_layout(MeshConfig(**config))
    assert message in str(caught.value)


# 18 GB of state (10^9 trained parameters at 16 bytes, half as many frozen ones at 4), 16.8 GiB, of
# which a device has a part; a quarter of a GiB of activations per row, which all devices share.
def split_bytes(sizes, *, state=16e9 + 2e9, row=0.25 * GIB, rows=16):
    """Returns bytes per device."""
    return state / (sizes["fsdp"] * sizes["tensor"]) + rows * row / math.prod(
        sizes.values()
    )


BIG = Need(
    trained=10**9,
    frozen=5 * 10**8,
    rows=16,
    time=1024,
    widths=(2048,),
    splits=(16, 8, 8192, 50304),
    device_bytes=split_bytes,
)


def picked(need, devices, memory, slices=1):
    choice = choose(need, devices, memory * GIB, slices)
    return (
        choice.strategy,
        {axis: n for axis, n in choice.sizes.items() if n > 1},
        choice.fits,
    )


def test_auto_takes_what_says_least_and_fits():
    """16.8 GiB of state; 8 devices with 2 of 16 rows each: 0.5 GiB of activations."""
    assert picked(BIG, 8, 32) == ("data", {"data": 8}, True)
    assert picked(BIG, 8, 19) == (
        "fsdp",
        {"fsdp": 8},
        True,
    )  # 17.3 GiB is more than 0.9 of 19
    assert picked(BIG, 8, 2.9) == ("fsdp", {"fsdp": 8}, True)  # 2.1 + 0.5
    assert picked(BIG, 32, 2.9) == (
        "fsdp_tensor",
        {"fsdp": 16, "tensor": 2},
        True,
    )  # 16 rows are not for 32
    assert picked(BIG, 16, 8, slices=2) == ("hsdp", {"replica": 2, "fsdp": 8}, True)
    # 2 rows and heads for nobody: only time is left
    few = Need(
        trained=10**9,
        rows=2,
        time=1024,
        widths=(2048,),
        splits=(3,),
        device_bytes=functools.partial(split_bytes, state=16e9, row=8 * GIB, rows=2),
    )
    assert picked(few, 8, 12) == ("context", {"fsdp": 2, "sequence": 4}, True)
    thin = dataclasses.replace(
        BIG, widths=(2048, 12)
    )  # of two models, one that 8 devices do not divide
    assert picked(thin, 8, 19) == ("fsdp_tensor", {"fsdp": 4, "tensor": 2}, True)


def test_auto_says_why_and_what_does_not_fit():
    why = choose(BIG, 8, 19 * GIB).why
    assert (
        "fsdp (fsdp 8): 2.6 GiB per device of 19" in why
        and "too large, GiB: data: 17.3" in why
    )
    tight = choose(BIG, 8, GIB)
    assert not tight.fits and "nothing fits" in tight.why
    with pytest.raises(
        ConfigError, match="no mesh of 7 devices divides 16 rows of 1024 tokens"
    ):
        choose(BIG, 7, GIB)


def test_auto_of_a_mesh_is_logged(caplog):
    with caplog.at_level(logging.INFO, "rlhfjax"):
        layout = make_layout(MeshConfig(strategy="auto"), need=BIG, memory=19 * GIB)
    assert (
        dict(layout.mesh.shape)["fsdp"] == 4
        and "mesh.strategy=auto: fsdp (fsdp 4)" in caplog.text
    )
    assert dict(make_layout(MeshConfig(strategy="auto")).mesh.shape)["data"] == 4


SHARES = {
    "data": 1.0,
    "fsdp": 1 / 8,
    "fsdp_tensor": 1 / 8,
    "context": 1 / 4,
    "hsdp": 1 / 4,
}


@pytest.mark.nightly
def test_eight_devices_train_as_one(tmp_path):
    """Two steps of one model and of four, on the two strategies that have all axes together.

    docs/scaling.md has the whole table. Parameters and moments are sharded as the strategy says.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    chosen = ["--stages=sft,ppo", "--strategies=context,hsdp", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.strategies", *chosen],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cells) == 4
    for cell in cells:
        assert (
            cell["metrics"] < 1e-4 and cell["params"] < 1e-6 < 1e-2 * cell["moved"]
        ), cell
        assert cell["share"] == SHARES[cell["strategy"]], cell
