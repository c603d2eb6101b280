"""Low-rank adapters against their equation, and against the full gradient by the chain rule."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.models import Model, blocks, lora
from rlhfjax.models.lora import LoraConfig
from rlhfjax.state import merge_params
from tests.models.families import FAMILIES, random_params, random_trained, tokens

ALL = LoraConfig(rank=3, alpha=6.0, targets="attention|mlp")
SCANNED = dataclasses.replace(FAMILIES["llama-gqa"], scan_layers=True)
SHAPES = {"gpt2": FAMILIES["gpt2"], "scanned": SCANNED}


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


@pytest.fixture(params=SHAPES, scope="module")
def world(request):
    """(model, its base, adapters with an effect)."""
    model = Model(SHAPES[request.param], lora=ALL)
    return model, random_params(model), random_trained(model)


def without_effect(adapters):
    """As they are born: B is 0."""
    return jax.tree.map_with_path(
        lambda path, x: x * 0 if path[-1].key == "lora_b" else x, adapters
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, key=None):
    return model.logits(params, model.hidden(params, tokens(2, 9), key=key))


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_with_new_adapters_is_the_one_without_to_the_bit(bias):
    """Operation by operation: compiled as a whole, two programs may sum in two orders."""
    project = blocks.Project((24, 40), ("embed", "mlp"), 0.3, bias, lora=ALL)
    x = jax.random.normal(jax.random.key(0), (2, 5, 24))
    params = nn.meta.unbox(project.init(jax.random.key(1), x)["params"])
    assert {"lora_a", "lora_b"} < params.keys() and np.any(params["lora_a"])
    before, after = (
        project.apply({"params": p}, x) for p in (lora.base(params), params)
    )
    np.testing.assert_array_equal(before, after)


def test_adapters_begin_without_effect_and_have_one_when_moved(world):
    model, base, adapters = world
    plain = logits_of(model, base)
    np.testing.assert_allclose(
        logits_of(model, merge_params(base, without_effect(adapters))),
        plain,
        rtol=1e-6,
        atol=1e-6,
    )
    assert np.abs(logits_of(model, merge_params(base, adapters)) - plain).max() > 0.01


def test_adapters_have_axes_for_every_dimension(world):
    model, _, adapters = world
    axes = jax.tree.map(
        lambda names: len(names),
        model.trained_axes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert axes == jax.tree.map(jnp.ndim, adapters)


def test_a_model_with_adapters_is_born_with_the_base_of_one_without():
    model = Model(dataclasses.replace(FAMILIES["gpt2"], n_layers=1), lora=ALL)
    ours, plain = (
        jax.jit(m.init)(jax.random.key(0)) for m in (model, Model(model.config))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_b_is_zero_and_a_is_uniform_of_variance_one_third_over_the_inputs():
    """loralib: kaiming_uniform(a = sqrt(5)), the bound sqrt(6 / (1 + 5) / in)."""
    wide = dataclasses.replace(FAMILIES["llama"], d_model=128, d_ff=256)
    model = Model(
        dataclasses.replace(wide, n_layers=1), lora=dataclasses.replace(ALL, rank=16)
    )
    trained = paths(jax.jit(model.init_trained)(jax.random.key(0)))
    for path, x in trained.items():
        if path.endswith("lora_b"):
            assert not np.any(x)
            continue
        inputs = x.size // 16
        assert inputs == (256 if "down" in path else 128)
        assert 0.95 * inputs**-0.5 < np.abs(x).max() <= inputs**-0.5
        assert np.mean(np.square(x)) == pytest.approx(1 / (3 * inputs), rel=0.1)


def test_merged_is_attached(world):
    model, base, adapters = world
    whole = merge_params(base, adapters)
    merged = lora.merge(ALL, whole)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    got, expected = logits_of(Model(model.config), merged), logits_of(model, whole)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_merging_is_the_equation_by_hand():
    kernel, a, b = (
        jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        jnp.array([[1.0], [2.0]]),
        jnp.array([[10.0, 100.0]]),
    )
    merged = lora.merge(
        LoraConfig(rank=1, alpha=0.5),
        {"layer": {"kernel": kernel, "lora_a": a, "lora_b": b}},
    )
    np.testing.assert_array_equal(
        merged["layer"]["kernel"], [[6.0, 52.0], [13.0, 104.0]]
    )


def test_gradients_are_the_chain_rule_through_the_merged_kernels(world):
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW'; nothing else gets a gradient."""
    model, base, adapters = world

    def loss(params, model):
        hidden = model.hidden(params, tokens(2, 9))
        return model.cross_entropy(
            params, hidden, tokens(2, 9, seed=3), jnp.ones((2, 9))
        )[0]

    got = jax.jit(jax.grad(lambda t: loss(merge_params(base, t), model)))(adapters)
    full = jax.jit(jax.grad(lambda p: loss(p, Model(model.config))))(
        lora.merge(ALL, merge_params(base, adapters))
    )
    assert jax.tree.structure(got) == jax.tree.structure(adapters)
    flat_full, flat = (
        {path: np.asarray(x) for path, x in paths(tree).items()}
        for tree in (full, adapters)
    )
    for path, x in paths(got).items():
        d_kernel = flat_full[path.rsplit("/", 1)[0] + "/kernel"]
        a, b = (flat[path[:-1] + letter] for letter in "ab")
        if model.config.scan_layers:
            expected = np.stack(
                [
                    chain_rule(*layer, path[-1])
                    for layer in zip(a, b, d_kernel, strict=True)
                ]
            )
        else:
            expected = chain_rule(a, b, d_kernel, path[-1])
        np.testing.assert_allclose(
            x, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max(), err_msg=path
        )


