import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos.combine import add_losses
from rlhfjax.algos.ema import ema_update
from rlhfjax.algos.policy import entropy_bonus, ppo_loss
from rlhfjax.algos.value import value_loss


def test_add_losses_by_hand():
    # On-policy, A = 1: policy loss -1. Value error 2: value loss 2. Entropy 3, coefficient 0.1:
    # -0.3.
    ones, mask = jnp.ones((1, 3)), jnp.array([[1.0, 1.0, 0.0]])
    loss, metrics = add_losses(
        policy=(1.0, ppo_loss(-ones, -ones, ones, mask, clip=0.2)),
        value=(0.1, value_loss(3 * ones, ones, mask)),
        entropy_bonus=(1.0, entropy_bonus(3 * ones, mask, coefficient=0.1)),
    )
    np.testing.assert_allclose(loss, -1 + 0.2 - 0.3, rtol=1e-6)
    found = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    np.testing.assert_allclose(found["loss"], -1.1, rtol=1e-6)
    assert (found["policy_loss"], found["value_loss"], found["entropy"]) == (-1, 2, 3)
    assert {"clip_fraction", "approx_kl", "ratio", "value_error"} <= set(found)


def test_two_metrics_of_one_name_are_refused():
    ones = jnp.ones((1, 3))
    term = (1.0, value_loss(ones, ones, ones))
    with pytest.raises(ValueError, match="'value'"):
        add_losses(a=term, b=term)


def test_ema_by_hand():
    # 0.992 * 1 + 0.008 * 2, twice: 1.008, then 0.992 * 1.008 + 0.016 = 1.015936.
    average, params = (
        {"w": jnp.ones(2), "b": {"c": jnp.zeros(())}},
        {"w": jnp.full(2, 2.0), "b": {"c": jnp.ones(())}},
    )
    once = ema_update(average, params, decay=0.992)
    twice = ema_update(once, params, decay=0.992)
    np.testing.assert_allclose(once["w"], 1.008, rtol=1e-6)
    np.testing.assert_allclose(twice["w"], 1.015936, rtol=1e-6)
    np.testing.assert_allclose(once["b"]["c"], 0.008, rtol=1e-5)
