import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import policy
from tests.jitted import jitted

policy = jitted(policy)


def loop_ppo(logprobs, old_logprobs, advantages, mask, clip):
    """Schulman et al. 2017, eq. 6 and 7, token by token."""
    loss = clipped = kl = ratio_sum = count = 0.0
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            if mask[i, j] == 0:
                continue
            ratio = np.exp(np.float64(logprobs[i, j]) - np.float64(old_logprobs[i, j]))
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            objective = min(ratio * advantages[i, j], bounded * advantages[i, j])
            loss -= objective
            clipped += objective < ratio * advantages[i, j]
            kl += ratio - 1 - np.log(ratio)
            ratio_sum += ratio
            count += 1
    return {
        name: v / count
        for name, v in {
            "loss": loss,
            "clip_fraction": clipped,
            "approx_kl": kl,
            "ratio": ratio_sum,
        }.items()
    }


def random_batch(shape=(5, 7)):
    rng = np.random.default_rng(2)
    old = -rng.gamma(2, 1, shape).astype(np.float32)
    return (
        old + 0.3 * rng.normal(size=shape).astype(np.float32),
        old,
        rng.normal(size=shape).astype(np.float32),
        (rng.random(shape) < 0.6).astype(np.float32),
    )


def values(metrics):
    return {name: float(total / weight) for name, (total, weight) in metrics.items()}


def test_ppo_by_hand():
    # ratio 1.5, A  1: min(1.5, 1.2)   =  1.2, clipped
    # ratio 1.5, A -1: min(-1.5, -1.2) = -1.5
    # ratio 0.5, A -1: min(-0.5, -0.8) = -0.8, clipped
    # ratio 0.5, A  1: min(0.5, 0.8)   =  0.5
    # loss = -(1.2 - 1.5 - 0.8 + 0.5) / 4 = 0.15; the fifth token is padding.
    ratio = jnp.array([[1.5, 1.5, 0.5, 0.5, 9.0]])
    loss, metrics = policy.ppo_loss(
        jnp.log(ratio),
        jnp.zeros((1, 5)),
        jnp.array([[1.0, -1.0, -1.0, 1.0, 100.0]]),
        jnp.array([[1.0, 1.0, 1.0, 1.0, 0.0]]),
        clip=0.2,
    )
    np.testing.assert_allclose(loss, 0.15, rtol=1e-5)
    found = values(metrics)
    np.testing.assert_allclose(found["clip_fraction"], 0.5)
    np.testing.assert_allclose(found["ratio"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["ratio_max"], 1.5, rtol=1e-6)
    # k3: 0.5 - ln 1.5 = 0.094535 and -0.5 - ln 0.5 = 0.193147; the mean of two each.
    np.testing.assert_allclose(found["approx_kl"], 0.143841, rtol=1e-5)


@pytest.mark.parametrize("clip", [0.1, 0.2, 10.0])
def test_ppo_equals_the_loop(clip):
    batch = random_batch()
    loss, metrics = policy.ppo_loss(*map(jnp.array, batch), clip=clip)
    found = values(metrics)
    for name, value in loop_ppo(*batch, clip).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-6)


def test_on_the_policy_that_sampled_ratio_is_1_and_the_gradient_is_reinforce():
    _, old, advantages, mask = map(jnp.array, random_batch())
    value_and_grad = jax.value_and_grad(policy.ppo_loss, has_aux=True)
    (_, metrics), gradient = value_and_grad(old, old, advantages, mask, clip=0.2)
    found = values(metrics)
    assert (
        found["ratio"],
        found["ratio_max"],
        found["clip_fraction"],
        found["approx_kl"],
    ) == (1, 1, 0, 0)
    np.testing.assert_allclose(gradient, -advantages * mask / mask.sum(), rtol=1e-6)


def test_pitfall_19_a_clipped_token_has_no_gradient():
    # The two clipped tokens of the example by hand; the others have -A ratio / 4.
    logprobs = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5]]))
    advantages = jnp.array([[1.0, -1.0, -1.0, 1.0]])
    gradient = jax.grad(
        lambda x: policy.ppo_loss(
            x, jnp.zeros((1, 4)), advantages, jnp.ones((1, 4)), clip=0.2
        )[0]
    )
    np.testing.assert_allclose(
        gradient(logprobs), [[0, 1.5 / 4, 0, -0.5 / 4]], rtol=1e-5
    )


def test_advantages_and_old_logprobs_are_constants():
    logprobs, old, advantages, mask = map(jnp.array, random_batch())
    gradients = jax.grad(
        lambda o, a: policy.ppo_loss(logprobs, o, a, mask, clip=0.2)[0], argnums=(0, 1)
    )(old, advantages)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_entropy_bonus_by_hand():
    loss, metrics = policy.entropy_bonus(
        jnp.array([[1.0, 3.0, 99.0]]), jnp.array([[1.0, 1.0, 0.0]]), coefficient=0.1
    )
    np.testing.assert_allclose(loss, -0.2, rtol=1e-6)  # more entropy, less loss
    np.testing.assert_allclose(values(metrics)["entropy"], 2.0)


def test_pitfall_37_a_ratio_beyond_float32_has_no_gradient():
    # Log ratios 100, 100, -100, 0 with A = 1, -1, 1, 1: the clipped 1.2, e^80 for e^100, 0 and 1.
    logprobs, old = (
        jnp.array([[0.0, 0.0, -100.0, -1.0]]),
        jnp.array([[-100.0, -100.0, 0.0, -1.0]]),
    )
    advantages, mask = jnp.array([[1.0, -1.0, 1.0, 1.0]]), jnp.ones((1, 4))
    value_and_grad = jax.value_and_grad(policy.ppo_loss, has_aux=True)
    (loss, metrics), gradient = value_and_grad(
        logprobs, old, advantages, mask, clip=0.2
    )
    np.testing.assert_array_equal(gradient, [[0, 0, 0, -1 / 4]])
    np.testing.assert_allclose(loss, np.exp(80.0) / 4, rtol=1e-6)
    assert values(metrics)["ratio_clamped"] == 3 / 4
    outer = [
        x[:, ::3] for x in (logprobs, old, advantages, mask)
    ]  # the first and the last token
    (loss, _), _ = value_and_grad(*outer, clip=0.2)
    np.testing.assert_allclose(loss, -(1.2 + 1) / 2, rtol=1e-6)


def test_pitfall_37_log_ratios_within_the_limit_keep_their_bits():
    rng = np.random.default_rng(4)
    new, old = (-rng.gamma(2, 10, (50, 7)).astype(np.float32) for _ in range(2))
    assert np.abs(new - old).max() < 80
    constants = jnp.array(old), jnp.ones((50, 7))
    np.testing.assert_array_equal(
        policy.log_ratio(jnp.array(new), *constants), new - old
    )
    gradient = jax.grad(lambda x: policy.log_ratio(x, *constants).sum())(jnp.array(new))
    np.testing.assert_array_equal(gradient, 1)
