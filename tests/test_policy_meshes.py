"""Policy stages that lie on more than one mesh.

The same numbers, and the weights are really where the config says.
"""

import jax
import numpy as np
import pytest

from benchmarks import optimum
from rlhfjax import hosts, recipe, stages, state
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.models.transformer import Model
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rl import placement, rollout
from rlhfjax.rl.config import validate_policy
from rlhfjax.stages import ppo
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
THERE = {"data": 1, "fsdp": 1, "tensor": 2, "replica": 2}


def assert_same(one, other):
    (metrics_one, params_one), (metrics_other, params_other) = one, other
    for a, b in zip(metrics_one, metrics_other, strict=True):
        for metric in a:
            np.testing.assert_allclose(
                b[metric], a[metric], rtol=2e-3, atol=2e-4, err_msg=metric
            )
    for a, b in zip(
        jax.tree.leaves(params_one), jax.tree.leaves(params_other), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(conversations, finished):
    """PPO's first two steps on one device."""
    return run_steps("ppo", stage_values("ppo", conversations, finished), ONE)


@pytest.mark.slow
def test_ppo_with_rollouts_on_another_mesh_is_ppo(
    alone, conversations, finished, monkeypatch
):
    """Trained by FSDP over four devices, sampled with heads over two and rows over two.

    As on one device.
    """
    laid = []
    sample = rollout.sample

    def spy(model, params, prompts, *args, **options):
        query = params["backbone"]["layers"]["layer_0"]["attention"]["query"]["kernel"]
        laid.append((str(query.sharding.spec), str(prompts.sharding.spec)))
        return sample(model, params, prompts, *args, **options)

    monkeypatch.setattr(placement, "sample", spy)
    values = stage_values("ppo", conversations, finished, rollout_mesh=THERE)
    assert_same(
        alone,
        run_steps(
            "ppo", values, make_layout(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
        ),
    )
    assert set(laid) == {("P(None, 'tensor', None)", "P(('replica', 'data', 'fsdp'),)")}


@pytest.mark.slow
def test_ppo_with_rollouts_in_the_decode_layout_is_ppo(
    alone, conversations, finished, monkeypatch
):
    """Trained by FSDP over four devices, sampled with heads and MLP over two of them each.

    Held-out responses too: the weights go there once per evaluation.
    """
    laid = []
    sample = rollout.sample

    def spy(model, params, prompts, *args, **options):
        up = params["backbone"]["layers"]["layer_0"]["mlp"]["up"]["kernel"]
        laid.append((str(up.sharding.spec), str(prompts.sharding.spec)))
        return sample(model, params, prompts, *args, **options)

    monkeypatch.setattr(placement, "sample", spy)
    decode = {"rollout_layout": "decode", "rollout_tensor": 2}
    values = stage_values("ppo", conversations, finished, **decode)
    four = make_layout(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    assert_same(alone, run_steps("ppo", values, four))
    assert set(laid) == {("P(None, 'decode')", "P(('replica', 'data', 'fsdp'),)")}


def devices_of(tree):
    return {device.id for x in jax.tree.leaves(tree) for device in x.devices()}


@pytest.mark.nightly
def test_ppo_with_a_reward_and_a_reference_on_devices_of_their_own_is_ppo(
    alone, conversations, finished, monkeypatch
):
    """Policy and value function on devices 0 and 1, reward and reference on 2 and 3.

    The held-out numbers, too.
    """
    seen = []
    loaded = ppo.open_task
    monkeypatch.setattr(
        ppo, "open_task", lambda *args: seen.append(loaded(*args)) or seen[-1]
    )
    apart = stage_values(
        "ppo",
        conversations,
        finished,
        frozen_mesh={"devices": "2:4", "data": 1, "fsdp": 2},
    )
    two = make_layout(MeshConfig(devices="0:2", data=1, fsdp=2))
    assert_same(alone, run_steps("ppo", apart, two))
    (task,) = seen
    assert isinstance(task.reward, ModelReward)
    assert devices_of((task.reward.params, task.reference)) == {2, 3}
    assert devices_of(task.policy.read()) == {0, 1}

    def held_out(values, layout):
        config = recipe.check(values, "ppo")
        with layout.use():
            stage = stages.find("ppo").build(config, layout)
            first = stage.start(
                state.create_sharded(stage.init, jax.random.key(0), stage.axes, layout)
            )
            assert devices_of(first.params) == {
                device.id for device in layout.mesh.devices.flat
            }
            return finalize(hosts.whole(stage.evals(first)))

    one, other = (
        held_out(stage_values("ppo", conversations, finished), ONE),
        held_out(apart, two),
    )
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(
            other[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_a_mesh_of_some_devices():
    assert [d.id for d in make_layout(MeshConfig(devices="1:3")).mesh.devices.flat] == [
        1,
        2,
    ]
    assert make_layout(MeshConfig(devices="3:")).mesh.size == len(jax.devices()) - 3
    for wrong in ("4", "a:b", "2:2", f"{len(jax.devices())}:"):
        with pytest.raises(
            ConfigError,
            match=f"mesh.devices='{wrong}': FIRST:END of the {len(jax.devices())} devices",
        ):
            make_layout(MeshConfig(devices=wrong))


def test_what_cannot_be_meant_is_one_line(conversations, finished):
    for other in ("rollout_mesh", "frozen_mesh"):
        lora = stage_values(
            "ppo", conversations, finished, lora={"rank": 2}, **{other: {}}
        )
        with pytest.raises(
            ConfigError,
            match=f"ppo.{other}: must be None with lora, whose models share one base",
        ):
            validate_policy(recipe.check(lora, "ppo"), ONE, None)
    for changes, message in (
        (
            {"rollout_layout": "decode", "lora": {"rank": 2}},
            "auto or training with lora",
        ),
        (
            {"rollout_layout": "decode", "rollout_mesh": {}},
            "must be auto with a rollout_mesh",
        ),
        ({"rollout_tensor": 2}, 'rollout_tensor=2: needs rollout_layout="decode"'),
        (
            {"rollout_int8": "all", "behavior_logprobs": "forward"},
            'rollout_int8=.all.: needs behavior_logprobs="sampler"',
        ),
        (
            {"rollout_int8": "cache", "rollout_mesh": {}},
            'must be "none" with a rollout',
        ),
        ({"rollout_cache_parts": 2, "decode_batch": 4}, "must be 1 with window layers"),
    ):
        wrong = stage_values("ppo", conversations, finished, **changes)
        with pytest.raises(ConfigError, match=message):
            validate_policy(recipe.check(wrong, "ppo"), ONE, None)
    three = make_layout(MeshConfig(), jax.devices()[:3])
    wide = recipe.check(
        stage_values("ppo", conversations, finished, rollout_mesh={"data": 3}), "ppo"
    )
    with pytest.raises(
        ConfigError,
        match=r"ppo.batch_size, over rollout_mesh,=\d+ is not divisible by the 3 devices",
    ):
        placement.make_sampler(
            wide, three, Model(optimum.SHAPE), rollout.TokenIds(2, 0)
        )
    values = stage_values(
        "ppo", conversations, finished, frozen_mesh={"devices": "0:3"}
    )
    with pytest.raises(
        ConfigError,
        match=r"ppo: the responses of an iteration, over frozen_mesh,=\d+ is not divisible",
    ):
        ppo.build(recipe.check(values, "ppo"), make_layout(MeshConfig(devices="0:1")))
