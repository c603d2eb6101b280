"""Estimators against exact expectations over a whole language: 3 tokens, 2 steps, 9 sentences.

The policy is softmax of logits: `first` [3] and, given the first token, `second` [3, 3].
Expectations are sums over the 9 sentences (or over all tuples of K of them), so that nothing here
is a matter of luck.
"""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import advantages, group, kl, policy, shaping
from rlhfjax.models.logprobs import Output, vocabulary_kl

SENTENCES = np.array(list(itertools.product(range(3), repeat=2)))
MASK = jnp.ones((9, 2))
REWARDS = np.random.default_rng(20).normal(size=9)


def gradient(function):
    return jax.jit(jax.grad(function))


def logits_of(seed):
    rng = np.random.default_rng(seed)
    return {
        "first": jnp.array(rng.normal(size=3)),
        "second": jnp.array(rng.normal(size=(3, 3))),
    }


def token_logprobs(logits):
    """log pi of both tokens of every sentence [9, 2]."""
    first, second = (
        jax.nn.log_softmax(logits["first"]),
        jax.nn.log_softmax(logits["second"]),
    )
    a, b = SENTENCES.T
    return jnp.stack([first[a], second[a, b]], axis=1)


@pytest.fixture
def world():
    with jax.enable_x64(True):
        theta, reference = logits_of(21), logits_of(22)
        logprobs, ref = token_logprobs(theta), token_logprobs(reference)
        p = jnp.exp(logprobs.sum(axis=1))
        np.testing.assert_allclose(p.sum(), 1)
        yield types.SimpleNamespace(
            theta=theta, logprobs=logprobs, ref=ref, p=p, mask=MASK.astype(jnp.float64)
        )


def sequence_kl(logits, ref, p=None):
    logprobs = token_logprobs(logits)
    return jnp.sum(jnp.exp(logprobs.sum(1)) * (logprobs - ref).sum(1))


def token_kl_at_fixed_states(logits, ref, fixed, flipped=False):
    """sum over the 2 steps of E_{prefix ~ fixed} KL(pi(.

    | prefix) || rho(. | prefix)): the prefixes do not move.
    """
    both = [token_logprobs(logits), ref]
    q, r = both[::-1] if flipped else both
    visit = jnp.exp(jax.nn.log_softmax(fixed["first"]))
    step_1 = jnp.sum((jnp.exp(q[:, 0]) * (q - r)[:, 0])[::3])
    step_2 = jnp.sum(visit[SENTENCES[:, 0]] * jnp.exp(q[:, 1]) * (q - r)[:, 1])
    return step_1 + step_2


def expected_gradient(loss, world):
    """E_{y ~ pi} grad loss(y): each sentence as a batch of one, weighted by its probability, which
    is a constant.
    """

    def surrogate(logits):
        logprobs = token_logprobs(logits)
        per_sentence = jax.vmap(lambda *row: loss(*(x[None] for x in row)))(
            logprobs, world.logprobs, world.ref
        )
        return jnp.sum(world.p * per_sentence)

    return gradient(surrogate)(world.theta)


def assert_same(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), a, b
    )


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_pitfall_16_k1_and_k3_are_unbiased(world, estimator):
    per_sentence = kl.sequence_kl(estimator(world.logprobs, world.ref), world.mask)
    np.testing.assert_allclose(
        jnp.sum(world.p * per_sentence), sequence_kl(world.theta, world.ref), rtol=1e-12
    )


def test_k3_has_less_variance_than_k1_near_the_reference(world):
    near = world.logprobs + 0.1 * (world.ref - world.logprobs)
    spread = [
        float(jnp.sqrt(jnp.sum(world.p * (x - jnp.sum(world.p * x)) ** 2)))
        for x in (f(world.logprobs, near).sum(1) for f in (kl.k1, kl.k3))
    ]
    assert spread[1] < 0.2 * spread[0]


