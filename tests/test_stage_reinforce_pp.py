"""REINFORCE++ took one file and one function.

It is planned, placed, resumed and reported as the others are.
"""

import jax
import numpy as np
import pytest

from benchmarks import optimum
from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.errors import Preempted
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.origins import Origins
from rlhfjax.plan import programs, shapes
from rlhfjax.report.page import render
from rlhfjax.report.workdir import read_run
from tests import small_world, tiny
from tests.test_resume import assert_same_stage, interrupt
from tests.test_stages import stage_values


def of_ppo(values):
    """PPO's values as those of this stage: what its value function has is left out."""
    own = {
        "value",
        "value_head",
        "value_clip",
        "value_coefficient",
        "value_optim",
        "gamma",
        "lam",
    }
    own |= {"whiten_rewards", "whiten_advantages"}
    return {name: x for name, x in values.items() if name not in own} | {
        "stage": "reinforce_pp"
    }


def test_what_every_token_learns_from_equals_a_loop():
    """The score minus beta times the KL that is still to come, normalized over the batch."""
    algorithm, state, reference = small_world.begin(optimum.reinforce_pp_config(1))
    state = state.replace(params=small_world.moved(state.params))
    rollout, experience, metrics = optimum.experience(
        algorithm, state, reference, jax.random.key(0)
    )
    known = jax.device_get(algorithm.programs.forward(state.params, reference, rollout))
    scores = np.asarray(
        optimum.reward(rollout.tokens, rollout.attention_mask, rollout.mask)
    )
    mask = np.asarray(rollout.mask)
    to_come = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        for t in range(len(row)):
            nats = sum(
                known.logprobs[i, s] - known.ref_logprobs[i, s]
                for s in range(t, len(row))
                if row[s]
            )
            to_come[i, t] = scores[i] - optimum.BETA * nats
    counted = to_come[mask > 0]
    expected = np.where(mask > 0, (to_come - counted.mean()) / counted.std(), 0)
    np.testing.assert_allclose(experience.advantages, expected, atol=2e-5)
    assert float(metrics["score"][0]) == pytest.approx(scores.sum(), rel=1e-5)


def test_it_is_planned_and_placed():
    """The recorder finds its programs; its memory is that of the group estimators'."""
    nowhere = to_dict(tiny.get_config("data=nowhere"))
    values = {
        **nowhere,
        "stages": (*nowhere["stages"], "reinforce_pp"),
        "reinforce_pp": of_ppo(nowhere["ppo"]),
    }
    subject = shapes.subject(values, "reinforce_pp")
    planned = programs.step_programs(subject, make_layout(MeshConfig())).programs
    assert [p.name for p in planned] == [
        "rollout",
        "know",
        "score",
        "prepare",
        "update",
    ]
    assert [net.name for net in subject.nets] == ["policy", "reference", "reward"]
    auto = recipe.check(
        of_ppo(nowhere["ppo"]) | {"mesh": {"strategy": "auto"}}, "reinforce_pp"
    )
    folders = {
        "stage:sft": nowhere["sft"],
        "stage:reward": nowhere["reward"],
        "stage:pretrain": nowhere["pretrain"],
    }
    origins = Origins(
        {name: recipe.check(config, name) for name, config in folders.items()}
    )
    assert recipe.layout_of(auto, origins).mesh.shape["data"] == len(jax.devices())


@pytest.mark.nightly
def test_it_resumes_bit_for_bit_and_is_reported(
    conversations, finished, tmp_path, monkeypatch
):
    values = of_ppo(stage_values("ppo", conversations, finished, steps=4))
    recipe.run_stage(values, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        interrupt(patch, "reinforce_pp", at=2, how="sigterm")
        recipe.run_stage(values, tmp_path / "broken")
    recipe.run_stage(values, tmp_path / "broken")
    assert_same_stage(tmp_path / "whole", tmp_path / "broken")
    run = read_run(tmp_path / "whole")
    assert "validations of reinforce_pp" in render(run)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_it_reaches_the_optimum():
    """To 0.005 nats; three seeds ended within 0.001 (docs/optimum.md)."""
    logprobs, reference, rewards = optimum.last(optimum.algorithms(400)["REINFORCE++"])
    best = optimum.measure(optimum.optimum(reference, rewards), reference, rewards)
    reached = optimum.measure(logprobs, reference, rewards)
    assert optimum.measure(reference, reference, rewards).divergence > 2
    assert reached.divergence < 0.005
    assert reached.reward == pytest.approx(best.reward, rel=0.03)
