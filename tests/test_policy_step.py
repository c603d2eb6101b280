"""A policy stage's step: what each part is given, by parts that keep it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import recipe, stages
from rlhfjax import state as states
from rlhfjax.data.batches import PolicyBatch, PromptBatch, TokenBatch
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.responses import TextReward
from rlhfjax.rl.rollout import Rollout
from rlhfjax.rl.task import open_task
from rlhfjax.roles import DISK
from tests.test_stage_group import group_values
from tests.test_stages import stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
KEY = jax.random.key(3)
IDS = jnp.ones((2, 4), jnp.int32)
ROLLOUT = Rollout(IDS, IDS, jnp.ones((2, 2)), jnp.full((2, 2), -1.0))
# what the reward may look at
SEEN = ROLLOUT._replace(tokens=IDS + 6, attention_mask=IDS + 7, mask=ROLLOUT.mask + 8)


@pytest.fixture(scope="module", params=["ppo", "group"])
def configured(request, conversations, finished):
    """(module, config, task) of a stage with its own reference and a human reward that fades."""
    name = request.param
    human = {"reward": "gold:sentiment", "weight": 0.5, "factor": 0.25}
    options = {"reference": str(finished / "01_pretrain"), "human": human}
    if name == "ppo":
        values = stage_values(name, conversations, finished, value="policy", **options)
    else:
        values = group_values(conversations, finished, "rloo", **options)
    config, module = recipe.check(values, name), stages.find(name)
    return module, config, open_task(config, module.roles(config), ONE, DISK)


def test_a_reference_may_be_another_model_than_the_policy(configured, finished):
    _, _, task = configured
    for params, name in (
        (task.reference, "01_pretrain"),
        (task.policy.read(), "02_sft"),
    ):
        expected = store.load(finished / name, ONE).params
        jax.tree.map(np.testing.assert_array_equal, params, expected)


EXPERIENCE = types.SimpleNamespace(advantages=jnp.zeros(2))
PREPARED = {"prepared": (1.0, 1.0), "kl_coefficient": (0.1, 1.0)}


class Told:
    """The programs of a stage and its sampler, which keep what they are given, in order."""

    def __init__(self, module):
        self.calls = []
        numbers = [ROLLOUT.logprobs] * len(module.ForwardOutputs._fields)
        self.outputs = module.ForwardOutputs(*numbers)
        own = {
            "forward": self.forward,
            "ref_logprobs": self.ref_logprobs,
            "make_experience": self.make_experience,
            "update": self.update,
            "tx": optax.sgd(1.0),
        }
        self.programs = module.Programs(**dict.fromkeys(module.Programs._fields) | own)

    def ref_logprobs(self, reference, rollout):
        raise AssertionError("the reference is on the same mesh")

    def sample(self, *args):
        self.calls.append(("sample", args))
        return ROLLOUT

    def truncate_responses(self, *args):
        self.calls.append(("truncate_responses", args))
        return SEEN

    def forward(self, *args):
        self.calls.append(("forward", args))
        return self.outputs

    def make_experience(self, *args):
        self.calls.append(("make_experience", args))
        return EXPERIENCE, PREPARED

    def update(self, *args):
        self.calls.append(("update", args))
        return args[0].replace(step=args[0].step + 1), {"updated": (2.0, 1.0)}

    def reward(self, *seen):
        self.calls.append(("reward", seen))
        return np.array([1.0, 2.0], np.float32)

    def human(self, *seen):
        self.calls.append(("human", seen))
        return np.array([4.0, -4.0], np.float32)


def test_a_human_reward_is_loaded_by_its_name(configured):
    *_, task = configured
    assert isinstance(task.human, TextReward)


def test_what_a_step_hands_to_its_parts(configured, monkeypatch):
    """R + w H of what may be seen, w = 0.5 * 0.25^2 in the third step; text without its prefix."""
    module, config, task = configured
    told = Told(module)
    policy = dataclasses.replace(task.policy, frozen={"frozen": 1})
    task = task._replace(policy=policy, reward=told.reward, human=told.human)
    made = {}

    def make(name, result):
        return lambda *args: made.setdefault(name, args) and result

    monkeypatch.setattr(module, "open_task", make("task", task))
    monkeypatch.setattr(module, "programs", make("programs", told.programs))
    monkeypatch.setattr(module, "make_sampler", make("sampler", told.sample))
    monkeypatch.setattr(module, "truncate_responses", told.truncate_responses)
    step = module.build(config, ONE).step
    assert made["sampler"] == (config, ONE, policy.model, task.ids)
    assert (
        made["programs"][:2] == (config, policy.model)
        and made["programs"][-1] is task.ids
    )

    frozen, trained = {"policy": {"frozen": 1}}, {"policy": {"w": 5}}
    whole = {"policy": {"frozen": 1, "w": 5}}
    if config.stage == "ppo":
        frozen["value"] = {}
        trained["value"] = whole["value"] = {"v": 6}
    state = states.TrainState(jnp.int32(2), trained, None, {"kl_coefficient": 0.1})
    fields = ("tokens", "attention_mask", "cut", "index")
    prompts = PromptBatch(**{name: jnp.zeros(1) for name in fields})
    fields = ("tokens", "targets", "mask", "segment_ids", "positions")
    text = TokenBatch(**{name: jnp.zeros(1) for name in fields})
    batch = PolicyBatch(prompts=prompts, text=text)
    state, metrics = step(state, batch, KEY)
    names = [name for name, _ in told.calls]
    # what needs no score is asked for before the rewards, which may be made on the host
    assert names == [
        "sample",
        "truncate_responses",
        "forward",
        "reward",
        "human",
        "make_experience",
        "update",
    ]
    given = dict(told.calls)
    params, tokens, attention_mask, key = given["sample"]
    assert params == whole["policy"]
    assert tokens is prompts.tokens and attention_mask is prompts.attention_mask
    assert key is KEY and given["truncate_responses"] == (config, task.ids, ROLLOUT)
    assert given["forward"][0] == whole and given["forward"][1] is task.reference
    assert given["forward"][2] is ROLLOUT
    for asked in (given["reward"], given["human"]):
        expected = (SEEN.tokens, SEEN.attention_mask, SEEN.mask)
        assert all(a is b for a, b in zip(asked, expected, strict=True))
    assert (
        given["make_experience"][1] is told.outputs
        and given["make_experience"][2] is ROLLOUT
    )
    np.testing.assert_allclose(given["make_experience"][3], [1 + 4 / 32, 2 - 4 / 32])
    experience, given_text, prepared, update_key, parts = given["update"][1:]
    assert (experience, prepared) == (EXPERIENCE, PREPARED)
    assert given_text is text
    assert parts == frozen and int(state.step) == 3
    assert not np.array_equal(jax.random.key_data(update_key), jax.random.key_data(KEY))
    assert {
        "prepared",
        "updated",
        "human",
        "human_weight",
        "prompts_cut",
    } <= metrics.keys()
