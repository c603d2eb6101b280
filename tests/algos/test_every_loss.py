"""What must hold of every loss: its gradient, and what may not change it."""

import dataclasses
import functools
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import (
    combine,
    direct,
    dpo_variants,
    group,
    kl,
    policy,
    preference,
    process,
    ranking,
    value,
)

B, T = 4, 5


def token_mask():
    """5, 2, 2 and 3 tokens; two rows with holes."""
    return np.array(
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 1, 0]], float
    )


def token_columns(n):
    return [np.random.default_rng(i).normal(size=(B, T)) * 0.4 - 1 for i in range(n)]


def row_columns(n):
    return [np.random.default_rng(50 + i).normal(size=B) - 2 for i in range(n)]


ROW_WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
LABELS = np.array(
    [[3.0, 1, 2, 2, 0], [1, 0, 5, 5, 5], [0, 4, 1, 7, 7], [2, 2, 3, 1, 9]]
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss of arrays whose first axis is the batch; the last of them is the mask, the first is
    differentiated.
    """

    loss: Callable
    columns: Callable[[], list]
    smooth: bool = True  # False: its gradient is by design not that of its value
    pads: bool = True  # masked columns may be appended to the [b, t] arrays
    logprobs: tuple[int, ...] = (
        0,
    )  # which of the arrays are log-probabilities, or may be

    def arrays(self):
        return [jnp.asarray(x, jnp.result_type(float)) for x in self.columns()]


def tokens(n):
    return lambda: [*token_columns(n), token_mask()]


def rows(n):
    return lambda: [*row_columns(n), ROW_WEIGHT]


def grouped(n):
    return lambda: [*token_columns(n), *row_columns(1), token_mask()]


def kwise():
    return [*token_columns(1), LABELS, token_mask()]


def combined(logprobs, values, old, returns, mask):
    return combine.add_losses(
        policy=(1.0, policy.ppo_loss(logprobs, old, returns, mask, clip=0.2)),
        value=(0.1, value.clipped_value_loss(values, old, returns, mask, clip=0.2)),
    )


p = functools.partial
CASES = {
    "ppo": Case(p(policy.ppo_loss, clip=0.2), tokens(3), logprobs=(0, 1)),
    "entropy": Case(p(policy.entropy_bonus, coefficient=0.3), tokens(1)),
    "clipped_value": Case(
        p(value.clipped_value_loss, clip=0.2), tokens(3), logprobs=(0, 1, 2)
    ),
    "value": Case(value.value_loss, tokens(2), logprobs=(0, 1)),
    "policy_and_value": Case(combined, tokens(4), logprobs=(0, 2)),
    "kl_k1": Case(kl.kl_loss_k1, tokens(3), logprobs=(0, 1, 2)),
    "kl_k2": Case(kl.kl_loss_k2, tokens(2), logprobs=(0, 1)),
    "kl_k3": Case(kl.kl_loss_k3, tokens(3), logprobs=(0, 1, 2)),
    "kl_sequence": Case(kl.kl_loss_sequence, tokens(2), smooth=False, logprobs=(0, 1)),
    "rloo": Case(group.rloo_loss, grouped(1)),
    "grpo": Case(
        p(group.grpo_loss, clip=0.2, beta=0.04), grouped(3), logprobs=(0, 1, 2)
    ),
    "dr_grpo": Case(
        p(group.dr_grpo_loss, clip=0.2, length=16), grouped(2), logprobs=(0, 1)
    ),
    "dapo": Case(
        p(group.dapo_loss, clip_low=0.2, clip_high=0.28), grouped(2), logprobs=(0, 1)
    ),
    "kwise": Case(preference.kwise_loss, kwise),
    "centering": Case(
        lambda r, labels, valid: ranking.centering_loss(
            r, preference.untied_pairs(labels, valid)
        ),
        kwise,
    ),
    "plackett_luce": Case(ranking.plackett_luce_loss, kwise),
    "best_of_k": Case(
        lambda r, best, valid: ranking.best_of_k_loss(
            r, best[:, 0].astype(jnp.int32), valid
        ),
        lambda: [
            *token_columns(1),
            np.array([[0.0] * T, [1] * T, [2] * T, [3] * T]),
            token_mask(),
        ],
    ),
    "steps": Case(
        process.step_loss, lambda: [token_columns(1)[0], LABELS / 9, token_mask()]
    ),
    "bradley_terry": Case(
        ranking.bradley_terry_loss, rows(2), pads=False, logprobs=(0, 1)
    ),
    "margin": Case(ranking.margin_loss, rows(3), pads=False, logprobs=(0, 1)),
    "smoothed": Case(
        p(ranking.smoothed_loss, smoothing=0.1), rows(2), pads=False, logprobs=(0, 1)
    ),
    "soft_label": Case(
        ranking.soft_label_loss,
        lambda: [*row_columns(2), np.array([0.9, 0.5, 0.3, 0.2]), ROW_WEIGHT],
        pads=False,
        logprobs=(0, 1),
    ),
    "rao_kupper": Case(
        p(ranking.rao_kupper_loss, eta=0.4),
        lambda: [*row_columns(2), np.array([1.0, 0.5, 0.5, 0.0]), ROW_WEIGHT],
        pads=False,
        logprobs=(0, 1),
    ),
    "dpo": Case(
        p(direct.dpo_loss, beta=0.3), rows(4), pads=False, logprobs=(0, 1, 2, 3)
    ),
    "cdpo": Case(
        p(direct.cdpo_loss, beta=0.3, smoothing=0.1),
        rows(4),
        pads=False,
        logprobs=(0, 1, 2, 3),
    ),
    "robust_dpo": Case(
        p(dpo_variants.robust_dpo_loss, beta=0.3, smoothing=0.1),
        rows(4),
        pads=False,
        logprobs=(0, 1, 2, 3),
    ),
    "dpo_norm": Case(
        p(dpo_variants.dpo_norm_loss, beta=5.0),
        lambda: [
            *row_columns(4),
            np.array([3.0, 1, 7, 2]),
            np.array([1.0, 9, 2, 4]),
            ROW_WEIGHT,
        ],
        pads=False,
        logprobs=(0, 1, 2, 3),
    ),
    "irpo": Case(
        p(dpo_variants.irpo_loss, beta=0.3, alpha=0.7),
        rows(5),
        pads=False,
        logprobs=(0, 1, 2, 3, 4),
    ),
    "irpo_likelihood": Case(
        lambda mean, *rest: dpo_variants.irpo_loss(
            *rest[:4], mean, rest[4], beta=0.3, alpha=0.7
        ),
        rows(5),
        pads=False,
        logprobs=(0, 1, 2, 3, 4),
    ),
    "dpop": Case(
        p(dpo_variants.dpop_loss, beta=0.3, penalty=5.0),
        rows(4),
        pads=False,
        logprobs=(0, 1, 2, 3),
    ),
    "ipo": Case(
        p(direct.ipo_loss, beta=0.3), rows(4), pads=False, logprobs=(0, 1, 2, 3)
    ),
    "simpo": Case(
        p(direct.simpo_loss, beta=2.0, margin=1.0), rows(2), pads=False, logprobs=(0, 1)
    ),
    "orpo": Case(
        p(direct.orpo_loss, beta=0.1),
        lambda: [*(-np.abs(c) for c in row_columns(2)), ROW_WEIGHT],
        pads=False,
        logprobs=(0, 1),
    ),
    "kto": Case(
        p(direct.kto_loss, kl=0.7, beta=0.3),
        lambda: [*row_columns(2), np.array([1.0, 0.0, 1.0, 0.0]), ROW_WEIGHT],
        pads=False,
        logprobs=(0, 1),
    ),
}
every_loss = pytest.mark.parametrize("name", CASES)


@functools.cache
def compiled(name):
    """(loss, metrics), gradient with respect to the first array."""
    return jax.jit(jax.value_and_grad(CASES[name].loss, has_aux=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradient_equals_finite_differences_in_float64(name):
    with jax.enable_x64(True):
        x, *rest = CASES[name].arrays()
        assert x.dtype == jnp.float64

        @jax.jit
        def both(x):
            loss = lambda x: CASES[name].loss(x, *rest)[0]  # noqa: E731
            step = 1e-5 * jnp.eye(x.size).reshape(x.size, *x.shape)
            return jax.grad(loss)(x), (
                jax.vmap(loss)(x + step) - jax.vmap(loss)(x - step)
            ) / 2e-5

        gradient, differences = both(x)
        np.testing.assert_allclose(
            gradient.reshape(-1), differences, rtol=1e-6, atol=1e-9
        )
        assert np.any(np.array(gradient) != 0)


@every_loss
def test_the_scalar_is_the_sum_over_the_weight(name):
    (loss, metrics), _ = compiled(name)(*CASES[name].arrays())
    total, weight = metrics["loss"]
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)


@every_loss
def test_pitfall_17_accumulation_over_microbatches_is_the_whole_batch(name):
    # The rows have 5, 2, 2 and 3 tokens (or weights 1, 1, 0, 1): a mean of means would differ. Sums
    # and weights (and gradients times weights) are added over 4 microbatches, then divided once.
    arrays = CASES[name].arrays()
    (loss, _), gradient = compiled(name)(*arrays)
    total, weight, gradients = 0.0, 0.0, []
    for i in range(B):
        (_, metrics), part = compiled(name)(*(a[i : i + 1] for a in arrays))
        total, weight = total + metrics["loss"][0], weight + metrics["loss"][1]
        gradients.append(part * metrics["loss"][1])
    np.testing.assert_allclose(total / weight, loss, rtol=1e-5)
    np.testing.assert_allclose(
        np.concatenate(gradients) / weight, gradient, rtol=1e-4, atol=1e-6
    )


@every_loss
def test_the_order_of_the_batch_does_not_matter(name):
    arrays, order = CASES[name].arrays(), np.array([2, 0, 3, 1])
    (loss, metrics), gradient = compiled(name)(*arrays)
    (loss_2, metrics_2), gradient_2 = compiled(name)(*(a[order] for a in arrays))
    np.testing.assert_allclose(loss_2, loss, rtol=1e-5)
    np.testing.assert_allclose(gradient_2, gradient[order], rtol=1e-5, atol=1e-7)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        metrics_2,
        metrics,
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.pads])
def test_padding_columns_change_nothing(name):
    *arrays, mask = CASES[name].arrays()
    (loss, metrics), gradient = compiled(name)(*arrays, mask)

    def pad(x, c):
        if x.ndim != 2:
            return x
        return jnp.pad(x, ((0, 0), (0, 2)), constant_values=c)

    (loss_2, metrics_2), gradient_2 = compiled(name)(
        *(pad(a, 9.0) for a in arrays), pad(mask, 0.0)
    )
    np.testing.assert_allclose(loss_2, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient_2[:, :T], gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient_2[:, T:], 0)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        metrics_2,
        metrics,
    )


@every_loss
@pytest.mark.parametrize("garbage", [np.nan, -np.inf])
def test_pitfall_23_garbage_behind_the_mask_reaches_neither_loss_nor_gradient(
    name, garbage
):
    *arrays, mask = CASES[name].arrays()
    (loss, metrics), gradient = compiled(name)(*arrays, mask)
    spoilt = [
        jnp.where(mask > 0, a, garbage) if a.shape == mask.shape else a for a in arrays
    ]
    if name == "best_of_k":
        spoilt[1] = arrays[1]  # an index, not a value
    (loss_2, metrics_2), gradient_2 = compiled(name)(*spoilt, mask)
    np.testing.assert_allclose(loss_2, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient_2, gradient, rtol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics_2, metrics
    )


@every_loss
def test_pitfall_23_a_row_or_a_batch_without_tokens_is_no_nan(name):
    *arrays, mask = CASES[name].arrays()
    (loss, metrics), gradient = compiled(name)(*arrays, jnp.zeros_like(mask))
    assert float(loss) == 0 and float(metrics["loss"][1]) == 0
    np.testing.assert_array_equal(gradient, 0)
    # One empty row: the loss is that of the other three.
    emptied = mask.at[1].set(0)
    (loss, metrics), gradient = compiled(name)(*arrays, emptied)
    parts = [
        compiled(name)(*(a[i : i + 1] for a in (*arrays, mask)))[0][1]["loss"]
        for i in (0, 2, 3)
    ]
    np.testing.assert_allclose(
        loss, sum(t for t, _ in parts) / sum(w for _, w in parts), rtol=1e-5
    )
    np.testing.assert_array_equal(gradient[1], 0)
    assert all(np.isfinite(x) for pair in metrics.values() for x in pair)


# ------------------------------------------------------------------ any log-probabilities

# Where exp overflows, where a probability is 1, the ends of what may be asked.
EDGES = st.sampled_from([0.0, -1e-38, -1e-30, -80.0, -88.7, -88.8, -177.5, -1e4])
LOGPROBS = st.one_of(st.floats(-1e4, 0, width=32), EDGES)


@every_loss
@hypothesis.given(
    values=st.lists(LOGPROBS, min_size=1, max_size=6), seed=st.integers(0, 2**16)
)
@hypothesis.example(values=[0.0], seed=0)
@hypothesis.example(values=[0.0, -1e4], seed=0)
@hypothesis.settings(max_examples=25, deadline=None)
def test_pitfall_37_loss_and_gradient_are_finite_for_any_logprobs(name, values, seed):
    """Arrays of the values in any order; advantages, labels and mask are those of the case."""
    arrays, rng = CASES[name].arrays(), np.random.default_rng(seed)
    for i in CASES[name].logprobs:
        arrays[i] = jnp.asarray(
            rng.choice(np.array(values, np.float32), arrays[i].shape)
        )
    (loss, metrics), gradient = compiled(name)(*arrays)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert all(np.isfinite(x) for pair in metrics.values() for x in pair)
