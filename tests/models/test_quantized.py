"""Quantized weights and cache against the same products in floats, and how far logits move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhfjax import state
from rlhfjax.errors import ConfigError
from rlhfjax.models import Model, TransformerConfig, blocks, lora, quantized
from rlhfjax.models.attention import cached_attention, causal_attention
from rlhfjax.models.quantized import absmax, linear
from rlhfjax.models.rope import rope_tables
from rlhfjax.sampling import Sampling, generate
from tests.models.families import (
    CONFIGS,
    FAMILIES,
    random_params,
    random_trained,
    tokens,
)
from tests.sampling.test_generate import EOS, PAD, keys, left_padded, teacher_forced

WIDE = TransformerConfig(
    vocab_size=512,
    d_model=256,
    n_layers=2,
    n_heads=4,
    d_ff=512,
    max_length=64,
    n_kv_heads=2,
)


def test_absmax_by_hand():
    """Row (1, -2, 0.5): s = 2 / 127, q = (63.5 -> 64, -127, 31.75 -> 32). Zeros stay zeros."""
    got = absmax(jnp.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]), (1,))
    assert got.values.tolist() == [[64, -127, 32], [0, 0, 0]]
    np.testing.assert_allclose(got.scale, [2 / 127, 0])
    assert got.values.dtype == jnp.int8


def test_a_product_is_that_of_the_dequantized_kernel_and_so_is_its_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 3, 24))
    kernel = jax.random.normal(jax.random.key(1), (24, 10))
    q = jax.jit(lambda kernel: absmax(kernel, (0,)))(kernel)
    wide = np.asarray(q.values) * np.asarray(q.scale)
    assert np.abs(wide - kernel).max() <= q.scale.max() / 2 + 1e-7
    (got, slope), (expected, slope_wide) = products_and_gradients(linear, q, wide, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, slope_wide, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def products_and_gradients(linear, q, wide, x):
    """Of a quantized kernel and of the wide one: x W, and the gradient of sum(sin(x W)) in x."""

    def both(product):
        return product(x), jax.grad(lambda x: jnp.sum(jnp.sin(product(x))))(x)

    return both(lambda x: linear(x, *q)), both(lambda x: x @ wide)


def nf4_by_loops(x, block):
    """The nearest of the 16 values in every block of inputs, element by element."""
    codes, scales = np.zeros(x.shape, int), np.zeros((x.shape[0] // block, x.shape[1]))
    for n, j in np.ndindex(scales.shape):
        own = x[n * block : (n + 1) * block, j]
        scales[n, j] = np.abs(own).max()
        for i, value in enumerate(own):
            codes[n * block + i, j] = np.argmin(
                np.abs(value / scales[n, j] - np.array(quantized.NF4))
            )
    return codes, scales


def test_nf4_is_the_nearest_value_of_its_block():
    for width, block in (
        (128, 64),
        (96, 32),
    ):  # blocks of 64, or of what 64 and the width have in common
        x = np.asarray(jax.random.normal(jax.random.key(width), (width, 3)))
        codes, scales = nf4_by_loops(x, block)
        got = jax.jit(quantized.nf4)(x)
        assert got.values.dtype == jnp.uint4 and got.scale.shape == (width // block, 3)
        np.testing.assert_array_equal(got.values, codes)
        np.testing.assert_allclose(got.scale, scales, rtol=1e-6)
    zeros = jax.jit(quantized.nf4)(jnp.zeros((64, 1)))
    assert np.asarray(zeros.values, int).tolist() == [[7]] * 64
    assert quantized.NF4[7] == 0.0


def test_the_nf4_values_are_the_quantiles_that_the_paper_takes():
    """QLoRA, section 3, eq.

    4 and its data type: 7 quantiles of N(0, 1) below 0 and 8 above, to an offset.
    """
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = (stats.norm.ppf(np.linspace(outermost, 0.5, n)[:-1]) for n in (9, 8))
    values = np.sort(np.concatenate([above, -below, [0.0]]))
    np.testing.assert_allclose(quantized.NF4, values / values.max(), atol=1e-6)


def test_an_nf4_product_and_its_gradient_are_those_of_the_wide_kernel():
    x = jax.random.normal(jax.random.key(0), (2, 3, 128))
    kernel = jax.random.normal(jax.random.key(1), (128, 10))
    q = jax.jit(quantized.nf4)(kernel)
    values = np.array(quantized.NF4, np.float32)[np.asarray(q.values, int)]
    wide = values * np.repeat(np.asarray(q.scale), 64, axis=0)
    assert (
        0.05 < np.sqrt(np.mean((wide - kernel) ** 2)) < 0.12
    )  # of a standard deviation of 1
    (got, slope), (expected, slope_wide) = products_and_gradients(linear, q, wide, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, slope_wide, rtol=1e-4, atol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def quantized_base(model, kind, params):
    return quantized.base(params, model.axes(), kind)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_backward_pass_keeps_no_wide_kernel(kind):
    """What is saved for the gradient of a model on a quantized base: no float array of a kernel's
    size.
    """
    model = Model(FAMILIES["llama-gqa"])
    params = jax.eval_shape(
        functools.partial(quantized_base, model, kind), model.shapes()
    )
    kernels = [
        x for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"
    ]
    assert len(kernels) == 7 * model.config.n_layers and all(
        jnp.issubdtype(x.dtype, jnp.integer) for x in kernels
    )
    embedded = jax.ShapeDtypeStruct((1, 2, model.config.d_model), jnp.float32)

    def saved_by(layer, x):
        rope = rope_tables(jnp.arange(2)[None], model.config.rope_dim, 1e4)
        block = blocks.Block(model.config)
        return jax.tree.leaves(
            jax.vjp(
                lambda x: block.apply({"params": layer}, x, rope, causal_attention), x
            )[1]
        )

    saved = jax.eval_shape(saved_by, params["backbone"]["layers"]["layer_0"], embedded)
    smallest = min(x.size for x in kernels)
    assert [x for x in saved if x.dtype == kernels[0].dtype]
    assert not [x.shape for x in saved if x.dtype == jnp.float32 and x.size >= smallest]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, rows):
    return model.logits(params, model.hidden(params, rows))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "moe"])
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(family):
    """Every projection, the embedding and the output matrix; no kernel is left in floats."""
    model = Model(CONFIGS[family])
    params = jax.jit(lambda params: quantized.weights(params, model.axes()))(
        random_params(model)
    )
    floats = {
        p[-1].key for p, x in jax.tree.leaves_with_path(params) if x.dtype != jnp.int8
    }
    assert floats <= {"bias", "scale", "positions", "kernel_scale", "tokens_scale"}
    rows = tokens(2, 9)
    plain = quantized.wide(params, model.axes())
    np.testing.assert_allclose(
        logits_of(model, params, rows), logits_of(model, plain, rows), atol=2e-4
    )
    hidden = model.hidden(params, rows)
    got, expected = (model.logprobs(p, hidden, rows)[0] for p in (params, plain))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_scanned_layers_have_a_scale_each():
    model = Model(dataclasses.replace(FAMILIES["llama-gqa"], scan_layers=True))
    params = model.init(jax.random.key(0))
    out = quantized.weights(params, model.axes())["backbone"]["layers"]["attention"][
        "out"
    ]
    kernel = params["backbone"]["layers"]["attention"]["out"]["kernel"]
    np.testing.assert_allclose(
        out["kernel_scale"], np.abs(kernel).max((1, 2)) / 127, rtol=1e-6
    )


def test_wide_by_hand():
    """q = (64, -127) of scale 2 / 127 is (1.0079, -2); what stands beside it stays."""
    tree = {
        "kernel": jnp.array([[64], [-127]], jnp.int8),
        "kernel_scale": jnp.array([2 / 127]),
        "bias": jnp.ones(1),
    }
    got = quantized.wide(tree, {"kernel": ("embed", "mlp"), "bias": ("mlp",)})
    np.testing.assert_allclose(got["kernel"], [[128 / 127], [-2]], rtol=1e-6)
    assert got.keys() == {"kernel", "bias"}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_learn_on_a_quantized_base(kind):
    """The adapters' gradient on a quantized base is that on the same base in floats."""
    model = Model(
        FAMILIES["llama-gqa"],
        lora=lora.LoraConfig(rank=2, targets="attention|mlp", base=kind),
    )
    own, base = random_trained(model), quantized_base(model, kind, random_params(model))
    wide = jax.jit(lambda base: quantized.wide(base, model.axes()))(base)
    rows = tokens(2, 8)

    @jax.jit
    @jax.grad
    def gradient(own, base):
        params = state.merge_params(base, own)
        return model.cross_entropy(
            params, model.hidden(params, rows), rows, jnp.ones((2, 8))
        )[0]

    got, expected = gradient(own, base), gradient(own, wide)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(got)) > 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_int8_already_is_refused():
    model = Model(FAMILIES["gpt2"])

    def weights(params):
        return quantized.weights(params, model.axes())

    once = jax.eval_shape(weights, model.shapes())
    with pytest.raises(ConfigError, match=r"(tokens|kernel) is int8 already"):
        jax.eval_shape(weights, once)


