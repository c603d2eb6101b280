"""PPO's options on its own programs, in the world of `benchmarks.optimum`.

Six tokens, two prompts, few responses.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import optimum
from benchmarks.optimum import EOS, PAD, PROMPTS, TEMPERATURE
from rlhfjax import recipe, stages
from rlhfjax import state as states
from rlhfjax.config import to_dict
from rlhfjax.data.batches import TokenBatch
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.rl import epochs
from rlhfjax.rl.config import KLConfig, PtxConfig, TruncateConfig
from rlhfjax.rl.rewards import shape_rewards
from rlhfjax.rl.rollout import Rollout, TokenIds, response_hidden, truncate_responses
from rlhfjax.stages import ppo
from rlhfjax.supervised import language_loss
from tests import small_world
from tests.small_world import moved, response_logprobs
from tests.test_stages import run_steps, stage_values

KEY = jax.random.key(7)
SGD = OptimConfig(
    name="sgd", learning_rate=0.1, b1=0.0, schedule="constant", clip_norm=0.0
)
PLAIN = {
    "optim": SGD,
    "value_optim": SGD,
    "batch_size": 32,
    "epochs": 1,
    "minibatches": 1,
    "whiten_advantages": "none",
}


def begin(shape=optimum.SHAPE, steps=4, **changes):
    return small_world.begin(optimum.ppo_config(steps, **{**PLAIN, **changes}), shape)


def iterate(algorithm, state, reference, key=KEY, text=None):
    """(state, experience, metrics) after one iteration."""
    _, episodes, pairs = optimum.experience(algorithm, state, reference, key)
    update_key = jax.random.fold_in(key, 1)
    state, more = algorithm.programs.update(state, episodes, text, pairs, update_key)
    return state, episodes, finalize(jax.device_get({**pairs, **more}))


def copy(tree):
    return jax.tree.map(lambda x: np.array(x), jax.device_get(tree))


def assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def apart(a, b):
    return max(
        float(np.abs(np.asarray(x) - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ------------------------------------------------------------------ whose logprobs


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 2e-5), ("bfloat16_products", 2e-2)]
)
def test_forward_logprobs_are_the_samplers(dtype, bound):
    shape = dataclasses.replace(optimum.SHAPE, dtype=dtype)
    sampler = optimum.experience(*begin(shape), KEY)[1]
    forward = optimum.experience(*begin(shape, behavior_logprobs="forward"), KEY)[1]
    np.testing.assert_array_equal(sampler.tokens, forward.tokens)
    # what the first ratio may differ from 1 by
    np.testing.assert_allclose(forward.logprobs, sampler.logprobs, atol=bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_products"])
def test_forward_logprobs_make_the_first_ratio_one_with_rounded_products(dtype):
    shape = dataclasses.replace(optimum.SHAPE, dtype=dtype)
    _, episodes, metrics = iterate(*begin(shape, behavior_logprobs="forward"))
    assert metrics["first_ratio_max"] == pytest.approx(1, abs=1e-5)
    assert (
        episodes.logprobs.dtype == jnp.float32
    )  # pitfall 16: a KL of bfloat16 numbers is noise
    rollout, sampled, _ = optimum.experience(*begin(shape), KEY)
    np.testing.assert_array_equal(sampled.logprobs, rollout.logprobs)


def test_pitfall_20_dropout_is_off_in_ppo():
    """A model that was fine-tuned with dropout.

    The ratio is 1, and a loss computed twice is the same.
    """
    shape = dataclasses.replace(optimum.SHAPE, dropout=0.5)
    algorithm, state, reference = begin(shape)
    _, episodes, _ = optimum.experience(algorithm, state, reference, KEY)
    loss_of = jax.jit(algorithm.programs.loss)
    loss, pairs = loss_of(state.params, episodes, jax.random.key(0))
    assert float(pairs["ratio_max"][0]) == pytest.approx(1, abs=1e-5)
    assert float(loss) == float(loss_of(state.params, episodes, jax.random.key(1))[0])


def test_pitfall_27_rollouts_come_from_the_weights_of_this_iteration():
    algorithm, state, reference = begin(
        optim=dataclasses.replace(SGD, learning_rate=3.0)
    )
    state, _, _ = iterate(algorithm, state, reference)
    rollout, _, _ = optimum.experience(
        algorithm, state, reference, jax.random.fold_in(KEY, 2)
    )
    rows = (rollout.tokens, rollout.attention_mask, 2, TEMPERATURE)
    now, before = (
        response_logprobs(algorithm.model, p, *rows)[0]
        for p in (state.params["policy"], reference)
    )
    np.testing.assert_allclose(rollout.logprobs, now * rollout.mask, atol=1e-5)
    assert apart(rollout.logprobs, before * rollout.mask) > 1e-2


def test_pitfall_07_every_iteration_draws_anew():
    """Two steps differ, and so do the many answers to one prompt within a step.

    One step is always the same.
    """
    algorithm, state, reference = begin()
    keys = (
        jax.random.fold_in(KEY, 0),
        jax.random.fold_in(KEY, 1),
        jax.random.fold_in(KEY, 0),
    )
    first, second, again = (
        optimum.experience(algorithm, state, reference, k)[0].responses for k in keys
    )
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.asarray(first != second)) > 0.3
    assert len(np.unique(np.asarray(first)[:16], axis=0)) > 5


# ------------------------------------------------------------------ score -> advantages


@functools.cache
def three_responses():
    """(rollout, what forward passes say of it, log pi / rho) of three responses to one prompt, with
    V = 0.
    """
    algorithm, state, reference = begin(batch_size=3, lam=1.0)
    tokens = jnp.array([[1, 3, 4, EOS], [1, 3, EOS, PAD], [1, 4, 5, 5]])
    mask = jnp.array([[1.0, 1], [1, 0], [1, 1]])
    segments = jnp.concatenate(
        [jnp.ones((3, 2), jnp.int32), mask.astype(jnp.int32)], axis=1
    )
    logprobs = (
        response_logprobs(
            algorithm.model, moved(reference), tokens, segments, 2, TEMPERATURE
        )[0]
        * mask
    )
    rollout = Rollout(tokens, segments, mask, logprobs)
    ref = (
        response_logprobs(algorithm.model, reference, tokens, segments, 2, TEMPERATURE)[
            0
        ]
        * mask
    )
    known = algorithm.programs.forward(state.params, reference, rollout)
    return rollout, known, np.asarray(logprobs - ref, np.float64)


def by_hand(**changes):
    """What an algorithm with gamma = lam = 1 makes of three responses that it did not sample."""
    algorithm, state, _ = begin(batch_size=3, lam=1.0, **changes)
    rollout, known, log_ratio = three_responses()
    scores = jnp.array([0.7, -1.6, 0.25])
    episodes, pairs = algorithm.programs.make_experience(state, known, rollout, scores)
    return episodes, finalize(jax.device_get(pairs)), np.asarray(scores), log_ratio


def to_go(rewards):
    return np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]


def test_pitfall_10_the_score_is_on_the_last_response_token():
    """With lam = 0 and V = 0 the advantage of a token is its reward; pitfall 9.

    Fractions stay fractions.
    """
    algorithm, state, reference = begin(batch_size=32, lam=0.0, kl=KLConfig(0.0))
    rollout, episodes, _ = optimum.experience(algorithm, state, reference, KEY)
    scores = np.asarray(
        optimum.reward(rollout.tokens, rollout.attention_mask, rollout.mask)
    )
    ended = np.asarray(rollout.mask)[:, 1] == 0
    assert ended.any() and not ended.all()
    expected = np.where(
        ended[:, None],
        np.stack([scores, 0 * scores], 1),
        np.stack([0 * scores, scores], 1),
    )
    np.testing.assert_allclose(episodes.advantages, expected, atol=1e-6)


def test_the_penalty_is_beta_times_the_estimate_at_every_token():
    for estimator, value in {
        "k1": lambda d: d,
        "k2": lambda d: d**2 / 2,
        "k3": lambda d: np.exp(-d) - 1 + d,
    }.items():
        episodes, metrics, scores, d = by_hand(kl=KLConfig(0.3, estimator=estimator))
        rewards = -0.3 * value(d)
        rewards[[0, 1, 2], [1, 0, 1]] += scores
        np.testing.assert_allclose(
            episodes.returns,
            to_go(rewards) * np.array([[1, 1], [1, 0], [1, 1]]),
            atol=1e-5,
        )
        assert metrics["kl"] == pytest.approx(
            d.sum(1).mean(), abs=1e-5
        )  # pitfall 15: of sequences, and k1


def test_pitfall_14_the_missing_eos_penalty_joins_the_score_before_whitening():
    """Only the third response did not end.

    Rewards are whitened with their mean kept, over real tokens.
    """
    episodes, metrics, scores, d = by_hand(
        whiten_rewards="batch", missing_eos="penalty", missing_eos_value=2.0
    )
    rewards = -optimum.BETA * d
    rewards[[0, 1, 2], [1, 0, 1]] += scores - np.array([0, 0, 2.0])
    real = np.array([[1, 1], [1, 0], [1, 1]], bool)
    mean, std = rewards[real].mean(), rewards[real].std()
    whitened = np.where(real, (rewards - mean) / np.sqrt(std**2 + 1e-8) + mean, 0)
    np.testing.assert_allclose(episodes.returns, to_go(whitened) * real, atol=1e-5)
    assert metrics["eos_rate"] == pytest.approx(2 / 3)


def test_replaced_and_clipped_scores():
    episodes, _, _, _ = by_hand(
        kl=KLConfig(0.0), missing_eos="replace", missing_eos_value=-3.0, score_clip=1.0
    )
    np.testing.assert_allclose(episodes.returns[:, 0], [0.7, -1.0, -1.0], atol=1e-6)


@pytest.mark.parametrize("stop", [3, 0])
def test_truncation_and_rejection(stop):
    """A full stop at position 1 or later ends what the reward sees; without one the score is -1.

    Id 0 may be a full stop.
    """
    config = optimum.ppo_config(
        4,
        **PLAIN
        | {"max_new_tokens": 4, "truncate": TruncateConfig(".", after=1, value=-1.0)},
    )
    ids = TokenIds(EOS, PAD, stop_id=stop)
    tokens = jnp.array(
        [[1, 3, 4, stop, 5, 5], [1, 3, stop, 4, 5, EOS], [1, 4, 4, 4, 4, stop]]
    )
    rollout = Rollout(
        tokens, jnp.ones_like(tokens), jnp.ones((3, 4)), jnp.full((3, 4), -1.0)
    )
    seen = truncate_responses(config, ids, rollout)
    expected = [
        [1, 3, 4, stop, PAD, PAD],
        [1, 3, stop, 4, 5, EOS],
        [1, 4, 4, 4, 4, stop],
    ]
    np.testing.assert_array_equal(seen.tokens, expected)
    np.testing.assert_array_equal(seen.mask, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(seen.attention_mask[:, 2:], seen.mask)
    shaped, _, pairs = shape_rewards(config, ids, jnp.array([0.5, 0.6, 0.7]), rollout)
    np.testing.assert_allclose(shaped, [0.5, -1.0, 0.7])
    assert finalize(jax.device_get(pairs))["accepted"] == pytest.approx(2 / 3)
    np.testing.assert_array_equal(
        rollout.mask, 1
    )  # the policy is trained on all that it sampled


def test_any_of_several_eos_is_an_end_of_a_response():
    """A response without either loses 2; the metric counts both."""
    config = optimum.ppo_config(
        4, **PLAIN | {"missing_eos": "penalty", "missing_eos_value": 2.0}
    )
    ids = TokenIds(EOS, PAD, extra_eos_ids=(5,))
    tokens = jnp.array([[1, 3, 4, EOS], [1, 3, 5, PAD], [1, 3, 4, 4], [1, 5, 4, 4]])
    mask = jnp.array([[1, 1], [1, 0], [1, 1], [1, 1]], jnp.float32)
    rollout = Rollout(tokens, jnp.ones_like(tokens), mask, -mask)
    shaped, ended, _ = shape_rewards(config, ids, jnp.full(4, 0.5), rollout)
    np.testing.assert_allclose(shaped, [0.5, 0.5, -1.5, -1.5])
    assert ended.tolist() == [True, True, False, False]
    one = shape_rewards(config, TokenIds(EOS, PAD), jnp.full(4, 0.5), rollout)[1]
    assert one.tolist() == [True, False, False, False]


def test_without_a_stop_at_eos_every_response_is_as_long():
    algorithm, state, reference = begin(stop_at_eos=False)
    rollout, _, _ = optimum.experience(algorithm, state, reference, KEY)
    assert (np.asarray(rollout.responses)[:, 0] == EOS).any()
    np.testing.assert_array_equal(rollout.mask, 1)


# ------------------------------------------------------------------ an iteration, by a loop

LENGTHS = (
    3,
    2,
    1,
    3,
)  # of four responses, of which the second and the third end with an eos
GAMMA, LAM, BETA = (
    0.9,
    0.7,
    0.11,
)  # BETA: a KL coefficient that has moved away from the config's


def without_models(**changes):
    """(programs, state, known, rollout, scores): four responses, made-up logprobs and values."""
    own = {
        "batch_size": 4,
        "max_new_tokens": 3,
        "gamma": GAMMA,
        "lam": LAM,
        "kl": KLConfig(0.5),
    }
    config = optimum.ppo_config(4, **PLAIN | own | changes)
    model = Model(optimum.SHAPE)
    programs = ppo.programs(
        config, model, Model(model.config, "scalar"), TokenIds(EOS, PAD)
    )
    seen = {name: jnp.zeros((4, 3)) for name in ("advantages", "returns")}
    params = {
        "policy": {**seen, "together": jnp.zeros((4, 4))},
        "value": {"beta": jnp.zeros(())},
    }
    state = states.TrainState.create(
        params, programs.tx, kl_coefficient=jnp.float32(BETA)
    )
    mask = np.arange(3) < np.array(LENGTHS)[:, None]
    responses = np.where(mask, [[3, 4, 5], [3, EOS, 0], [EOS, 0, 0], [5, 5, 4]], PAD)
    numbered = np.arange(4)[:, None]  # the prompt is the number of the response
    tokens = np.concatenate([numbered, responses], axis=1)
    segments = np.concatenate([np.ones((4, 1)), mask], axis=1)
    numbers = np.random.default_rng(3).normal(size=(3, 4, 3)) * mask
    known = ppo.ForwardOutputs(*jnp.float32(numbers))
    rollout = Rollout(
        jnp.int32(tokens), jnp.int32(segments), jnp.float32(mask), known.logprobs
    )
    return programs, state, known, rollout, jnp.array([0.7, -1.6, 0.25, 2.0])


def ragged(x):
    """The counted numbers of [4, 3], a list per response."""
    rows = np.asarray(x, np.float64).tolist()
    return [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]


def padded(rows):
    return np.array([[*row, *[0.0] * (3 - len(row))] for row in rows])


def joined(rows):
    return [number for row in rows for number in row]


def rewards_by_hand(known, scores, beta=BETA):
    """-beta log pi/rho at every token, and the score at the last."""
    both = zip(ragged(known.logprobs), ragged(known.ref_logprobs), strict=True)
    rewards = [[-beta * (p - r) for p, r in zip(*rows, strict=True)] for rows in both]
    for row, score in zip(rewards, scores, strict=True):
        row[-1] += float(score)
    return rewards


def gae_by_hand(rewards, values):
    """Advantages and returns: A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, R = A + V."""
    advantages, returns = [], []
    for row, v in zip(rewards, values, strict=True):
        found, later, following = [], 0.0, 0.0
        for t in reversed(range(len(row))):
            later = row[t] + GAMMA * following - v[t] + GAMMA * LAM * later
            following = v[t]
            found.insert(0, later)
        advantages.append(found)
        returns.append([a + b for a, b in zip(found, v, strict=True)])
    return advantages, returns


def whitened_by_hand(rows, keep_mean):
    mean, variance = np.mean(joined(rows)), np.var(joined(rows))
    std = (variance + 1e-8) ** 0.5
    return [[(x - mean) / std + keep_mean * mean for x in row] for row in rows]


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_experience_of_an_iteration_equals_a_loop(place):
    """With the KL in the loss no token is charged for it; the logged mean reward is."""
    programs, state, known, rollout, scores = without_models(
        kl=KLConfig(0.5, place=place)
    )
    episodes, pairs = programs.make_experience(state, known, rollout, scores)
    rewards, values = rewards_by_hand(known, scores), ragged(known.values)
    charged = rewards if place == "reward" else rewards_by_hand(known, scores, beta=0.0)
    advantages, returns = gae_by_hand(charged, values)
    np.testing.assert_allclose(
        episodes.advantages, padded(advantages), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(episodes.returns, padded(returns), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(episodes.logprobs, known.logprobs)
    np.testing.assert_array_equal(episodes.values, known.values)
    if place == "loss":
        np.testing.assert_array_equal(episodes.ref_logprobs, known.ref_logprobs)
    log_ratios = np.float64(known.logprobs) - np.float64(known.ref_logprobs)
    errors = np.subtract(joined(returns), joined(values))
    assert finalize(jax.device_get(pairs)) == pytest.approx(
        {
            "score": (0.7 - 1.6 + 0.25 + 2.0) / 4,
            "reward": sum(joined(rewards)) / 4,
            "kl": log_ratios.sum() / 4,
            "response_length": 9 / 4,
            "eos_rate": 2 / 4,
            "kl_coefficient": BETA,
            "value_explained_variance": 1 - np.var(errors) / np.var(joined(returns)),
        },
        rel=1e-5,
    )


def gradients_tell(params, batch, key, beta):
    """A loss whose gradients are what it is given: advantages, returns, beta, pairs."""
    who, one = jax.nn.one_hot(batch.tokens[:, 0], 4), jnp.ones(())
    policy = params["policy"]
    total = jnp.sum(policy["advantages"] * (who.T @ batch.advantages))
    total += jnp.sum(policy["returns"] * (who.T @ batch.returns))
    total += jnp.sum(policy["together"] * jnp.outer(who.sum(0), who.sum(0)))
    total += params["value"]["beta"] * beta
    return total, {
        "loss": (total, one),
        "approx_kl": (one, one),
        "ratio_max": (one, one),
    }


@pytest.mark.parametrize("rewards_in", ["none", "batch", "minibatch"])
def test_what_every_minibatch_learns_from_equals_a_loop(rewards_in, monkeypatch):
    """Returns follow whitened rewards; advantages are whitened after that, over the minibatch."""
    options = {
        "whiten_rewards": rewards_in,
        "whiten_advantages": "minibatch",
        "minibatches": 2,
    }
    programs, state, known, rollout, scores = without_models(**options)
    episodes, pairs = programs.make_experience(state, known, rollout, scores)
    small_world.with_loss(monkeypatch, ppo, gradients_tell)
    state, _ = programs.update(state, episodes, None, pairs, KEY)
    # sgd at 0.1 moves by -0.1 g
    told = {name: np.asarray(x) / -0.1 for name, x in state.params["policy"].items()}
    assert float(state.params["value"]["beta"]) == pytest.approx(
        -0.1 * 2 * BETA
    )  # two updates
    rewards = rewards_by_hand(known, scores)
    if rewards_in == "batch":
        rewards = whitened_by_hand(rewards, keep_mean=True)
    halves = {tuple(np.flatnonzero(row > 0.5)) for row in told["together"]}
    assert len(halves) == 2 and sorted(joined(halves)) == [0, 1, 2, 3]
    for half in halves:
        some, values = (
            [rewards[i] for i in half],
            [ragged(known.values)[i] for i in half],
        )
        if rewards_in == "minibatch":
            some = whitened_by_hand(some, keep_mean=True)
        advantages, returns = gae_by_hand(some, values)
        rows = list(half)
        np.testing.assert_allclose(
            told["returns"][rows], padded(returns), rtol=1e-4, atol=1e-5
        )
        advantages = whitened_by_hand(advantages, keep_mean=False)
        expected = padded(advantages)
        np.testing.assert_allclose(
            told["advantages"][rows], expected, rtol=1e-4, atol=1e-5
        )


# ------------------------------------------------------------------ losses


def every_response(algorithm, policy, reference):
    """All responses to both prompts as one Experience.

    A row's mask is its probability, a weight.
    """
    tokens, mask = optimum.responses()
    n = len(tokens)
    whole = jnp.concatenate(
        [jnp.repeat(jnp.asarray(PROMPTS), n, 0), jnp.tile(tokens, (2, 1))], axis=1
    )
    counted = jnp.tile(mask, (2, 1))
    segments = jnp.concatenate([jnp.ones_like(counted), counted], axis=1).astype(
        jnp.int32
    )
    logprobs, ref = (
        response_logprobs(algorithm.model, p, whole, segments, 2, TEMPERATURE)[0]
        for p in (policy, reference)
    )
    weights = counted * jnp.exp((logprobs * counted).sum(1, keepdims=True))
    zeros = jnp.zeros_like(counted)
    return ppo.Experience(
        whole, segments, weights, logprobs, zeros, zeros, zeros, ref_logprobs=ref
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_pitfall_16_a_kl_in_the_loss_has_the_gradient_of_the_kl(estimator):
    """Against the exact gradient of sum_s d(s) KL(pi(. | s) || rho(.

    | s)), the states' weights d(s) held fixed.
    """
    algorithm, state, reference = begin(
        kl=KLConfig(0.5, place="loss", estimator=estimator), value_coefficient=0.0
    )
    policy = moved(reference)
    batch = every_response(algorithm, policy, reference)

    def loss(params):
        both = {"policy": params, "value": state.params["value"]}
        return algorithm.programs.loss(both, batch, None, 0.5)[0]

    def exact(params):
        hidden = [
            response_hidden(algorithm.model, p, batch.tokens, batch.attention_mask, 2)
            for p in (params, reference)
        ]
        logits = [
            algorithm.model.logits(p, h)
            for p, (h, _) in zip((params, reference), hidden, strict=True)
        ]
        log_pi, log_rho = (jax.nn.log_softmax(x / TEMPERATURE) for x in logits)
        kl = jnp.sum(jnp.exp(log_pi) * (log_pi - log_rho), axis=-1)
        return 0.5 * jnp.sum(batch.mask * kl) / batch.mask.sum()

    ours, true = jax.jit(
        lambda params: (jax.grad(loss)(params), jax.grad(exact)(params))
    )(policy)
    assert float(optax.global_norm(true)) > 0.05
    assert_close(ours, true, rtol=1e-3, atol=2e-5)


def test_pitfall_18_value_and_policy_losses_share_one_weight():
    """So do the entropy bonus, and the KL in the loss at the coefficient it has come to."""
    options = {"value_coefficient": 0.3, "entropy_coefficient": 0.5}
    algorithm, state, reference = begin(
        **options, kl=KLConfig(0.2, place="loss", estimator="k2")
    )
    _, episodes, _ = optimum.experience(algorithm, state, reference, KEY)
    episodes = episodes._replace(ref_logprobs=episodes.ref_logprobs - 0.3)
    loss, pairs = jax.jit(algorithm.programs.loss)(state.params, episodes, None, 0.7)
    tokens = float(episodes.mask.sum())
    assert tokens < episodes.mask.size
    losses = ("policy_loss", "value_loss", "entropy_loss", "kl_loss")
    assert {float(pairs[name][1]) for name in ("loss", *losses)} == {tokens}
    error = np.asarray((episodes.values - episodes.returns) * episodes.mask)
    assert float(pairs["value_loss"][0]) == pytest.approx(
        0.5 * (error**2).sum(), rel=1e-5
    )
    terms = {name: float(pairs[name][0]) for name in losses}
    assert terms["kl_loss"] == pytest.approx(0.3**2 / 2 * tokens, rel=1e-3)
    assert float(pairs["entropy"][0]) > 1
    assert terms["entropy_loss"] == pytest.approx(
        -0.5 * float(pairs["entropy"][0]), rel=1e-6
    )
    total = terms["policy_loss"] + 0.3 * terms["value_loss"]
    total += terms["entropy_loss"] + 0.7 * terms["kl_loss"]
    assert float(loss) == pytest.approx(total / tokens, rel=1e-5)


def test_a_value_clip_of_0_clips_nothing():
    """V = 2, V_old = 0, R = 1: 1/2 (2 - 1)^2. Clipped by 0, V would stay at V_old."""
    algorithm, state, _ = begin(value_clip=0.0, value_coefficient=1.0)
    ids, row = jnp.array([[1, 3, 4]]), jnp.zeros((1, 1))
    batch = ppo.Experience(
        tokens=ids,
        attention_mask=jnp.ones_like(ids),
        mask=jnp.ones((1, 1)),
        logprobs=row,
        values=row,
        advantages=row,
        returns=jnp.ones((1, 1)),
    )

    def loss(bias):
        """With a kernel of 0 the bias is V."""
        head = {"kernel": jnp.zeros(32), "bias": bias}
        value = {**state.params["value"], "head": head}
        return algorithm.programs.loss({**state.params, "value": value}, batch, None)

    (_, metrics), slope = jax.value_and_grad(loss, has_aux=True)(jnp.float32(2.0))
    assert [float(x) for x in (*metrics["value_loss"], slope)] == [0.5, 1.0, 1.0]


def test_pitfall_13_what_stands_after_the_eos_changes_nothing():
    """The last token's advantage is score - V.

    Nothing is added for a state after it, whatever the pads hold.
    """
    algorithm, state, reference = begin(kl=KLConfig(0.0))
    head = {"kernel": jnp.ones(32), "bias": jnp.ones(())}
    state = state.replace(
        params={**state.params, "value": {**state.params["value"], "head": head}}
    )
    rollout, episodes, _ = optimum.experience(algorithm, state, reference, KEY)
    scores = optimum.reward(rollout.tokens, rollout.attention_mask, rollout.mask)
    last = np.asarray(rollout.mask).sum(1).astype(int) - 1
    assert set(last) == {0, 1}
    at_end = [
        np.take_along_axis(np.asarray(x), last[:, None], 1)[:, 0]
        for x in (episodes.advantages, episodes.values)
    ]
    assert np.abs(at_end[1]).min() > 1e-3
    np.testing.assert_allclose(at_end[0], np.asarray(scores) - at_end[1], atol=1e-5)
    other = rollout._replace(
        tokens=jnp.where(rollout.attention_mask == 0, 5, rollout.tokens)
    )
    known = algorithm.programs.forward(state.params, reference, other)
    changed, _ = algorithm.programs.make_experience(state, known, other, scores)
    for name in ("advantages", "returns", "values"):
        np.testing.assert_array_equal(
            np.asarray(getattr(changed, name))[np.asarray(episodes.mask) == 0], 0
        )
        np.testing.assert_allclose(
            getattr(changed, name), getattr(episodes, name), atol=1e-6
        )
    loss = algorithm.programs.loss
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, batch, None)[0]))
    assert_close(
        *(gradient(state.params, batch) for batch in (episodes, changed)), atol=1e-6
    )


@pytest.mark.slow
def test_a_shared_trunk_has_a_value_function_of_its_own_that_learns():
    """The head alone is separate; its loss reaches the trunk.

    Its values come to explain the returns.
    """
    algorithm, state, reference = begin(
        value="shared",
        batch_size=128,
        epochs=4,
        optim=OptimConfig(learning_rate=1e-3),
        value_optim=OptimConfig(learning_rate=0.05, schedule="constant"),
        steps=12,
    )
    assert set(state.params["value"]) == {"head"}
    _, episodes, _ = optimum.experience(algorithm, state, reference, KEY)
    assert float(jnp.abs(episodes.values).max()) == 0  # the head begins at 0

    def trunk(coefficient):
        config = dataclasses.replace(algorithm.config, value_coefficient=coefficient)
        critic = Model(algorithm.model.config, "scalar")
        other = ppo.programs(config, algorithm.model, critic, algorithm.ids)
        params = {
            **state.params,
            "value": {"head": {"kernel": jnp.ones(32), "bias": jnp.zeros(())}},
        }
        return jax.jit(jax.grad(lambda p: other.loss(p, episodes, None)[0]))(params)[
            "policy"
        ]

    assert apart(trunk(0.0), trunk(1.0)) > 1e-3
    explained = []
    for step in range(12):
        state, _, metrics = iterate(
            algorithm, state, reference, jax.random.fold_in(KEY, step)
        )
        explained.append(metrics["value_explained_variance"])
    assert explained[0] < 0.05 < 0.2 < explained[-1]


# ------------------------------------------------------------------ epochs


def test_policy_and_value_function_have_optimizers_of_their_own_that_count_updates(
    monkeypatch,
):
    """Two updates in each of two iterations: linear from the rate to 0 over 4, so 1 + 3/4 of it."""
    rates = {
        "optim": dataclasses.replace(SGD, learning_rate=0.1, schedule="linear"),
        "value_optim": dataclasses.replace(SGD, learning_rate=0.01, schedule="linear"),
    }
    config = optimum.ppo_config(
        2, **PLAIN | rates | {"batch_size": 4, "minibatches": 2}
    )
    model = Model(optimum.SHAPE)
    programs = ppo.programs(
        config, model, Model(model.config, "scalar"), TokenIds(EOS, PAD)
    )

    def loss(params, batch, key, beta):
        one = (jnp.ones(()), jnp.ones(()))
        return 3 * params["policy"] + 4 * params["value"], dict.fromkeys(
            ("loss", "ratio_max"), one
        )

    small_world.with_loss(monkeypatch, ppo, loss)
    params = {"policy": jnp.zeros(()), "value": jnp.zeros(())}
    state = states.TrainState.create(
        params, programs.tx, kl_coefficient=jnp.float32(0.0)
    )
    kl = (jnp.zeros(()), jnp.ones(()))
    zeros = jnp.zeros((4, 1))
    batch = ppo.Experience(*[zeros] * 7)
    state, metrics = programs.update(state, batch, None, {"kl": kl}, KEY)
    moves = {name: float(x) for name, x in state.params.items()}
    assert moves == pytest.approx(
        {"policy": -0.1 * 1.75 * 3, "value": -0.01 * 1.75 * 4}, rel=1e-6
    )
    found = finalize(jax.device_get(metrics))
    norms = {"policy_grad_norm": 3.0, "value_grad_norm": 4.0, "grad_norm": 5.0}
    assert {name: found[name] for name in norms} == pytest.approx(norms, rel=1e-6)
    assert int(state.step) == 1


def test_an_iteration_ends_with_the_coefficient_and_the_average():
    """8 episodes of 80, a mean KL of 2.2 for 2: beta (1 + 0.1 * 8 / 80). EMA: 0.9 * 1 + 0.1 * 2."""
    options = {"batch_size": 2, "samples_per_prompt": 4, "ema": 0.9}
    config = optimum.group_config(
        1, **options, kl=KLConfig(0.5, target=2.0, horizon=80)
    )
    tx = optax.sgd(1.0)
    extra = {"kl_coefficient": jnp.float32(0.3), "ema": {"policy": jnp.float32(1.0)}}
    state = states.TrainState.create({"policy": jnp.float32(2.0)}, tx, **extra)
    kls = {"kl": (jnp.float32(8 * 2.2), jnp.float32(8.0))}
    state = epochs.end_iteration(config, state, kls)
    assert float(state.extra["kl_coefficient"]) == pytest.approx(0.3 * 1.01, rel=1e-6)
    assert float(state.extra["ema"]["policy"]) == pytest.approx(1.1, rel=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
def test_a_gradient_that_is_not_finite_is_left_out_only_where_that_is_asked(
    on_nonfinite,
):
    options = {"batch_size": 4, "minibatches": 2, "on_nonfinite": on_nonfinite}
    config = optimum.ppo_config(1, **PLAIN | options)

    def loss(params, ids, key):
        one = (jnp.ones(()), jnp.ones(()))
        slope = jnp.where(ids.max() == 3, jnp.nan, 1.0)
        return params["policy"] * slope, {"loss": one, "ratio_max": one}

    tx, model = optax.sgd(1.0), Model(optimum.SHAPE)
    state = states.TrainState.create({"policy": jnp.zeros(())}, tx)
    state, metrics = epochs.minibatch_epochs(
        epochs.Learner(config, model, tx, loss), state, jnp.arange(4), None, KEY
    )
    left_out = on_nonfinite == "skip"
    assert float(state.params["policy"]) == pytest.approx(
        -1.0 if left_out else np.nan, nan_ok=True
    )
    assert ("skipped" in metrics) == left_out


def test_early_stop_leaves_the_rest_of_an_iteration():
    """One minibatch an epoch: the first is at ratio 1 and applied.

    The second is past the target.
    """
    once, *rest = begin(epochs=1)
    first = iterate(once, *rest)[0]
    algorithm, state, reference = begin(epochs=4, target_kl=1e-9)
    state, _, metrics = iterate(algorithm, state, reference)
    assert_close(state.params, copy(first.params), atol=1e-6)
    assert metrics["updated"] == 1 / 4
    assert metrics["approx_kl"] > 1e-9
    assert int(state.step) == 1
    _, _, metrics = iterate(algorithm, state, reference, jax.random.fold_in(KEY, 1))
    assert metrics["updated"] == 1 / 4  # the stop is of one iteration


def test_early_stop_that_is_not_reached_changes_nothing():
    metrics = []
    for target in (0.0, 100.0):
        algorithm, state, reference = begin(epochs=3, minibatches=2, target_kl=target)
        state, _, m = iterate(algorithm, state, reference)
        metrics.append((copy(state.params), m))
    assert metrics[1][1].pop("updated") == 1
    assert_close(metrics[0][0], metrics[1][0], rtol=1e-6, atol=1e-7)
    assert metrics[0][1] == pytest.approx(metrics[1][1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("total", "tokens", "applied"), [(0.75, 3.0, 4), (0.75, 1.0, 0)]
)
def test_early_stop_is_by_the_mean_over_tokens(total, tokens, applied):
    """A sum of 0.75 nats over 3 tokens is 0.25 per token: below a target of 1/2."""
    options = {"batch_size": 4, "epochs": 2, "minibatches": 2, "target_kl": 0.5}
    config = optimum.ppo_config(1, **PLAIN | options)

    def loss(params, ids, key):
        one = (jnp.ones(()), jnp.ones(()))
        kl = (jnp.float32(total), jnp.float32(tokens))
        return -params["policy"], {"loss": one, "approx_kl": kl, "ratio_max": one}

    tx, model = optax.sgd(1.0), Model(optimum.SHAPE)
    state = states.TrainState.create({"policy": jnp.zeros(())}, tx)
    state, _ = epochs.minibatch_epochs(
        epochs.Learner(config, model, tx, loss), state, jnp.arange(4), None, KEY
    )
    assert float(state.params["policy"]) == applied  # 1 per update


def test_early_stop_is_of_one_iteration():
    algorithm, state, reference = begin(epochs=4, target_kl=1e-9)
    shares = []
    for step in range(2):
        state, _, metrics = iterate(
            algorithm, state, reference, jax.random.fold_in(KEY, step)
        )
        shares.append(metrics["updated"])
    assert shares == [1 / 4, 1 / 4]


def test_pitfall_19_every_epoch_visits_every_episode_in_a_new_order():
    """The parameter [i, j] counts how often episodes i and j were in one minibatch."""
    n, config = (
        8,
        optimum.ppo_config(
            1, **PLAIN | {"batch_size": 8, "epochs": 3, "minibatches": 4}
        ),
    )

    def loss(params, ids, key):
        row = jax.nn.one_hot(ids, n).sum(0)
        one = (jnp.ones(()), jnp.ones(()))
        return -jnp.sum(params["policy"] * row[:, None] * row), {
            "loss": one,
            "approx_kl": one,
            "ratio_max": one,
        }

    tx = optax.sgd(1.0)
    state = states.TrainState.create({"policy": jnp.zeros((n, n))}, tx)
    learner = epochs.Learner(config, Model(optimum.SHAPE), tx, loss)
    state, _ = epochs.minibatch_epochs(learner, state, jnp.arange(n), None, KEY)
    together = np.asarray(state.params["policy"])
    np.testing.assert_array_equal(np.diag(together), 3)
    np.testing.assert_array_equal(
        together.sum(1), 6
    )  # itself and one other, three times
    assert (together == 1).any()  # not the same companion in every epoch


@pytest.mark.parametrize(
    ("unit", "added"), [("token", 1.5 * 10), ("sequence", 1.5 * 10 * 4 / 2)]
)
def test_pitfall_26_the_unit_of_the_pretraining_loss_is_in_its_name(
    unit, added, monkeypatch
):
    """4 tokens in 2 sequences: the mean over sequences of sums is twice the mean over tokens."""

    def mean_of_ten(model, balanced):
        pair = (jnp.float32(40.0), jnp.float32(4.0))
        return lambda params, batch, key: (10 * params["w"], {"loss": pair})

    monkeypatch.setattr(epochs, "language_loss", mean_of_ten)
    config = optimum.ppo_config(
        1, **PLAIN | {"ptx": PtxConfig(coefficient=1.5, unit=unit)}
    )
    mask = jnp.array([[1.0, 1, 1], [1, 0, 0]])
    text = TokenBatch(
        mask=mask, tokens=None, targets=None, segment_ids=None, positions=None
    )
    params, grads = {"w": jnp.ones(())}, {"w": jnp.float32(7.0)}
    learner = epochs.Learner(config, Model(optimum.SHAPE), optax.sgd(1.0), None)
    grads, ptx_loss = epochs._add_ptx(learner, grads, params, None, text)
    assert float(grads["w"]) == 7.0 + added
    # Nats per token, either way.
    assert finalize(jax.device_get({"ptx_loss": ptx_loss})) == {"ptx_loss": 10.0}


@pytest.mark.parametrize("unit, microbatches", [("token", 1), ("sequence", 2)])
def test_pitfall_26_gradients_of_ptx_are_added_in_the_unit_that_is_named(
    unit, microbatches
):
    """theta - lr (g_ppo + gamma g_lm).

    Two sequences an episode, of unequal length, do not dilute PPO's gradient.
    """
    gamma = 1.5
    tokens = jax.random.randint(jax.random.key(1), (64, 4), 1, 6)
    mask = (jnp.arange(4) < jnp.where(jnp.arange(64) % 2, 4, 2)[:, None]).astype(
        jnp.float32
    )
    text = TokenBatch(
        tokens=tokens,
        targets=tokens[:, ::-1],
        mask=mask,
        segment_ids=jnp.ones_like(tokens),
        positions=jnp.broadcast_to(jnp.arange(4), (64, 4)).astype(jnp.int32),
    )
    algorithm, state, reference = begin()
    loss = language_loss(algorithm.model)
    grads = jax.jit(jax.grad(lambda p: loss(p, text, None)[0]))(reference)
    scale = gamma * (
        3.0 if unit == "sequence" else 1.0
    )  # 3 tokens a sequence on average
    plain = copy(iterate(algorithm, state, reference)[0].params["policy"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * scale * g, plain, grads)
    mixed = begin(
        ptx=PtxConfig(coefficient=gamma, unit=unit, ratio=2), microbatches=microbatches
    )
    state, _, metrics = iterate(*mixed, text=text)
    assert_close(state.params["policy"], expected, rtol=1e-4, atol=2e-6)
    assert metrics["ptx_loss"] > 0


def test_every_minibatch_of_text_lies_over_all_devices():
    """4 devices with 4 of 16 rows each.

    Each has 2 of the 8 of either minibatch, not 4 of one and none of the other.
    """
    layout = make_layout(MeshConfig(data=4))
    x = np.arange(48, dtype=np.int32).reshape(16, 3)
    with layout.use():
        y = jax.jit(lambda x: epochs._cycle(x, 2, 1))(layout.put(x))
    assert y.sharding.shard_shape(y.shape) == (2, 2, 3)
    np.testing.assert_array_equal(y, x.reshape(2, 8, 3))


def test_ptx_gives_every_minibatch_of_an_epoch_text_of_its_own():
    rows = np.asarray(epochs._cycle(jnp.arange(24), 4, 2))
    assert rows.shape == (8, 6)
    np.testing.assert_array_equal(np.sort(rows[:4].ravel()), np.arange(24))
    np.testing.assert_array_equal(rows[:4], rows[4:])


# ------------------------------------------------------------------ the whole stage


@pytest.mark.parametrize("head", ["loaded", "zero", "normal"])
def test_where_the_value_function_begins(head, conversations, finished):
    values = stage_values("ppo", conversations, finished, value_head=head)
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    with layout.use():
        stage = stages.find("ppo").build(recipe.check(values, "ppo"), layout)
        value = stage.start(
            states.create_sharded(stage.init, KEY, stage.axes, layout)
        ).params["value"]
    reward = store.load(finished / "04_reward", layout).params
    assert_close(value["backbone"], reward["backbone"])
    kernel = np.asarray(value["head"]["kernel"])
    if head == "loaded":
        assert_close(value["head"], reward["head"])
    elif head == "zero":
        np.testing.assert_array_equal(kernel, 0)
    else:
        assert apart(kernel, reward["head"]["kernel"]) > 1e-3
        assert 0.5 < kernel.std() * np.sqrt(17) < 1.7


def test_the_average_begins_at_the_policy_and_is_what_is_kept(conversations, finished):
    values = stage_values("ppo", conversations, finished)
    assert values["ema"] > 0
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    with layout.use():
        stage = stages.find("ppo").build(recipe.check(values, "ppo"), layout)
        state = stage.start(states.create_sharded(stage.init, KEY, stage.axes, layout))
    assert_close(
        state.extra["ema"]["policy"], store.load(finished / "02_sft", layout).params
    )
    average = {"policy": jax.tree.map(lambda x: x + 1, state.extra["ema"]["policy"])}
    kept = stage.finish(state.replace(extra={**state.extra, "ema": average})).models
    assert_close(kept["model"].params, average["policy"])
    assert_close(kept["value"].params, state.params["value"])


@pytest.mark.nightly
def test_four_devices_give_what_one_gives_with_every_option(conversations, finished):
    options = {
        "kl": {"coefficient": 0.1, "place": "loss", "estimator": "k3"},
        "behavior_logprobs": "forward",
        "whiten_rewards": "minibatch",
        "target_kl": 1.0,
        "truncate": {"token": "e", "after": 1},
        "value": "shared",
    }
    values = stage_values("ppo", conversations, finished, **options)
    one, params = run_steps("ppo", values, make_layout(MeshConfig(), jax.devices()[:1]))
    four, others = run_steps("ppo", values, make_layout(MeshConfig(data=4)))
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)
        assert a["updated"] == 1 and 0 <= a["accepted"] <= 1
    assert_close(params, others, rtol=1e-3, atol=1e-4)


REFUSED = {
    "in the reward it must be k1, k2 or k3": {"kl": {"estimator": "sequence"}},
    "kl.coefficient=0: must be > 0 with a target": {
        "kl": {"coefficient": 0.0, "target": 2.0, "horizon": 100}
    },
    "kl.horizon=0: must be > 0 with a target": {"kl": {"target": 2.0}},
    "is for the group stage": {"kl": {"place": "loss", "estimator": "grpo"}},
    "needs stop_at_eos=True, without it no response ends": {
        "missing_eos": "penalty",
        "stop_at_eos": False,
    },
    "after=8: must be below max_new_tokens=8": {"truncate": {"token": ".", "after": 8}},
    "target_kl=0.1: must be 0 if an iteration has one update": {
        "target_kl": 0.1,
        "epochs": 1,
        "minibatches": 1,
    },
    "with whiten_rewards=.minibatch.": {
        "whiten_rewards": "minibatch",
        "whiten_advantages": "batch",
    },
    "ema=1.0: expected float >= 0 and < 1": {"ema": 1.0},
    "lam=1.5: expected float >= 0 and <= 1": {"lam": 1.5},
    "clip=0.0: expected float >= 1.2e-38": {"clip": 0.0},
    "ptx.ratio=0: expected int >= 1": {
        "ptx": {"coefficient": 1.0, "ratio": 0, "length": 32}
    },
    "temperature=0.0: expected float >= 0.0001": {"temperature": 0.0},
    "epochs=0: expected int >= 1": {"epochs": 0},
    "batch_size=16: must be divisible by minibatches=3": {"minibatches": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_meant_is_refused(message):
    values = stages.stage_config(
        "ppo",
        init_from="x",
        reward="y",
        prompt_length=24,
        max_new_tokens=8,
        batch_size=16,
        steps=2,
        **REFUSED[message],
    )
    with pytest.raises(ConfigError, match=message) as refused:
        one = make_layout(MeshConfig(), jax.devices()[:1])
        ppo.validate(recipe.check(to_dict(values), "ppo"), one, None)
    assert "\n" not in str(refused.value) and "ppo" in str(refused.value)


def test_the_loss_on_held_out_text_is_that_of_an_evaluation(
    conversations, finished, tmp_path
):
    """The loss that PPO logs at its end, and `evaluate` on the saved policy."""
    spec = f"jsonl:{conversations}/test.jsonl"
    source = {"spec": spec, "kind": "messages", "split": "all"}
    values = stage_values("ppo", conversations, finished)
    text = {"sources": (source,), "length": 28, "batches": 2}
    policy = tmp_path / "ppo"
    recipe.run_stage(values | {"eval_text": text, "ema": 0.0}, policy)
    logged = [
        row
        for line in (policy / "metrics.jsonl").read_text().splitlines()
        if "ppo/val_text_loss" in (row := json.loads(line))
    ]
    assert len(logged) > 1
    assert len({row["ppo/val_text_loss"] for row in logged}) == len(logged)
    evaluation = stage_values("evaluate", conversations, finished)
    evaluation |= {"policy": str(policy), "batch_size": values["batch_size"]}
    evaluation["tax"] = {"texts": (source,), "length": 28, "batches": 2}
    measured = recipe.run_stage(evaluation, tmp_path / "evaluate")
    for name in ("loss", "nats_per_byte"):
        expected = measured[f"evaluate/text_{name}_policy"]
        assert logged[-1][f"ppo/val_text_{name}"] == pytest.approx(expected, rel=1e-6)


def test_held_out_text_longer_than_the_context_is_refused(
    conversations, finished, tmp_path
):
    values = stage_values("ppo", conversations, finished) | {
        "eval_text": {"length": 33}
    }
    with pytest.raises(ConfigError, match=r"ppo.eval_text.length=33 is longer than"):
        recipe.run_stage(values, tmp_path / "run")