TOKEN_LOSSES = {
    "k1": lambda new, old, ref: kl.kl_loss_k1(new, old, ref, jnp.ones_like(new))[0],
    "k2": lambda new, old, ref: kl.kl_loss_k2(new, ref, jnp.ones_like(new))[0],
    "k3": lambda new, old, ref: kl.kl_loss_k3(new, old, ref, jnp.ones_like(new))[0],
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_pitfall_16_kl_in_the_loss_has_the_gradient_of_the_kl(world, name):
    # The losses are means over the 2 tokens.
    exact = gradient(lambda x: token_kl_at_fixed_states(x, world.ref, world.theta) / 2)(
        world.theta
    )
    assert_same(expected_gradient(TOKEN_LOSSES[name], world), exact)


def test_pitfall_16_the_sequence_loss_has_the_whole_gradient_and_value(world):
    loss = lambda new, old, ref: kl.kl_loss_sequence(new, ref, jnp.ones_like(new))[0]  # noqa: E731
    exact = gradient(lambda x: sequence_kl(x, world.ref))(world.theta)
    assert_same(expected_gradient(loss, world), exact)
    value = jnp.sum(
        world.p
        * jax.vmap(lambda *r: loss(*(x[None] for x in r)))(
            world.logprobs, world.logprobs, world.ref
        )
    )
    np.testing.assert_allclose(value, sequence_kl(world.theta, world.ref), rtol=1e-12)
    # It differs from the token-level one in `first` (which prefixes are visited), as the docstring
    # says.
    at_states = gradient(lambda x: token_kl_at_fixed_states(x, world.ref, world.theta))(
        world.theta
    )
    assert float(jnp.max(jnp.abs(exact["first"] - at_states["first"]))) > 1e-2


def test_the_bare_k3_of_grpo_has_the_gradient_of_the_other_kl(world):
    def loss(new, old, ref):
        zero = jnp.zeros(1, new.dtype)
        return group.grpo_loss(
            new, old, ref, zero, jnp.ones_like(new), clip=0.2, beta=1.0
        )[0]

    flipped = gradient(
        lambda x: token_kl_at_fixed_states(x, world.ref, world.theta, flipped=True) / 2
    )(world.theta)
    assert_same(expected_gradient(loss, world), flipped)


def expected_reward_gradient(world):
    return gradient(lambda x: jnp.sum(jnp.exp(token_logprobs(x).sum(1)) * REWARDS))(
        world.theta
    )


def expected_group_gradient(world, advantages_of, k):
    """E over all 9^k groups of the gradient of rloo_loss."""
    groups = np.array(list(itertools.product(range(9), repeat=k)))
    weight = jnp.prod(world.p[groups], axis=1)
    values = advantages_of(jnp.array(REWARDS[groups]))

    def surrogate(logits):
        logprobs = token_logprobs(logits)
        one = lambda g, a: group.rloo_loss(logprobs[g], a, jnp.ones((k, 2)))[0]  # noqa: E731
        return jnp.sum(weight * jax.vmap(one)(groups, values))

    return gradient(surrogate)(world.theta)


@pytest.mark.parametrize("k", [2, 3])
def test_rloo_is_unbiased(world, k):
    exact = jax.tree.map(jnp.negative, expected_reward_gradient(world))
    assert_same(expected_group_gradient(world, group.rloo_advantages, k), exact)


@pytest.mark.parametrize("k", [2, 3])
def test_dr_grpo_is_k_minus_1_over_k_of_the_gradient(world, k):
    # r_i - mean with i in the mean is (k - 1) / k of the leave-one-out advantage.
    exact = jax.tree.map(lambda g: -(k - 1) / k * g, expected_reward_gradient(world))
    assert_same(expected_group_gradient(world, group.dr_grpo_advantages, k), exact)


def test_grpo_with_two_samples_only_sees_who_won(world):
    # k = 2: (r - mean) / std is +-1/sqrt(2), so that a monotone change of the rewards changes
    # nothing.
    of = lambda power: expected_group_gradient(  # noqa: E731
        world, lambda r: group.grpo_advantages(r**power, eps=1e-12), 2
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9),
        of(3),
        of(1),
    )


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_reinforce_with_any_constant_baseline_is_unbiased(world, baseline):
    def surrogate(logits):
        logprobs = token_logprobs(logits)

        def one(row, reward):
            return group.rloo_loss(
                row[None], reward[None] - baseline, jnp.ones((1, 2))
            )[0]

        return jnp.sum(world.p * jax.vmap(one)(logprobs, jnp.array(REWARDS)))

    exact = jax.tree.map(jnp.negative, expected_reward_gradient(world))
    assert_same(gradient(surrogate)(world.theta), exact)


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_ppo_with_gae_has_the_gradient_of_reward_minus_kl(world, lam):
    # Rewards on tokens (-beta k1, score at the end), gamma = 1. With lam = 1 any value function
    # will do; with lam = 0 the exact one is needed: V(start) and V(after the first token), by
    # enumeration.
    beta = 0.3
    k1 = kl.k1(world.logprobs, world.ref)
    rewards = shaping.token_rewards(jnp.array(REWARDS), k1, world.mask, beta=beta)
    total = rewards.sum(1)
    start = jnp.sum(world.p * total)
    after = jnp.sum(
        (jnp.exp(world.logprobs[:, 1]) * rewards[:, 1]).reshape(3, 3), axis=1
    )
    exact_values = jnp.stack([jnp.full(9, start), after[SENTENCES[:, 0]]], axis=1)
    values = (
        exact_values
        if lam == 0.0
        else jnp.array(np.random.default_rng(23).normal(size=2))[None]
        + 0 * exact_values
    )
    advantage, _ = advantages.gae(rewards, values, world.mask, gamma=1.0, lam=lam)

    def surrogate(logits):
        def one(new, old, a):
            mask = jnp.ones((1, 2))
            return policy.ppo_loss(new[None], old[None], a[None], mask, clip=0.2)[0]

        return jnp.sum(
            world.p * jax.vmap(one)(token_logprobs(logits), world.logprobs, advantage)
        )

    def objective(logits):
        logprobs = token_logprobs(logits)
        return (
            -jnp.sum(
                jnp.exp(logprobs.sum(1))
                * (REWARDS - beta * (logprobs - world.ref).sum(1))
            )
            / 2
        )

    assert_same(gradient(surrogate)(world.theta), gradient(objective)(world.theta))


