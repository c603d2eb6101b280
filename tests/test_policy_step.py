"""A policy stage's step: what each part is handed, by parts that say what they were given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rlhfjax.stages.parts.policy import Known, open_task, policy_step
from rlhfjax.stages.parts.rollout import Rollout

from rlhfjax import recipe
from rlhfjax import state as states
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.responses import TextReward
from tests.test_stages import stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
KEY = jax.random.key(3)
SEEN = tuple(jnp.full((2, 1), number) for number in (7.0, 8.0, 9.0))  # what the reward may look at
IDS = jnp.ones((2, 4), jnp.int32)
ROLLOUT = Rollout(IDS, IDS, jnp.ones((2, 2)), jnp.full((2, 2), -1.0))
KNOWN = Known(ROLLOUT.logprobs, ROLLOUT.logprobs)


@pytest.fixture(scope="module")
def configured(conversations, finished):
    """(config, task) of a PPO with a reference of its own and a human reward that fades."""
    human = {"reward": "gold:sentiment", "weight": 0.5, "factor": 0.25}
    options = {"reference": str(finished / "01_pretrain"), "human": human}
    config = recipe.check(stage_values("ppo", conversations, finished, **options), "ppo")
    return config, open_task(config, ONE)


def test_a_reference_may_be_another_model_than_the_policy(configured, finished):
    _, task = configured
    for params, name in ((task.reference, "01_pretrain"), (task.start.params, "02_sft")):
        expected = store.load(finished / name, ONE).params
        jax.tree.map(np.testing.assert_array_equal, params, expected)


class Told:
    """An algorithm that keeps what it is given, in order."""

    def __init__(self):
        self.calls = []

    def ref_logprobs(self, reference, rollout):
        raise AssertionError("the reference is on the same mesh")

    def rollout(self, *args):
        self.calls.append(("rollout", args))
        return ROLLOUT

    def seen(self, rollout):
        self.calls.append(("seen", rollout))
        return SEEN

    def know(self, *args):
        self.calls.append(("know", args))
        return KNOWN

    def prepare(self, *args):
        self.calls.append(("prepare", args))
        return "experience", {"prepared": (1.0, 1.0)}

    def update(self, *args):
        self.calls.append(("update", args))
        return args[0].replace(step=args[0].step + 1), {"updated": (2.0, 1.0)}


def test_a_human_reward_is_loaded_by_its_name(configured):
    _, task = configured
    assert isinstance(task.human, TextReward)


def test_what_a_step_hands_to_its_parts(configured):
    """R + w H of what may be seen, w = 0.5 * 0.25^2 in the third step; text without its prefix."""
    config, task = configured
    asked = []

    def reward(*seen):
        asked.append(seen)
        return np.array([1.0, 2.0], np.float32)

    def human(*seen):
        asked.append(seen)
        return np.array([4.0, -4.0], np.float32)

    task = dataclasses.replace(task, reward=reward, human=human)
    algorithm, frozen = Told(), {"policy": {"frozen": 1}}
    state = states.TrainState(jnp.int32(2), {"policy": {"w": 5}}, None, {"kl_coefficient": 0.1})
    batch = {name: jnp.zeros(1) for name in ("prompts", "segments", "cut", "ptx/tokens", "ptx/mask")}
    state, metrics = policy_step(config, ONE, task, algorithm, frozen)(state, batch, KEY)
    names = [name for name, _ in algorithm.calls]
    assert names == ["rollout", "seen", "know", "prepare", "update"]
    given = dict(algorithm.calls)
    whole = {"policy": {"frozen": 1, "w": 5}}
    params, prompts, segments, key, each = given["rollout"]
    assert (params, each) == (whole["policy"], 1)
    assert prompts is batch["prompts"] and segments is batch["segments"]
    assert key is KEY and given["seen"] is ROLLOUT
    assert given["know"][0] == whole and given["know"][1] is task.reference
    assert given["know"][2] is ROLLOUT
    for seen in asked:
        assert all(a is b for a, b in zip(seen, SEEN, strict=True))
    assert len(asked) == 2  # the reward and the human
    assert given["prepare"][1] is KNOWN and given["prepare"][2] is ROLLOUT
    np.testing.assert_allclose(given["prepare"][3], [1 + 4 / 32, 2 - 4 / 32])
    experience, text, prepared, update_key, parts = given["update"][1:]
    assert (experience, prepared) == ("experience", {"prepared": (1.0, 1.0)})
    assert text.keys() == {"tokens", "mask"} and text["mask"] is batch["ptx/mask"]
    assert parts is frozen and int(state.step) == 3
    assert not np.array_equal(jax.random.key_data(update_key), jax.random.key_data(KEY))
    assert {"prepared", "updated", "human", "human_weight", "prompts_cut"} <= metrics.keys()
