import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos import language, policy
from tests.jitted import jitted

language = jitted(language)

LOGPROBS = jnp.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -jnp.inf]])
MASK = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


def test_next_token_loss_is_a_mean_over_counted_targets():
    loss, metrics = language.next_token_loss(LOGPROBS, MASK)
    np.testing.assert_allclose(loss, (1 + 2 + 3 + 4) / 4)
    assert [float(x) for x in metrics["loss"]] == [10, 4]


def test_next_token_loss_of_a_uniform_model_is_log_of_the_vocabulary():
    loss, _ = language.next_token_loss(jnp.full((2, 3), -math.log(50257)), MASK)
    np.testing.assert_allclose(loss, 10.825, atol=1e-3)


def test_pitfall_24_a_token_outside_the_mask_has_no_gradient():
    gradient = jax.grad(lambda x: language.next_token_loss(x, MASK)[0])(LOGPROBS)
    np.testing.assert_allclose(gradient, -np.array(MASK) / 4)


def test_pitfall_26_the_unit_of_the_pretraining_loss_is_in_the_name():
    # gamma = 2: mean over 4 tokens 2 * 10 / 4 = 5; mean over 2 sequences of their sums 2 * (6 + 4) / 2 = 10.
    per_token, metrics = language.ptx_loss_token_mean(LOGPROBS, MASK, coefficient=2.0)
    per_sequence, _ = language.ptx_loss_sequence_sum(LOGPROBS, MASK, coefficient=2.0)
    np.testing.assert_allclose([per_token, per_sequence], [5.0, 10.0])
    assert [float(x) for x in metrics["nll"]] == [10, 4]  # nats per token, without gamma
    # Full sequences of n tokens: exactly n times as much.
    full = jnp.full((2, 3), -1.5)
    ratio = (
        language.ptx_loss_sequence_sum(full, jnp.ones((2, 3)), coefficient=27.8)[0]
        / language.ptx_loss_token_mean(full, jnp.ones((2, 3)), coefficient=27.8)[0]
    )
    np.testing.assert_allclose(ratio, 3.0, rtol=1e-6)


def test_pitfall_26_the_two_gradients_add_whatever_the_numbers_of_examples():
    # One parameter w shifts all logprobs. PPO: dL/dw = -mean A = -1 on 2 tokens; pretraining: -gamma = -3 on 600.
    def ppo(w):
        old = jnp.full((1, 2), -1.0)
        return policy.ppo_loss(old + w, old, jnp.ones((1, 2)), jnp.ones((1, 2)), clip=0.2)[0]

    def ptx(w):
        return language.ptx_loss_token_mean(jnp.full((6, 100), -2.0) + w, jnp.ones((6, 100)), coefficient=3.0)[0]

    np.testing.assert_allclose(jax.grad(ppo)(0.0) + jax.grad(ptx)(0.0), -4.0, rtol=1e-5)


def test_pitfall_42_nats_per_byte_of_the_counted_targets():
    # bos 0, "a" 1, "é" 2 and "今" 3 bytes; counted are a é eos | 今, in 2 + 1 + 3 bytes, and 12 nats.
    targets, mask = (
        jnp.array([[1, 2, 0, 3], [3, 3, 1, 0]]),
        jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0]]),
    )
    nats, size = language.nats_per_byte(jnp.float32(12.0), targets, mask, jnp.array([0, 1, 2, 3]))
    assert (float(nats), float(size)) == (12.0, 6.0)