# An enumerable bandit: every method climbs to pi* = rho exp(r / beta) / Z from samples alone.

ARMS, BETA = 6, 0.5
BANDIT = np.random.default_rng(24)
RHO = jax.nn.log_softmax(jnp.array(BANDIT.normal(size=ARMS), jnp.float32))
ARM_REWARD = jnp.array(BANDIT.normal(size=ARMS), jnp.float32)
N, K = 256, 4


def climb_ppo(logits, key, baseline):
    arms = jax.random.categorical(key, logits, shape=(N,))
    old, ref = jax.nn.log_softmax(logits)[arms][:, None], RHO[arms][:, None]
    mask = jnp.ones((N, 1))
    rewards = shaping.token_rewards(ARM_REWARD[arms], kl.k1(old, ref), mask, beta=BETA)
    advantage, _ = advantages.gae(
        rewards, jnp.full((N, 1), baseline), mask, gamma=1.0, lam=0.95
    )

    def loss(x):
        return policy.ppo_loss(
            jax.nn.log_softmax(x)[arms][:, None], old, advantage, mask, clip=0.2
        )[0]

    def epoch(_, x):
        return x - 0.1 * jax.grad(loss)(x)

    return jax.lax.fori_loop(0, 4, epoch, logits), group.moving_baseline(
        baseline, rewards[:, 0], decay=0.9
    )


