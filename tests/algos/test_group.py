import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import group
from tests.jitted import jitted

group = jitted(group)

REWARDS = jnp.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])


def random_batch(b=4, t=5):
    rng = np.random.default_rng(7)
    old = -rng.gamma(2, 1, (b, t)).astype(np.float32)
    new = old + 0.4 * rng.normal(size=(b, t)).astype(np.float32)
    reference = old + 0.4 * rng.normal(size=(b, t)).astype(np.float32)
    mask = (np.arange(t)[None, :] < np.array([5, 2, 3, 1])[:, None]).astype(np.float32)
    mask[0, 2] = 0  # a hole
    return new, old, reference, rng.normal(size=b).astype(np.float32), mask


def loop_terms(new, old, reference, advantages, mask, low, high, beta):
    """Per response, the list of its tokens' terms: Shao et al. 2024, eq. 3 and 4, without the
    means.
    """
    rows = []
    for i in range(mask.shape[0]):
        row = []
        for j in range(mask.shape[1]):
            if mask[i, j]:
                ratio = np.exp(float(new[i, j]) - float(old[i, j]))
                a, bounded = float(advantages[i]), min(max(ratio, 1 - low), 1 + high)
                inverse = np.exp(float(reference[i, j]) - float(new[i, j]))
                row.append(
                    -min(ratio * a, bounded * a)
                    + beta * (inverse - np.log(inverse) - 1)
                )
        rows.append(row)
    return rows


def test_advantages_by_hand():
    # mean 3. Leave-one-out: 1 - (2 + 6)/2 = -3, 2 - 7/2 = -1.5, 6 - 3/2 = 4.5.
    np.testing.assert_allclose(
        group.rloo_advantages(REWARDS), [[-3, -1.5, 4.5], [0, 0, 0]], rtol=1e-6
    )
    # unbiased variance ((-2)^2 + (-1)^2 + 3^2) / 2 = 7, std 2.645751.
    np.testing.assert_allclose(
        group.grpo_advantages(REWARDS, eps=0.0)[0],
        np.array([-2, -1, 3]) / 2.6457513,
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        group.dr_grpo_advantages(REWARDS), [[-2, -1, 3], [0, 0, 0]], rtol=1e-6
    )


def test_pitfall_12_equal_rewards_of_a_group_give_no_advantage_and_no_nan():
    np.testing.assert_array_equal(group.grpo_advantages(REWARDS)[1], [0, 0, 0])


def test_pitfall_38_a_kl_in_the_reward_is_not_divided_by_the_std():
    # beta 0.5, KLs of 0.1 .. 0.4 nats, mean 0.25: -0.5 (KL - 0.25) = 0.075, 0.025, -0.025, -0.075.
    # Equal rewards add nothing. 1, 0, 0, 1 have the deviations +-0.5 and the std
    # sqrt(4 * 0.25 / 3) = 0.5773503, to which 1e-4 is added.
    rewards = jnp.array([[0.7, 0.7, 0.7, 0.7], [1.0, 0.0, 0.0, 1.0]])
    penalties = 0.5 * jnp.array([[0.1, 0.2, 0.3, 0.4]] * 2)
    of_kl = np.array([0.075, 0.025, -0.025, -0.075])
    unit = 0.5 / (0.5773503 + 1e-4)
    expected = [of_kl, np.array([unit, -unit, -unit, unit]) + of_kl]
    np.testing.assert_allclose(
        group.grpo_advantages(rewards, penalties), expected, rtol=1e-5
    )
    without = group.grpo_advantages(rewards)
    np.testing.assert_array_equal(
        group.grpo_advantages(rewards, 0 * penalties), without
    )


@pytest.mark.parametrize(
    "function",
    [group.rloo_advantages, group.grpo_advantages, group.dr_grpo_advantages],
    ids=lambda f: f.__name__,
)
def test_advantages_are_within_the_prompt(function):
    both = function(jnp.array([[1.0, 2.0, 6.0, 0.0], [100.0, 50.0, 80.0, 60.0]]))
    alone = function(jnp.array([[1.0, 2.0, 6.0, 0.0]]))
    np.testing.assert_allclose(both[:1], alone, rtol=1e-6)
    np.testing.assert_allclose(both.sum(axis=1), [0, 0], atol=1e-4)
    with pytest.raises(ValueError, match="at least 2 responses"):
        function(jnp.ones((3, 1)))


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_rloo_is_the_mean_of_the_others_for_any_group_size(k):
    rewards = np.random.default_rng(8).normal(size=(5, k)).astype(np.float32)
    expected = [
        [
            row[i] - np.mean([row[j] for j in range(k) if j != i], dtype=np.float64)
            for i in range(k)
        ]
        for row in rewards
    ]
    np.testing.assert_allclose(
        group.rloo_advantages(jnp.array(rewards)), expected, rtol=1e-4, atol=1e-5
    )


