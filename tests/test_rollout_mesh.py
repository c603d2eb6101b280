"""Sampling on another mesh than training: the same numbers, and the weights really lie elsewhere."""

import jax
import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.stages.parts import policy, policy_config
from tests.test_stages import run_steps, stage_values

THERE = {"data": 1, "fsdp": 1, "tensor": 2, "replica": 2}


@pytest.mark.slow
def test_ppo_with_rollouts_on_another_mesh_is_ppo(conversations, finished, monkeypatch):
    """Trained by FSDP over four devices, sampled with heads over two and rows over two: as on one device."""
    laid = []
    generate = policy.sample

    def spy(model, params, prompts, *args, **options):
        laid.append(
            (
                params["backbone"]["layers"]["layer_0"]["attention"]["query"]["kernel"].sharding.spec,
                prompts.sharding.spec,
            )
        )
        return generate(model, params, prompts, *args, **options)

    values = stage_values("ppo", conversations, finished)
    one, params_one = run_steps("ppo", values, make_layout(MeshConfig(), jax.devices()[:1]))
    monkeypatch.setattr(policy, "sample", spy)
    four = make_layout(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    other, params_other = run_steps("ppo", values | {"rollout_mesh": THERE}, four)
    assert {tuple(map(str, specs)) for specs in laid} == {
        ("P(None, 'tensor', None)", "P(('replica', 'data', 'fsdp'),)")
    }
    for a, b in zip(one, other, strict=True):
        for metric in a:
            np.testing.assert_allclose(b[metric], a[metric], rtol=2e-3, atol=2e-4, err_msg=metric)
    for a, b in zip(jax.tree.leaves(params_one), jax.tree.leaves(params_other), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_meant_is_one_line(conversations, finished):
    one = make_layout(MeshConfig(), jax.devices()[:1])
    lora = stage_values("ppo", conversations, finished, rollout_mesh={}, lora={"rank": 2})
    with pytest.raises(ConfigError, match=r"ppo.rollout_mesh: adapters have no other mesh to sample on"):
        policy_config.check_policy(recipe.check(lora, "ppo"), one, None)
    wide = recipe.check(stage_values("ppo", conversations, finished, rollout_mesh={"data": 3}), "ppo")
    three = make_layout(MeshConfig(), jax.devices()[:3])
    with pytest.raises(ConfigError, match=r"ppo.batch_size, over rollout_mesh,=\d+ is not divisible by the 3 devices"):
        policy.sampler(wide, three, None)
