import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos import preference
from tests.jitted import jitted

preference = jitted(preference)


def test_pitfall_39_the_same_tokens_are_no_pair_whatever_their_labels():
    # Labels 2, 1, 0; completions 0 and 1 have the same tokens: of (0,1), (0,2), (1,2) the first is
    # none.
    labels, same = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[0, 0, 2]])
    pairs = preference.untied_pairs(labels, jnp.ones((1, 3)), same)
    np.testing.assert_array_equal(pairs[0], [[0, 0, 1], [0, 0, 1], [0, 0, 0]])
    # r = 0, 0, -1 for them: each pair is -log sigmoid(1) = 0.313262, and the prompt their mean.
    rewards = jnp.array([[0.0, 0.0, -1.0]])
    loss, metrics = preference.kwise_loss(rewards, labels, jnp.ones((1, 3)), same)
    np.testing.assert_allclose(loss, 0.313262, rtol=1e-5)
    assert [float(x) for x in metrics["accuracy"]] == [2, 2]


def loop_kwise(rewards, labels, valid):
    """Ouyang et al. 2022, eq. 1, pair by pair; ties dropped."""
    prompts, correct, margin, n_pairs = [], 0.0, 0.0, 0
    for r, s, v in zip(rewards, labels, valid, strict=True):
        losses = []
        for i, j in itertools.combinations(range(len(r)), 2):
            if not (v[i] and v[j]) or s[i] == s[j]:
                continue
            w, l = (i, j) if s[i] > s[j] else (j, i)
            difference = float(r[w]) - float(r[l])
            losses.append(np.log1p(np.exp(-difference)))
            correct += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
            margin += difference
        if losses:
            prompts.append(sum(losses) / len(losses))
            n_pairs += len(losses)
    return prompts, correct, margin, n_pairs


def test_by_hand():
    # Prompt 1: r = (2, 0, 1), ranks best to worst 0, 2, 1 -> pairs (0,2) d = 1, (0,1) d = 2, (2,1)
    # d = 1.   -log sigmoid(1) = 0.313262, -log sigmoid(2) = 0.126928: (2 * 0.313262 + 0.126928) / 3
    # = 0.251151 Prompt 2: labels (1, 1, 0): the tie is dropped, d = 0 - 3 = -3 and 3 - 3 = 0:
    # (3.048587 + 0.693147) / 2 = 1.870867 Prompt 3: all tied, no weight. Loss (0.251151 + 1.870867)
    # / 2 = 1.061009.
    rewards = jnp.array([[2.0, 0.0, 1.0], [0.0, 3.0, 3.0], [5.0, 6.0, 7.0]])
    labels = jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    loss, metrics = preference.kwise_loss(rewards, labels, jnp.ones((3, 3)))
    np.testing.assert_allclose(loss, 1.061009, rtol=1e-5)
    assert float(metrics["loss"][1]) == 2
    # 3 right; one wrong and one equal (a half): 3.5 of 5. Margins 1 + 2 + 1 - 3 + 0 = 1.
    assert [float(x) for x in metrics["accuracy"]] == [3.5, 5]
    np.testing.assert_allclose(metrics["margin"][0], 1.0, rtol=1e-6)


@hypothesis.given(
    st.lists(st.integers(0, 3), min_size=20, max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_equals_the_loop_for_any_ties_and_group_sizes(labels, valid):
    rewards = np.random.default_rng(4).normal(size=(4, 5)).astype(np.float32)
    rewards[0, 1] = rewards[0, 3]
    labels, valid = (
        np.array(labels, np.float32).reshape(4, 5),
        np.array(valid, np.float32).reshape(4, 5),
    )
    loss, metrics = preference.kwise_loss(
        jnp.array(rewards), jnp.array(labels), jnp.array(valid)
    )
    prompts, correct, margin, n_pairs = loop_kwise(rewards, labels, valid)
    np.testing.assert_allclose(loss, sum(prompts) / max(len(prompts), 1), rtol=1e-5)
    assert float(metrics["loss"][1]) == len(prompts)
    assert [float(x) for x in metrics["accuracy"]] == [correct, n_pairs]
    np.testing.assert_allclose(metrics["margin"][0], margin, rtol=1e-4, atol=1e-5)


def test_a_prompt_counts_once_whatever_its_k():
    # The pair's loss is log 2 in both prompts; K = 2 and K = 4 weigh alike, and so do their
    # gradients in total.
    rewards, labels = (
        jnp.zeros((2, 4)),
        jnp.array([[1.0, 0.0, 9.0, 9.0], [3.0, 2.0, 1.0, 0.0]]),
    )
    valid = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    gradient = np.array(
        jax.grad(lambda r: preference.kwise_loss(r, labels, valid)[0])(rewards)
    )
    # d/dr of log 2's: -1/2 per pair on the winner. Prompt 1: 1 pair, half the mean: -1/4. Prompt 2:
    # the best is in 3 of 6 pairs: -1/2 * 3/6 * 1/2 = -1/8, the next wins 2 and loses 1: -1/24, and
    # mirrored.
    np.testing.assert_allclose(
        gradient, [[-1 / 4, 1 / 4, 0, 0], [-1 / 8, -1 / 24, 1 / 24, 1 / 8]], rtol=1e-5
    )


def test_ranks_are_labels_negated():
    rewards = jnp.array([[0.3, -0.2, 1.0]])
    by_score, _ = preference.kwise_loss(
        rewards, jnp.array([[0.9, 0.1, 0.5]]), jnp.ones((1, 3))
    )
    by_rank, _ = preference.kwise_loss(
        rewards, -jnp.array([[1.0, 3.0, 2.0]]), jnp.ones((1, 3))
    )
    np.testing.assert_allclose(by_score, by_rank)


def test_an_absent_completion_is_nowhere():
    rewards = jnp.array([[0.3, -0.2, jnp.nan]])
    labels, valid = jnp.array([[1.0, 0.0, jnp.nan]]), jnp.array([[1.0, 1.0, 0.0]])
    (loss, _), gradient = jax.value_and_grad(preference.kwise_loss, has_aux=True)(
        rewards, labels, valid
    )
    np.testing.assert_allclose(loss, np.log1p(np.exp(-0.5)), rtol=1e-6)
    assert np.all(np.isfinite(gradient)) and gradient[0, 2] == 0


def test_large_differences_do_not_overflow():
    loss, _ = preference.kwise_loss(
        jnp.array([[-500.0, 500.0]]), jnp.array([[1.0, 0.0]]), jnp.ones((1, 2))
    )
    np.testing.assert_allclose(loss, 1000.0)
