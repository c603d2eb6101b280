"""Stages that sample, with continuous batching and with shared prefixes: what they do is the same."""

import json

import jax
import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.data.preferences import read_preferences
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.stages import best_of_n, group
from rlhfjax.stages.parts import policy
from tests import test_stage_best_of_n as pools
from tests.test_stage_group import group_values
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_collect_draws_the_same_answers(conversations, finished, tmp_path):
    recipe.run(stage_values("collect", conversations, finished, slots=8), tmp_path)
    one, other = (read_preferences(folder / "preferences", "train") for folder in (tmp_path, finished / "03_collect"))
    assert len(one) == len(other) == 24
    for i in range(len(one)):
        for a, b in zip(one[i]["completion_tokens"], other[i]["completion_tokens"], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_evaluate_draws_the_same_answers(conversations, finished, tmp_path):
    recipe.run(stage_values("evaluate", conversations, finished, slots=4), tmp_path)
    for name in ("policy", "baseline"):
        one, other = (lines(folder / "samples.jsonl") for folder in (tmp_path, finished / "06_evaluate"))
        assert [row[name] for row in one] == [row[name] for row in other]


def test_a_pool_is_the_same_in_slots_and_without_shared_prompts(conversations, finished, tmp_path, monkeypatch):
    recipe.run_stage(pools.values(conversations, finished, slots=4), tmp_path / "slots")
    monkeypatch.setattr(best_of_n, "_same_prompt", lambda config: 1)
    recipe.run_stage(pools.values(conversations, finished), tmp_path / "alone")
    one, other = (lines(tmp_path / folder / "scores.jsonl") for folder in ("slots", "alone"))
    for a, b in zip(one, other, strict=True):
        assert a["length"] == b["length"]
        assert a["answer"] == b["answer"]


def test_the_rows_of_a_pool_that_share_a_prefix_have_one_prompt():
    """For every batch of every pool: groups of gcd(pool, batch) rows do not straddle prompts."""
    for pool in range(1, 13):
        for batch in range(1, 13):
            config = best_of_n.Config(init_from="", proxy="", prompt_length=1, max_new=1, pool=pool, batch_size=batch)
            each = best_of_n._same_prompt(config)
            for first in range(0, 5 * pool, batch):
                prompts = np.minimum(np.arange(first, first + batch), 5 * pool - 1) // pool
                assert (prompts.reshape(-1, each) == prompts[::each, None]).all()


@pytest.mark.parametrize("changes", [{}, {"slots": 8}])
def test_a_group_shares_its_prompt(changes, conversations, finished, monkeypatch):
    """Steps of RLOO as they are, and with every answer's prompt run through the model on its own."""
    got, params = run_steps("group", group_values(conversations, finished, "rloo", **changes), ONE)
    rollout, shared = policy.PolicyAlgorithm.rollout, []

    def alone(self, params, prompts, segments, key, each=1):
        shared.append(each)
        return rollout(self, params, prompts, segments, key)

    monkeypatch.setattr(group.Algorithm, "rollout", alone)
    expected, same = run_steps("group", group_values(conversations, finished, "rloo"), ONE)
    assert shared == [4, 4]
    for a, b in zip(got, expected, strict=True):
        for metric in b:
            np.testing.assert_allclose(a[metric], b[metric], rtol=1e-4, atol=1e-5, err_msg=metric)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "slots", "message"),
    [
        ("ppo", -4, "ppo.slots=-4: 0 .off."),
        ("collect", 3, "collect.slots=3: 0 .off., or at least the 4 answers to a prompt"),
        ("evaluate", 6, "evaluate.slots=6 is not divisible by the 4 devices"),
    ],
)
def test_slots_that_cannot_be_are_refused(stage, slots, message, conversations, finished, tmp_path):
    with pytest.raises(ConfigError, match=message):
        recipe.run(stage_values(stage, conversations, finished, slots=slots), tmp_path)