def test_informative_groups():
    np.testing.assert_array_equal(group.informative(REWARDS), [True, False])


def test_moving_baseline_by_hand():
    np.testing.assert_allclose(
        group.moving_baseline(2.0, jnp.array([1.0, 3.0, 8.0]), decay=0.9), 1.8 + 0.4
    )


def test_rloo_loss_by_hand():
    # Sums of logprobs -3 and -4: -(2 * -3 + -1 * -4) / 2 = 1.
    loss, metrics = group.rloo_loss(
        jnp.array([[-1.0, -2.0], [-4.0, -jnp.inf]]),
        jnp.array([2.0, -1.0]),
        jnp.array([[1.0, 1.0], [1.0, 0.0]]),
    )
    np.testing.assert_allclose(loss, 1.0)
    assert float(metrics["loss"][1]) == 2


def test_grpo_equals_the_loop():
    new, old, reference, advantages, mask = random_batch()
    rows = loop_terms(new, old, reference, advantages, mask, 0.2, 0.2, 0.04)
    loss, metrics = group.grpo_loss(
        *map(jnp.array, (new, old, reference, advantages, mask)), clip=0.2, beta=0.04
    )
    np.testing.assert_allclose(loss, np.mean([np.mean(row) for row in rows]), rtol=1e-5)
    inverse = np.exp(reference.astype(np.float64) - new)
    kl = ((inverse - 1 - np.log(inverse)) * mask).sum() / mask.sum()
    np.testing.assert_allclose(metrics["kl"][0] / metrics["kl"][1], kl, rtol=1e-5)


def test_dr_grpo_divides_by_a_constant_length():
    new, old, reference, advantages, mask = random_batch()
    rows = loop_terms(new, old, reference, advantages, mask, 0.2, 0.2, 0.0)
    loss, metrics = group.dr_grpo_loss(
        *map(jnp.array, (new, old, advantages, mask)), clip=0.2, length=64
    )
    np.testing.assert_allclose(loss, sum(map(sum, rows)) / (4 * 64), rtol=1e-5)
    assert float(metrics["loss"][1]) == 4 * 64


def test_dapo_is_a_token_mean_with_the_higher_clip_above():
    new, old, reference, advantages, mask = random_batch()
    rows = loop_terms(new, old, reference, advantages, mask, 0.2, 0.28, 0.0)
    loss, metrics = group.dapo_loss(
        *map(jnp.array, (new, old, advantages, mask)), clip_low=0.2, clip_high=0.28
    )
    np.testing.assert_allclose(loss, sum(map(sum, rows)) / mask.sum(), rtol=1e-5)
    assert float(metrics["loss"][1]) == mask.sum()


def test_clip_higher_by_hand():
    # A = 1, ratio 1.25: below 1 + 0.28 it still has a gradient, at 1 + 0.2 it is clipped.
    new, old = jnp.log(jnp.array([[1.25]])), jnp.zeros((1, 1))
    one, mask = jnp.ones(1), jnp.ones((1, 1))
    wide = jax.grad(
        lambda x: group.dapo_loss(x, old, one, mask, clip_low=0.2, clip_high=0.28)[0]
    )(new)
    narrow = jax.grad(
        lambda x: group.dapo_loss(x, old, one, mask, clip_low=0.2, clip_high=0.2)[0]
    )(new)
    np.testing.assert_allclose([wide[0, 0], narrow[0, 0]], [-1.25, 0], rtol=1e-6)


def test_the_three_losses_weigh_a_long_response_differently():
    # On-policy, responses of 4 and 1 tokens with A = 1: the share of the gradient of the long one.
    mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    logprobs, advantages = jnp.full((2, 4), -1.0), jnp.ones(2)

    def share(loss):
        gradient = jax.grad(lambda x: loss(x)[0])(logprobs)
        return float(gradient[0].sum() / gradient.sum())

    grpo = share(
        lambda x: group.grpo_loss(
            x, logprobs, logprobs, advantages, mask, clip=0.2, beta=0.0
        )
    )
    dapo = share(
        lambda x: group.dapo_loss(
            x, logprobs, advantages, mask, clip_low=0.2, clip_high=0.2
        )
    )
    dr_grpo = share(
        lambda x: group.dr_grpo_loss(x, logprobs, advantages, mask, clip=0.2, length=4)
    )
    np.testing.assert_allclose([grpo, dapo, dr_grpo], [1 / 2, 4 / 5, 4 / 5], rtol=1e-6)
