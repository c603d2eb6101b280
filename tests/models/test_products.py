"""Products of rounded inputs: values, gradients, and where in a model they stand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from rlhfjax.errors import ConfigError
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.attention import Scoring, causal_attention
from rlhfjax.models.decoding import FEWEST_ROWS
from rlhfjax.models.linear import FEW_ROWS, linear
from rlhfjax.models.logprobs import cross_entropy, logprobs, unembed
from rlhfjax.sampling import Sampling
from rlhfjax.sampling.generate import generate

NARROW = "bfloat16"
ULP = 2.0**-8  # of bfloat16
CONFIG = TransformerConfig(
    vocab_size=96,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    max_length=64,
    dtype="bfloat16_products",
)
# What may be done to a bfloat16 array: it is moved, converted or multiplied.
MOVES = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "optimization_barrier",
    "reshape",
    "slice",
    "transpose",
}


def rounded(x):
    """Rounds to bfloat16; the gradient passes as it is."""
    return x + jax.lax.stop_gradient(x.astype(NARROW).astype(x.dtype) - x)


@jax.custom_vjp
def product_of_gradient(x):
    """Returns x; its gradient is rounded, as the input of further products."""
    return x


product_of_gradient.defvjp(
    lambda x: (x, None),
    lambda _, g: (g.astype(NARROW).astype(g.dtype),),
)


def product(spec, a, b):
    """Returns a float32 product of rounded inputs, by autodiff with rounded gradients."""
    full = functools.partial(jnp.einsum, precision="highest")
    return product_of_gradient(full(spec, rounded(a), rounded(b)))


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def value_and_gradients(f, *args):
    """Returns f and the gradients of a weighted sum of its outputs by all arguments."""

    def loss(*args):
        outputs = jax.tree.leaves(f(*args))
        weights = [normal(*x.shape, seed=9) for x in outputs]
        return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), (
            outputs
        )

    return jax.jit(jax.value_and_grad(loss, range(len(args)), has_aux=True))(*args)


def close(found, expected, tolerance):
    """Compares trees of float32 arrays; the tolerance is relative to each array's largest."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        size = float(jnp.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24)])
def test_a_linear_product_is_that_of_rounded_inputs(inputs, outputs):
    x, w = normal(2, FEW_ROWS // 2, inputs), normal(inputs, outputs, seed=1)
    found = value_and_gradients(lambda x, w: linear(x, w, NARROW), x, w)
    plain = value_and_gradients(lambda x, w: product("btx,xy->bty", x, w), x, w)
    close(found, plain, 2e-6)
    exact = jnp.einsum("btx,xy->bty", x, w, precision="highest")
    assert float(jnp.abs(found[0][1][0] - exact).max()) > 1e-3


def test_products_of_few_rows_are_not_rounded_unless_the_kernel_was():
    x, w = normal(1, FEW_ROWS - 1, 24), normal(24, 40, seed=1)
    np.testing.assert_array_equal(linear(x, w, NARROW), linear(x, w))
    close(
        linear(x, w.astype(NARROW), NARROW),
        product("btx,xy->bty", x, w),
        2e-6,
    )


def test_attention_is_that_of_rounded_inputs(monkeypatch):
    monkeypatch.setattr("rlhfjax.models.attention.QUERY_BLOCK", 5)
    q, k, v = normal(2, 4, 12, 8), normal(2, 2, 12, 8, seed=1), normal(2, 2, 12, 8)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=1) for x in (k, v))
        scores = product("bhtd,bhsd->bhts", q * 8**-0.5, k)
        scores = jnp.where(jnp.tril(jnp.ones((12, 12), bool)), scores, -1e30)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        return product("bhts,bhsd->bhtd", weights, v) / total

    scoring = Scoring(dtype=NARROW)
    found = value_and_gradients(
        lambda q, k, v: causal_attention(q, k, v, scoring=scoring), q, k, v
    )
    expected = value_and_gradients(plain, q, k, v)
    # A weight whose last bits differ may round to its neighbor.
    close(found[0], expected[0], ULP / 4)
    close(found[1], expected[1], ULP)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [3 * 11 * 2, 10**6])