def chain_rule(a, b, d_kernel, letter):
    flat_a, flat_b, d_kernel = (
        a.reshape(-1, 3),
        b.reshape(3, -1),
        d_kernel.reshape(-1, b[0].size),
    )
    if letter == "a":
        return (2.0 * (d_kernel @ flat_b.T)).reshape(a.shape)
    return (2.0 * (flat_a.T @ d_kernel)).reshape(b.shape)


@pytest.mark.parametrize(
    "targets, expected",
    [
        (
            LoraConfig.targets,
            {f"layer_{i}/attention/{n}" for i in (0, 1) for n in ("query", "value")},
        ),
        ("layer_1/mlp", {f"layer_1/mlp/{n}" for n in ("gate", "up", "down")}),
        ("out$", {"layer_0/attention/out", "layer_1/attention/out"}),
    ],
)
def test_targets_choose_projections_by_their_path(targets, expected):
    model = Model(FAMILIES["llama"], lora=LoraConfig(rank=2, targets=targets))
    assert paths(model.trained_shapes()).keys() == {
        f"backbone/layers/{path}/{name}" for path in expected for name in lora.NAMES
    }


def test_targets_that_are_nowhere_are_named_with_what_there_is():
    model = Model(FAMILIES["llama"], lora=LoraConfig(rank=2, targets="q_proj"))
    with pytest.raises(
        ConfigError,
        match=r"lora.targets='q_proj' is found in none of backbone/layers/layer_0/attention",
    ):
        model.trained_axes()


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"targets": "(query"},
            r"lora.targets='\(query' is no regular expression: missing \)",
        ),
        ({"rank": -1}, "lora.rank=-1: expected int >= 0"),
        ({"rank": 1, "alpha": 0.0}, "lora.alpha=0.0: expected float >= 1.2e-38"),
        ({"rank": 1, "dropout": 1.0}, "lora.dropout=1.0: expected float >= 0 and < 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build(LoraConfig, values, "lora")


def test_dropout_is_of_the_adapters_input_alone():
    """With W = 0 and A = B = the identity the output is the dropped-out input: 0 or x / (1 - p)."""
    config = LoraConfig(rank=64, alpha=64.0, dropout=0.25)
    project = blocks.Project((64, 64), ("embed", "mlp"), 0.02, False, lora=config)
    params = {
        "kernel": jnp.zeros((64, 64)),
        "lora_a": jnp.eye(64),
        "lora_b": jnp.eye(64),
    }
    x = jax.random.normal(jax.random.key(0), (4, 8, 64))
    apply = jax.jit(lambda rngs: project.apply({"params": params}, x, rngs=rngs))
    np.testing.assert_allclose(apply(None), x, rtol=1e-6)
    ratio = np.asarray(apply({"lora": jax.random.key(1)})) / np.asarray(x)
    dropped = np.isclose(ratio, 0)
    np.testing.assert_allclose(ratio[~dropped], 1 / 0.75, rtol=1e-5)
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)


def test_dropout_needs_a_key_and_adapters_with_an_effect():
    model = Model(FAMILIES["gpt2"], lora=dataclasses.replace(ALL, dropout=0.5))
    base, adapters = random_params(model), random_trained(model)
    assert model.drops and not Model(FAMILIES["gpt2"], lora=ALL).drops
    keys = (None, jax.random.key(2), jax.random.key(3))
    none, *some = (
        np.asarray(logits_of(model, merge_params(base, adapters), key)) for key in keys
    )
    assert min(np.abs(some[0] - none).max(), np.abs(some[0] - some[1]).max()) > 1e-3
    unmoved = logits_of(
        model, merge_params(base, without_effect(adapters)), keys[1]
    )  # B is 0: what A sees does not matter
    np.testing.assert_allclose(unmoved, logits_of(model, base), rtol=1e-5, atol=1e-5)


def test_a_scalar_head_is_trained_beside_the_adapters():
    model = Model(FAMILIES["llama"], "scalar", LoraConfig(rank=2))
    trained = model.trained_shapes()
    assert trained["head"].keys() == {"kernel", "bias"}
    assert {path.split("/")[-1] for path in paths(trained["backbone"])} == set(
        lora.NAMES
    )
    assert (
        paths(Model(FAMILIES["llama"], "scalar").trained_shapes()).keys()
        == paths(model.shapes()).keys()
    )


def test_attaching_copies_nothing():
    x, y, z = jnp.zeros(3), jnp.ones(2), jnp.ones(1)
    whole = merge_params(
        {"a": {"kernel": x}, "head": z}, {"a": {"lora_a": y}, "head": y}
    )
    assert (
        whole["a"]["kernel"] is x and whole["a"]["lora_a"] is y and whole["head"] is y
    )
    assert merge_params({}, {"a": x})["a"] is x