# ------------------------------------------------------------------ the cache


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("samples_per_prompt", "decode_batch")
)
def sampled(model, params, prompts, segments, keys, **how):
    sampling = Sampling(max_new_tokens=10, eos_id=EOS, pad_id=PAD, **how)
    return generate(model, params, prompts, segments, keys, sampling)


def test_an_int8_cache_samples_from_nearly_the_same_distribution():
    """Logprobs of what was drawn against teacher forcing in floats: near, but not equal (it is
    int8). Tokens of a position that came in late are those of a static batch: each token has scales
    of its own, whoever its neighbors.
    """
    config = dataclasses.replace(FAMILIES["llama-gqa"], n_layers=1)
    model, own = Model(config, int8_cache=True), keys(10)
    params, rows = random_params(model), left_padded((7, 1, 4, 6, 2))
    each_twice = tuple(jnp.repeat(x, 2, axis=0) for x in rows)
    static = sampled(model, params, *each_twice, own)
    for how in (
        {"samples_per_prompt": 2},
        {"samples_per_prompt": 2, "decode_batch": 3},
    ):
        np.testing.assert_array_equal(
            sampled(model, params, *rows, own, **how).tokens, static.tokens
        )
    expected = teacher_forced(Model(config), params, *each_twice, static, 1.0)
    error = np.abs(np.asarray(static.logprobs) - np.asarray(expected)).max()
    assert 1e-5 < error < 0.1


