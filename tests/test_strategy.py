"""Strategies: their sizes and rules, what `auto` picks by arithmetic done by hand, and what it counts of a stage."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P
from rlhfjax.stages.parts.placing import need_of

from rlhfjax import recipe, strategy
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import TransformerConfig
from rlhfjax.strategy import GIB, Need, choose, device_bytes
from tests import tiny


def sizes(**config) -> dict[str, int]:
    return {axis: n for axis, n in make_layout(MeshConfig(**config)).mesh.shape.items() if n > 1}


def test_a_strategy_completes_the_sizes():
    assert sizes(strategy="data") == {"data": 4}
    assert sizes(strategy="fsdp") == {"fsdp": 4}
    assert sizes(strategy="fsdp", fsdp=2) == {"data": 2, "fsdp": 2}
    assert sizes(strategy="fsdp_tensor", tensor=2) == {"fsdp": 2, "tensor": 2}
    assert sizes(strategy="fsdp_tensor", data=1, tensor=4) == {"tensor": 4}
    assert sizes(strategy="context", sequence=2) == {"fsdp": 2, "sequence": 2}
    assert sizes(strategy="hsdp", replica=2) == {"replica": 2, "fsdp": 2}
    nothing = {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert strategy.sizes("hsdp", nothing, slices=2) == nothing | {"replica": 2, "data": 1, "fsdp": -1}


def test_a_strategy_has_its_own_rules():
    """A parameter [embed, mlp] and an activation [batch, time, embed]; overrides are laid over them."""
    kernel, hidden = ("embed", "mlp"), ("batch", "time", "embed")
    assert make_layout(MeshConfig(strategy="data")).spec(kernel) == P(None, None)
    assert make_layout(MeshConfig(strategy="fsdp")).spec(kernel) == P("fsdp", None)
    assert make_layout(MeshConfig(strategy="fsdp_tensor", tensor=2)).spec(kernel) == P("fsdp", "tensor")
    assert make_layout(MeshConfig(strategy="context", sequence=2)).spec(hidden)[1] == "sequence"
    hsdp = make_layout(MeshConfig(strategy="hsdp", replica=2))
    assert (hsdp.spec(kernel), hsdp.spec(hidden)[0]) == (P("fsdp", None), ("replica", "data", "fsdp"))
    assert make_layout(MeshConfig(strategy="fsdp", rules={"embed": None})).spec(kernel) == P(None, None)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"strategy": "zero"}, "mesh.strategy='zero' is unknown: accepted are given, data, fsdp"),
        ({"strategy": "data", "fsdp": 2}, "mesh.fsdp=2: strategy 'data' has replica, data"),
        ({"strategy": "fsdp", "tensor": 2}, "mesh.tensor=2: strategy 'fsdp' has data, fsdp"),
        ({"strategy": "fsdp_tensor"}, "mesh.strategy='fsdp_tensor' needs mesh.tensor above 1"),
        ({"strategy": "context", "tensor": 2}, "needs mesh.sequence above 1"),
        ({"strategy": "hsdp"}, "mesh.strategy='hsdp' needs mesh.replica above 1"),
        ({"strategy": "fsdp", "fsdp": 3}, "does not fit the 4 devices"),
        ({"strategy": "auto", "tensor": 2}, "mesh.strategy='auto' picks the sizes itself"),
    ],
)
def test_a_strategy_that_cannot_be(config, said):
    with pytest.raises(ConfigError) as caught:
        make_layout(MeshConfig(**config))
    assert said in str(caught.value)


# 10^9 parameters with Adam: 16 bytes each, 14.9 GiB; half as many frozen ones: 1.86 GiB.
BIG = Need(10**9, 5 * 10**8, 2, 16, 1024, 0.25 * GIB, 2048, (16, 8, 8192, 50304))


def picked(need, devices, memory, slices=1):
    choice = choose(need, devices, memory * GIB, slices)
    return choice.strategy, {axis: n for axis, n in choice.sizes.items() if n > 1}, choice.fits


def test_bytes_of_a_device_by_hand():
    alone = dict.fromkeys(strategy.AXES, 1)
    state = 16e9 + 2e9
    assert device_bytes(BIG, alone) == state + 16 * 0.25 * GIB
    split = alone | {"replica": 2, "fsdp": 4, "tensor": 2, "sequence": 2}
    assert device_bytes(BIG, split) == state / 8 + 16 * 0.25 * GIB / 32


def test_auto_takes_what_says_least_and_fits():
    """16.8 GiB of state; 8 devices with 2 of 16 rows each: 0.5 GiB of activations."""
    assert picked(BIG, 8, 32) == ("data", {"data": 8}, True)
    assert picked(BIG, 8, 19) == ("fsdp", {"fsdp": 8}, True)  # 17.3 GiB is more than 0.9 of 19
    assert picked(BIG, 8, 2.9) == ("fsdp", {"fsdp": 8}, True)  # 2.1 + 0.5
    assert picked(BIG, 32, 2.9) == ("fsdp_tensor", {"fsdp": 16, "tensor": 2}, True)  # 16 rows are not for 32
    assert picked(BIG, 16, 8, slices=2) == ("hsdp", {"replica": 2, "fsdp": 8}, True)
    few = Need(10**9, 0, 2, 2, 1024, 8 * GIB, 2048, (3,))  # 2 rows and heads for nobody: only time is left
    assert picked(few, 8, 12) == ("context", {"fsdp": 2, "sequence": 4}, True)


def test_auto_says_why_and_what_does_not_fit():
    why = choose(BIG, 8, 19 * GIB).why
    assert "fsdp (fsdp 8): 2.6 GiB a device of 19" in why and "too large, GiB: data: 17.3" in why
    tight = choose(BIG, 8, GIB)
    assert not tight.fits and "nothing fits" in tight.why
    with pytest.raises(ConfigError, match="no mesh of 7 devices divides 16 rows of 1024 slots"):
        choose(BIG, 7, GIB)


def test_auto_of_a_mesh_is_logged(caplog):
    with caplog.at_level(logging.INFO, "rlhfjax"):
        layout = make_layout(MeshConfig(strategy="auto"), need=BIG, memory=19 * GIB)
    assert dict(layout.mesh.shape)["fsdp"] == 4 and "mesh.strategy=auto: fsdp (fsdp 4)" in caplog.text
    assert dict(make_layout(MeshConfig(strategy="auto")).mesh.shape)["data"] == 4


def test_what_a_stage_needs_is_counted():
    """tests/tiny.py with two layers: policy and critic of one trunk, a reference and a reward.

    A scalar head has 17 parameters, the tied output 5,120.
    """
    values = to_dict(tiny.get_config("data=nowhere"))["ppo"] | {"init_from": "x", "reward": "y"}
    config = recipe.check(values, "ppo")
    shape = TransformerConfig(vocab_size=320, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_length=32)
    trunk = 320 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    need = need_of(config, shape, shape)
    assert (need.trained, need.frozen, need.moments) == (2 * trunk + 17, 2 * trunk + 17, 2)
    assert (need.rows, need.time, need.width) == (8, 32, 16)
    assert need.a_row == 4 * 2 * 32 * (8 * 16 + 4 * 32 + 2 * 32)
    elsewhere = need_of(recipe.check(values | {"judge_mesh": {"devices": "0:1"}}, "ppo"), shape, shape)
    assert (elsewhere.trained, elsewhere.frozen) == (need.trained, 0)


def test_auto_in_a_recipe_knows_the_models_of_stages_before(tmp_path, caplog):
    config = to_dict(tiny.get_config("data=nowhere"))
    for name in ("sft", "ppo"):
        config[name]["mesh"] = config[name]["mesh"] | {"strategy": "auto"}
    folders = recipe.stage_folders(config, tmp_path)
    resolved = {name: recipe.resolve(config[name], folders, name) for name in config["stages"]}
    with caplog.at_level(logging.INFO, "rlhfjax"):
        recipe.check_all(resolved, folders)
    assert "7,728 trained and 0 frozen parameters, 8 rows of 32" in caplog.text
    assert "15,473 trained and 15,473 frozen parameters, 8 rows of 32" in caplog.text  # critic and reward: 17 more


SHARES = {"data": 1.0, "fsdp": 1 / 8, "fsdp_tensor": 1 / 8, "context": 1 / 4, "hsdp": 1 / 4}


@pytest.mark.nightly
def test_eight_devices_train_as_one(tmp_path):
    """Two steps of one model and of four, on the two strategies that have all axes together.

    docs/scaling.md has the whole table. Matrices of the state are split as the strategy says, moments with them.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
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
        assert cell["metrics"] < 1e-4 and cell["params"] < 1e-6 < 1e-2 * cell["moved"], cell
        assert cell["share"] == SHARES[cell["strategy"]], cell