def climb_rloo(logits, key, baseline):
    arms = jax.random.categorical(key, logits, shape=(N,))
    old, ref = jax.nn.log_softmax(logits)[arms][:, None], RHO[arms][:, None]
    rewards = ARM_REWARD[arms] - BETA * kl.sequence_kl(
        kl.k1(old, ref), jnp.ones((N, 1))
    )
    advantage = group.rloo_advantages(rewards.reshape(-1, K)).reshape(-1)

    def loss(x):
        return group.rloo_loss(
            jax.nn.log_softmax(x)[arms][:, None], advantage, jnp.ones((N, 1))
        )[0]

    return logits - 0.3 * jax.grad(loss)(logits), baseline


def climb_group_with_kl_in_the_loss(logits, key, baseline):
    """Dr.

    GRPO's advantages, DAPO's loss, and k3 in the loss with its right gradient. (r - mean is (K-1)/K
    of r's.)
    """
    arms = jax.random.categorical(key, logits, shape=(N,))
    old, ref = jax.nn.log_softmax(logits)[arms][:, None], RHO[arms][:, None]
    advantage = (
        group.dr_grpo_advantages(ARM_REWARD[arms].reshape(-1, K)).reshape(-1)
        * K
        / (K - 1)
    )

    def loss(x):
        new, mask = jax.nn.log_softmax(x)[arms][:, None], jnp.ones((N, 1))
        surrogate, _ = group.dapo_loss(
            new, old, advantage, mask, clip_low=0.2, clip_high=0.2
        )
        return surrogate + BETA * kl.kl_loss_k3(new, old, ref, mask)[0]

    return logits - 0.3 * jax.grad(loss)(logits), baseline


@pytest.mark.parametrize(
    "method",
    [climb_ppo, climb_rloo, climb_group_with_kl_in_the_loss],
    ids=lambda f: f.__name__,
)
def test_climbs_to_the_tilted_reference(method):
    def step(carry, key):
        logits, baseline = method(carry[0], key, carry[1])
        return (logits, baseline), logits

    keys = jax.random.split(jax.random.key(0), 600)
    _, path = jax.lax.scan(step, (RHO, jnp.float32(0)), keys)
    reached = jax.nn.softmax(path[-200:]).mean(
        axis=0
    )  # the last third, averaged: what is left is sampling noise
    optimum = jax.nn.softmax(RHO + ARM_REWARD / BETA)
    np.testing.assert_allclose(reached, optimum, atol=0.02)
    reward = lambda p: float(jnp.sum(p * ARM_REWARD))  # noqa: E731
    nats = lambda p: float(jnp.sum(p * (jnp.log(p) - RHO)))  # noqa: E731
    np.testing.assert_allclose(reward(reached), reward(optimum), atol=0.02)
    np.testing.assert_allclose(nats(reached), nats(optimum), atol=0.03)
    assert reward(optimum) - reward(jnp.exp(RHO)) > 0.3  # there was something to climb


def test_the_kl_over_the_vocabulary_has_the_sampled_estimates_mean_and_less_variance(
    world,
):
    """Of every sentence: the KL of the first token, and of the second given the first."""
    reference = logits_of(22)
    first = SENTENCES[:, 0]

    def states(logits):
        start = jnp.broadcast_to(logits["first"], (9, 3))
        return jnp.stack([start, logits["second"][first]], axis=1)

    eye = jnp.eye(3)
    per_token = vocabulary_kl(
        (states(world.theta), states(reference)), (eye, eye), how=Output(tied=True)
    )
    exact = kl.sequence_kl(per_token, world.mask)
    sampled = kl.sequence_kl(kl.k1(world.logprobs, world.ref), world.mask)
    means = [jnp.sum(world.p * x) for x in (exact, sampled)]
    np.testing.assert_allclose(*means, rtol=1e-5)
    variances = [
        jnp.sum(world.p * (x - mean) ** 2)
        for x, mean in zip((exact, sampled), means, strict=True)
    ]
    assert variances[0] < 0.5 * variances[1]