def test_int8_attention_is_that_of_the_dequantized_cache():
    q, k, v = (
        jax.random.normal(jax.random.key(i), s)
        for i, s in enumerate([(3, 4, 8), (3, 2, 9, 8), (3, 2, 9, 8)])
    )
    valid = jnp.arange(9)[None] < jnp.array([[9], [1], [5]])

    @jax.jit
    def both(q, k, v):
        k, v = absmax(k, (3,)), absmax(v, (3,))
        wide = [x.values * x.scale[..., None] for x in (k, v)]
        return cached_attention(q, k, v, valid), cached_attention(q, *wide, valid)

    np.testing.assert_allclose(*both(q, k, v), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "limit"), [("weights", 0.025), ("cache", 0.005)])
def test_how_far_logits_move(what, limit):
    """The error beside the spread of the logits, both as root mean squares, in a wider model at
    random.

    Measured: weights 0.0196, cache 0.0036.
    """
    model = Model(WIDE)
    params = model.init(jax.random.key(0))
    rows = jax.random.randint(jax.random.key(1), (4, 24), 0, 512)
    plain = decoded(model, params, rows)
    if what == "weights":
        other = decoded(model, quantized.weights(params, model.axes()), rows)
    else:
        other = decoded(dataclasses.replace(model, int8_cache=True), params, rows)
    error = float(
        jnp.sqrt(
            jnp.square(other - plain).mean()
            / jnp.square(plain - plain.mean(-1, keepdims=True)).mean()
        )
    )
    assert 0 < error < limit


@functools.partial(jax.jit, static_argnums=0)
def decoded(model, params, rows):
    """Logits of the last of 24 tokens, 8 of them decoded one by one."""
    b, p = 4, 16
    hidden, cache = model.prefill(
        params, rows[:, :p], jnp.ones((b, p), jnp.int32), model.init_cache(b, 24)
    )
    for i in range(p, 24):
        hidden, cache = model.decode(
            params, rows[:, i], jnp.full(b, i), jnp.int32(i), cache
        )
    return model.logits(params, hidden)
