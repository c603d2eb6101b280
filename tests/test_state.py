"""The state: where its arrays lie, gradients over microbatches, updates that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rlhfjax import state as states
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.state import TrainState

AXES = {"w": ("embed", "mlp"), "b": ("mlp",)}


def init(key):
    params = {"w": jax.random.normal(key, (8, 4)), "b": jnp.zeros(4)}
    return TrainState.create(
        params,
        optax.adam(1e-2),
        ema=jax.tree.map(jnp.array, params),
        count=jnp.zeros(()),
    )


def test_moments_and_averages_lie_as_their_parameter_does():
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2))
    made = states.create_sharded(init, jax.random.key(0), AXES, layout)
    adam = made.opt_state[0]
    for w in (made.params["w"], made.extra["ema"]["w"], adam.mu["w"], adam.nu["w"]):
        assert w.sharding.spec == P("fsdp", "tensor") and w.addressable_shards[
            0
        ].data.shape == (4, 2)
    for b in (made.params["b"], adam.mu["b"]):
        assert b.sharding.spec == P("tensor")
    assert (
        made.extra["count"].sharding.is_fully_replicated
        and made.step.sharding.is_fully_replicated
    )
    np.testing.assert_array_equal(
        made.params["w"], init(jax.random.key(0)).params["w"]
    )  # however it is laid out


def test_an_unannotated_parameter_is_an_error_that_names_it():
    layout = make_layout()
    with pytest.raises(
        ConfigError,
        match=r"array .*params.*w.* of shape \(8, 4\) has no logical axis names",
    ):
        states.create_sharded(init, jax.random.key(0), {"b": ("mlp",)}, layout)


def test_a_parameter_that_does_not_divide_is_an_error():
    with pytest.raises(
        ConfigError, match="axis 'mlp' of size 4 is not divisible by the 3"
    ):
        states.abstract(
            jax.eval_shape(init, jax.random.key(0)),
            AXES,
            make_layout(MeshConfig(data=1, tensor=3), jax.devices()[:3]),
        )


def loss(params, batch, key):
    """Mean over unmasked tokens of (x w - y)^2."""
    error = (batch["x"] @ params["w"] - batch["y"]) ** 2 * batch["mask"]
    total, weight = error.sum(), batch["mask"].sum()
    return total / jnp.maximum(weight, 1.0), {"loss": (total, weight)}


@pytest.fixture
def problem():
    """Eight rows of six tokens, of which row i has between none and six.

    Microbatches weigh differently.
    """
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < np.array([6, 1, 0, 2, 6, 3, 1, 5])[:, None]).astype(
        np.float32
    )
    batch = {
        "x": rng.normal(size=(8, 6, 3)),
        "y": rng.normal(size=(8, 6)),
        "mask": mask,
    }
    return {"w": jnp.array([0.3, -0.7, 1.1])}, {
        k: jnp.asarray(v, jnp.float32) for k, v in batch.items()
    }


@pytest.mark.parametrize("microbatches", (1, 2, 4, 8))
def test_pitfall_17_gradients_do_not_depend_on_the_microbatches(problem, microbatches):
    """Against the closed form 2/W sum m (x w - y) x, in float64."""
    params, batch = problem
    x, y, m, w = (
        np.asarray(a, np.float64)
        for a in (batch["x"], batch["y"], batch["mask"], params["w"])
    )
    expected = 2 * np.einsum("bt,btd->d", m * (x @ w - y), x) / m.sum()
    grads, pairs = states.gradients(
        loss, params, batch, None, microbatches=microbatches
    )
    np.testing.assert_allclose(grads["w"], expected, rtol=2e-6)
    np.testing.assert_allclose(
        pairs["loss"][0], (m * (x @ w - y) ** 2).sum(), rtol=1e-6
    )
    assert float(pairs["loss"][1]) == m.sum()


def test_every_microbatch_has_its_own_key(problem):
    params, batch = problem
    seen = []

    def noting(params, batch, key):
        jax.debug.callback(
            lambda k: seen.append(tuple(np.asarray(k).tolist())),
            jax.random.key_data(key),
        )
        return loss(params, batch, key)

    states.gradients(noting, params, batch, jax.random.key(0), microbatches=4)
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_a_batch_that_does_not_divide_is_an_error(problem):
    with pytest.raises(
        ConfigError, match="a batch of 8 does not divide into 3 microbatches"
    ):
        states.gradients(loss, *problem, None, microbatches=3)


def test_apply_gradients_is_one_update_with_the_global_norm():
    state = TrainState.create(
        {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, optax.sgd(0.1)
    )
    after, pairs = states.apply_gradients(
        state, {"a": jnp.array([2.0, 3.0]), "b": jnp.array([6.0])}, optax.sgd(0.1)
    )
    np.testing.assert_allclose(after.params["a"], [0.8, 1.7], rtol=1e-6)
    np.testing.assert_allclose(after.params["b"], [2.4], rtol=1e-6)
    assert float(pairs["grad_norm"][0]) == 7.0  # sqrt(4 + 9 + 36)
    assert int(after.step) == 0  # the stage counts its own steps


@pytest.mark.parametrize("bad", (jnp.nan, jnp.inf))
def test_a_nonfinite_gradient_is_skipped_and_counted(bad):
    tx = optax.adam(0.1)
    state = TrainState.create({"a": jnp.array([1.0, 2.0])}, tx)
    state, _ = states.apply_gradients(state, {"a": jnp.array([1.0, -1.0])}, tx)
    same, pairs = states.apply_gradients(
        state, {"a": jnp.array([1.0, bad])}, tx, skip_nonfinite=True
    )
    for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    assert float(pairs["skipped"][0]) == 1 and float(pairs["grad_norm"][1]) == 0
    good, pairs = states.apply_gradients(
        state, {"a": jnp.array([1.0, 1.0])}, tx, skip_nonfinite=True
    )
    assert float(pairs["skipped"][0]) == 0 and float(pairs["grad_norm"][1]) == 1
    assert not np.array_equal(good.params["a"], state.params["a"])


def test_all_finite_looks_at_every_float():
    assert states.all_finite({"a": jnp.ones(3), "n": jnp.int32(4)})
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not states.all_finite(
            {"a": jnp.ones(3), "b": {"c": jnp.array([[0.0, bad]])}}
        )