def test_log_probabilities_are_those_of_rounded_inputs(tied, chunk, monkeypatch):
    monkeypatch.setattr("rlhfjax.models.logprobs.CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr("rlhfjax.models.linear.FEW_ROWS", 1)
    hidden, output = normal(3, 7, 16), normal(*((11, 16) if tied else (16, 11)), seed=1)
    targets = jax.random.randint(jax.random.key(2), (3, 7), 0, 11)
    mask = (jnp.arange(21).reshape(3, 7) % 4 > 0).astype(jnp.float32)

    def found(hidden, output):
        how = {"tied": tied, "dtype": NARROW}
        loss, _ = cross_entropy(hidden, output, targets, mask, **how)
        return logprobs(hidden, output, targets, **how), loss

    def plain(hidden, output):
        spec = "btd,vd->btv" if tied else "btd,dv->btv"
        log_p = jax.nn.log_softmax(product(spec, hidden, output))
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        at = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        again = jax.nn.log_softmax(product(spec, hidden, output))
        loss = jnp.take_along_axis(again, targets[..., None], axis=-1)[..., 0]
        return (at, entropy), -(loss * mask).sum()

    got, expected = (value_and_gradients(f, hidden, output) for f in (found, plain))
    close(got[0], expected[0], 1e-5)
    close(got[1], expected[1], ULP)


def test_logits_keep_their_leading_axes(monkeypatch):
    monkeypatch.setattr("rlhfjax.models.linear.FEW_ROWS", 1)
    hidden, output = normal(2, 3, 5, 8), normal(8, 7)
    found = unembed(hidden, output, False, NARROW)
    close(found, product("abcd,dv->abcv", hidden, output), 2e-6)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, core.ClosedJaxpr)
        ):
            if isinstance(value, core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                yield from equations(value)


def check_dtypes(f, *args):
    """Asserts that bfloat16 numbers are inputs of products alone; returns the products' dtypes."""
    products = []
    for equation in equations(jax.make_jaxpr(f)(*args).jaxpr):
        name = equation.primitive.name
        inner = any(True for _ in jax.core.jaxprs_in_params(equation.params))
        if name == "dot_general":
            products.append(tuple(str(x.aval.dtype) for x in equation.invars))
            assert equation.outvars[0].aval.dtype == jnp.float32
        elif not inner and any(
            getattr(x.aval, "dtype", None) == jnp.bfloat16
            for x in [*equation.outvars, *equation.invars]
        ):
            assert name in MOVES, equation
    return products


def losses(model, value, tokens, params):
    """Returns a sum of all that is trained with: cross-entropy, log-probabilities, values."""
    mask = jnp.ones(tokens.shape)
    hidden = model.hidden(params, tokens, segment_ids=tokens)
    loss, _ = model.cross_entropy(params, hidden, tokens, mask)
    logprob, entropy = model.logprobs(params, hidden, tokens)
    return loss + (logprob + entropy).sum() + value.scalar(params, hidden).sum()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_only_inputs_of_products_are_rounded_in_training(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers, remat="dots")
    model, value = Model(config), Model(config, "scalar")
    tokens = jnp.ones((4, 32), jnp.int32)
    params = jax.eval_shape(value.init, jax.random.key(0))
    gradient = jax.grad(functools.partial(losses, model, value, tokens))
    products = check_dtypes(gradient, params)
    # The scalar head is float32, forward and backward.
    head = [pair for pair in products if pair == ("float32", "float32")]
    assert 1 <= len(head) <= 3
    assert products.count((NARROW, NARROW)) == len(products) - len(head)
    shapes = jax.eval_shape(gradient, params)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_the_kernels_of_a_rollout_are_rounded_before_its_loop():
    model, n = Model(CONFIG), FEWEST_ROWS
    sampling = Sampling(max_new_tokens=4, eos_id=1, pad_id=0)
    tokens = jnp.ones((n, 8), jnp.int32)
    keys = jax.random.split(jax.random.key(0), n)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def sample(params):
        return generate(model, params, tokens, tokens, keys, sampling).logprobs

    loops = [
        equation
        for equation in jax.make_jaxpr(sample)(params).eqns
        if equation.primitive.name == "while"
    ]
    body = loops[-1].params["body_jaxpr"].jaxpr
    inputs = [tuple(str(x.aval.dtype) for x in e.invars) for e in dots(body)]
    # 7 kernels in each of 2 layers, and the output; scores and their products with values.
    assert inputs.count((NARROW, NARROW)) == 15
    assert inputs.count(("float32", "float32")) == 4
    rounded = [x for x in body.invars if x.aval.dtype == jnp.bfloat16]
    assert len(rounded) == 15
    assert model.for_decoding(params, FEWEST_ROWS - 1) is params


def dots(jaxpr):
    return [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]


def test_an_automatic_dtype_computes_nothing():
    model = Model(dataclasses.replace(CONFIG, dtype="auto"))
    with pytest.raises(ConfigError, match=r"model\.dtype='auto': a stage resolves it"):
        model.init(jax.random.key(0))
