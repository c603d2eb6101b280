"""Learning from the responses of the iteration before.

Which responses these are, and what their ratios are to.
"""

import jax
import numpy as np
import pytest

from rlhfjax import recipe, stages
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from tests.test_resume import _Crash, assert_same_stage, interrupt
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])


def ppo(conversations, finished, **changes):
    values = stage_values("ppo", conversations, finished)
    return values | {"ptx": {"coefficient": 0.0}, "ema": 0.0} | changes


@pytest.mark.slow
def test_it_learns_from_the_rollout_before(conversations, finished):
    """With learning rate 0 the policies are all the same.

    Iteration i has the scores that i - 1 would have.
    """
    still = {"optim": {"learning_rate": 0.0}, "value_optim": {"learning_rate": 0.0}}
    now, _ = run_steps("ppo", ppo(conversations, finished, **still), ONE, steps=3)
    off, _ = run_steps(
        "ppo", ppo(conversations, finished, one_step_off=True, **still), ONE, steps=4
    )
    assert [line["staleness"] for line in off] == [0, 1, 1, 1]
    for before, after in zip(now, off[1:], strict=True):
        for name in ("score", "response_length", "entropy", "value"):
            np.testing.assert_allclose(
                after[name], before[name], rtol=1e-5, err_msg=name
            )
    assert len({line["score"] for line in now}) == 3


@pytest.mark.slow
def test_the_ratio_is_to_the_policy_that_sampled(conversations, finished):
    """On its own rollout a policy's first ratios are 1.

    On one of the iteration before they are not.
    """
    fast = {"optim": {"learning_rate": 1e-2, "schedule": "constant"}}
    now, _ = run_steps("ppo", ppo(conversations, finished, **fast), ONE, steps=3)
    off, _ = run_steps(
        "ppo", ppo(conversations, finished, one_step_off=True, **fast), ONE, steps=3
    )
    assert all(abs(line["first_ratio_max"] - 1) < 1e-4 for line in (*now, off[0]))
    assert all(line["first_ratio_max"] > 1.01 for line in off[1:])


@pytest.mark.slow
def test_the_rollout_is_saved_with_the_state(
    conversations, finished, tmp_path, monkeypatch
):
    """A run that crashed goes on to the same bits, over two devices."""
    config = ppo(
        conversations, finished, steps=4, one_step_off=True, mesh={"devices": "0:2"}
    )
    recipe.run_stage(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, "ppo", 3, "exception")
        with pytest.raises(_Crash):
            recipe.run_stage(config, tmp_path / "run")
    recipe.run_stage(config, tmp_path / "run")
    assert_same_stage(tmp_path / "whole", tmp_path / "run")


def test_what_has_no_ratio_is_refused(conversations, finished):
    forward = recipe.check(
        ppo(conversations, finished, one_step_off=True, behavior_logprobs="forward"),
        "ppo",
    )
    with pytest.raises(
        ConfigError,
        match=r"ppo.one_step_off: needs behavior_logprobs=.sampler.",
    ):
        stages.find("ppo").validate(forward, ONE, None)
    common = ppo(conversations, finished)
    kept = (
        "init_from",
        "reward",
        "prompts",
        "eval_prompts",
        "prompt_length",
        "max_new_tokens",
        "temperature",
        "steps",
    )
    values = {name: common[name] for name in kept} | {
        "batch_size": 4,
        "estimator": "rloo",
        "one_step_off": True,
    }
    group = recipe.check(stages.stage_config("group", **values).to_dict(), "group")
    with pytest.raises(
        ConfigError,
        match=r"group.one_step_off: needs a ratio that corrects for it; rloo has none",
    ):
        stages.find("group").validate(group, ONE, None)
