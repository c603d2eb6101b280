"""The model against an independent transcription, and the invariances that a Transformer has by its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig, positions_of
from rlhfjax.models.config import CHOICES
from tests.models.families import DISTINCT, FAMILIES, SIZE, shaken, tokens
from tests.models.reference import forward

PACKED = [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]
LEFT_PADDED = [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.fixture(scope="module", params=DISTINCT)
def model(request):
    return Model(FAMILIES[request.param])


@pytest.fixture(scope="module")
def params(model):
    return shaken(model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, rows, segments=None, key=None):
    return model.hidden(params, rows, segments=segments, key=key)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, rows, segments=None):
    return model.logits(params, model.hidden(params, rows, segments=segments))


@pytest.mark.parametrize("segments", [None, PACKED, LEFT_PADDED])
def test_forward_is_the_papers(model, params, segments):
    rows = tokens(2, 12)
    given = None if segments is None else jnp.array([segments, segments])
    got = logits_of(model, params, rows, segments=given)
    assert got.dtype == jnp.float32
    for i in range(2):
        expected = forward(params, model.config, np.asarray(rows[i]), segments)
        real = np.ones(12, bool) if segments is None else np.array(segments) > 0
        np.testing.assert_allclose(np.asarray(got[i])[real], expected[real], rtol=2e-5, atol=2e-5)


def test_causal_by_gradient(model, params):
    """d loss(t) / d input(s) is exactly 0 for s > t, and not 0 for s <= t."""
    rows = tokens(1, 8)
    table = params["backbone"]["embed"]["tokens"]

    def at(t):
        # A row of the table of its own for each slot, so that the gradient says which slot mattered.
        def out(own):
            grown = jax.tree.map(lambda x: x, params)
            grown["backbone"]["embed"]["tokens"] = own
            wide = Model(dataclasses.replace(model.config, vocab_size=8))
            return wide.hidden(grown, jnp.arange(8)[None])[0, t].sum() ** 2

        return jax.jit(jax.grad(out))(table[rows[0]])

    for t in (0, 3, 7):
        size = np.abs(np.asarray(at(t))).max(-1)
        assert (size[: t + 1] > 0).all()
        assert (size[t + 1 :] == 0).all()


def test_packed_is_unpacked(model, params):
    """Three documents in one row give what each gives alone."""
    row, segments = tokens(1, 12), jnp.array([PACKED])
    got = logits_of(model, params, row, segments=segments)[0]
    for document in (1, 2, 3):
        where = np.flatnonzero(np.array(PACKED) == document)
        alone = logits_of(model, params, row[:, where])[0]
        np.testing.assert_allclose(got[where], alone, rtol=1e-5, atol=1e-5)


def test_pitfall_01_left_padding_changes_nothing(model, params):
    """Positions count real tokens: whatever the padding, and whatever ids it holds, the real tokens' logits stay."""
    row = tokens(1, 6)
    alone = logits_of(model, params, row)[0]
    for pad in (1, 5):
        padded = jnp.concatenate([tokens(1, pad, seed=pad), row], axis=1)
        segments = jnp.concatenate([jnp.zeros((1, pad), jnp.int32), jnp.ones((1, 6), jnp.int32)], axis=1)
        got = logits_of(model, params, padded, segments=segments)[0, pad:]
        np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-5)


def test_pitfall_01_positions_count_real_tokens():
    segments = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(positions_of(segments), expected)


def test_a_row_of_padding_is_finite(model, params):
    """Not NaN in the value or in the gradient, which one NaN anywhere would poison."""
    segments = jnp.array([[0] * 6, [1] * 6])

    def loss(p):
        hidden = model.hidden(p, tokens(2, 6), segments=segments)
        return model.cross_entropy(p, hidden, tokens(2, 6), (segments > 0).astype(jnp.float32))[0]

    value, grad = jax.jit(jax.value_and_grad(loss))(params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((value, grad)))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(model, params, key=None):
    def loss(p):
        hidden = model.hidden(p, tokens(2, 9), segments=jnp.array([[1] * 9, [1] * 4 + [2] * 5]), key=key)
        return model.cross_entropy(p, hidden, tokens(2, 9, seed=3), jnp.ones((2, 9)))[0]

    return jax.value_and_grad(loss)(params)


def stack(params):
    layers = params["backbone"]["layers"]
    rows = [layers[f"layer_{i}"] for i in range(len(layers))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    return params | {"backbone": params["backbone"] | {"layers": stacked}}


@pytest.mark.parametrize(("family", "dropout"), [("llama-gqa", 0.0), ("gpt1", 0.0), ("neox", 0.2)])
def test_scanned_is_unrolled(family, dropout):
    """Same seed, same parameters, same loss and gradients, with dropout too: only the compiled shape differs."""
    unrolled = Model(dataclasses.replace(FAMILIES[family], dropout=dropout))
    scanned = Model(dataclasses.replace(unrolled.config, scan_layers=True))
    params = unrolled.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, stack(params), scanned.init(jax.random.key(0)))
    key = jax.random.key(5) if dropout else None
    value, grad = loss_and_grad(unrolled, params, key)
    scanned_value, scanned_grad = loss_and_grad(scanned, stack(params), key)
    np.testing.assert_allclose(value, scanned_value, rtol=1e-6)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)

    jax.tree.map(close, stack(grad), scanned_grad)


@pytest.mark.parametrize(
    ("family", "remat", "scan"),
    [("llama-gqa", "dots", False), ("neox", "full", False), ("gpt1", "full", True), ("gpt2", "offload", False)],
)
def test_remat_changes_only_what_is_kept(family, remat, scan):
    config = dataclasses.replace(FAMILIES[family], scan_layers=scan, dropout=0.1)
    plain, again = Model(config), Model(dataclasses.replace(config, remat=remat))
    params, key = plain.init(jax.random.key(0)), jax.random.key(2)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)

    jax.tree.map(close, loss_and_grad(plain, params, key), loss_and_grad(again, params, key))

    # Really recomputed: the backward pass holds checkpoint regions on one side only.
    def text(m):
        return str(jax.make_jaxpr(lambda p: loss_and_grad(m, p))(params))

    assert "remat" not in text(plain) and "remat" in text(again)


def test_grouped_heads_are_repeated_heads():
    grouped = Model(FAMILIES["llama-gqa"])
    full = Model(dataclasses.replace(grouped.config, n_kv_heads=None))
    params = shaken(grouped.init(jax.random.key(0)))
    repeated = jax.tree.map(lambda x: x, params)
    for layer in repeated["backbone"]["layers"].values():
        for name in ("key", "value"):
            layer["attention"][name]["kernel"] = jnp.repeat(layer["attention"][name]["kernel"], 2, axis=1)
    row = tokens(2, 9)
    np.testing.assert_allclose(hidden_of(grouped, params, row), hidden_of(full, repeated, row), rtol=2e-5, atol=2e-5)


def test_logits_bf16_are_float32(model, params):
    wide, narrow = model, Model(dataclasses.replace(model.config, dtype="bfloat16"))
    hidden = hidden_of(narrow, params, tokens(2, 9))
    assert hidden.dtype == jnp.bfloat16
    logits = narrow.logits(params, hidden)
    assert logits.dtype == jnp.float32
    assert np.unique(np.asarray(logits.astype(jnp.bfloat16).astype(jnp.float32)) == np.asarray(logits)).tolist() != [
        True
    ]
    logprob, entropy = narrow.logprobs(params, hidden, tokens(2, 9))
    assert logprob.dtype == entropy.dtype == jnp.float32
    # bf16 has 8 bits: about 1% of the logits' size
    exact = logits_of(wide, params, tokens(2, 9))
    assert float(jnp.abs(logits - exact).mean()) < 0.02 * float(jnp.abs(exact).mean()) + 0.02


def test_bf16_gradients_are_float32(params, model):
    narrow = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    grad = loss_and_grad(narrow, params)[1]
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype("float32")}
    exact = loss_and_grad(model, params)[1]
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(exact), strict=True):
        cosine = (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum() + 1e-12)
        # A key bias shifts every score of a query alike: its gradient is 0 but for rounding.
        assert float(cosine) > 0.97 or float(jnp.abs(b).max()) < 1e-3


# ------------------------------------------------------------------ dropout


def test_pitfall_20_no_dropout_without_a_key(model, params):
    dropping = Model(dataclasses.replace(model.config, dropout=0.5))
    row = tokens(2, 9)
    np.testing.assert_array_equal(hidden_of(dropping, params, row), hidden_of(model, params, row))


def test_dropout_with_a_key(model, params):
    dropping = Model(dataclasses.replace(model.config, dropout=0.5))
    row = tokens(2, 9)
    one, same, other = (hidden_of(dropping, params, row, key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 0.1
    np.testing.assert_array_equal(hidden_of(model, params, row, key=jax.random.key(0)), hidden_of(model, params, row))


def test_dropout_differs_between_the_branches_of_a_parallel_layer():
    """Attention and MLP both give 1: an entry keeps none, one or both, where one mask would leave none or both."""
    model = Model(dataclasses.replace(FAMILIES["neox"], dropout=0.5, d_model=256, n_layers=1, norm_eps=1.0))
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    layer = params["backbone"]["layers"]["layer_0"]
    layer["attention"]["out"]["bias"] = layer["mlp"]["down"]["bias"] = jnp.ones(256)
    params["backbone"]["norm"]["scale"] = jnp.ones(256)
    hidden = hidden_of(model, params, tokens(1, 8), key=jax.random.key(0))
    assert [len(np.unique(np.round(row, 4))) for row in np.asarray(hidden[0])] == [3] * 8


def test_dropout_differs_between_layers():
    """Two layers with the same weights, whose MLPs give a constant: with one mask for both, both would drop alike."""
    config = dataclasses.replace(FAMILIES["gpt2"], dropout=0.5, d_model=256)
    model = Model(config)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    for layer in params["backbone"]["layers"].values():
        layer["mlp"]["down"]["bias"] = jnp.ones(256)
    params["backbone"]["norm"]["scale"] = jnp.ones(256)
    hidden = hidden_of(model, params, tokens(1, 8), key=jax.random.key(0))
    # Per entry 0, 1 or 2 layers kept it: three levels, of which one shared mask would leave two.
    assert [len(np.unique(np.round(row, 4))) for row in np.asarray(hidden[0])] == [3] * 8


# ------------------------------------------------------------------ init and parameters


def test_init_standard_deviations():
    config = TransformerConfig(
        vocab_size=512, d_model=128, n_layers=8, n_heads=4, d_ff=256, max_length=64, positions="learned",
        norm="layernorm", mlp="gelu", bias=True, scale_residual_init=True, init_std=0.02, tie_embeddings=False,
    )  # fmt: skip
    params = Model(config).init(jax.random.key(0))
    layer = params["backbone"]["layers"]["layer_3"]
    for kernel in (layer["attention"]["query"], layer["attention"]["value"], layer["mlp"]["up"], params["head"]):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.03)
    for table in params["backbone"]["embed"].values():
        np.testing.assert_allclose(np.std(table), 0.02, rtol=0.03)
    for kernel in (layer["attention"]["out"], layer["mlp"]["down"]):  # 2 residual layers a block, 8 blocks: / 4
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.005, rtol=0.03)
        assert not np.asarray(kernel["bias"]).any()
    np.testing.assert_array_equal(layer["norm_1"]["scale"], np.ones(128))
    other = params["backbone"]["layers"]["layer_4"]
    assert np.abs(np.asarray(layer["mlp"]["up"]["kernel"] - other["mlp"]["up"]["kernel"])).max() > 0.01


@pytest.mark.parametrize(
    ("family", "biased"),
    [
        ("llama", set()),
        ("qwen2", {"query", "key", "value"}),
        *[(family, {"query", "key", "value", "out", "up", "down"}) for family in ("gpt1", "gpt2", "neox")],
    ],
)
def test_which_projections_have_a_bias(family, biased):
    params = jax.eval_shape(Model(FAMILIES[family]).init, jax.random.key(0))
    for layer in params["backbone"]["layers"].values():
        projections = layer["attention"] | layer["mlp"]
        assert {name for name, leaves in projections.items() if "bias" in leaves} == biased


def test_pitfall_25_scalar_head_starts_at_one_over_root_width_plus_one():
    config = dataclasses.replace(FAMILIES["llama"], d_model=4096, n_layers=1, d_ff=4)
    head = jax.jit(lambda k: Model(config, "scalar").init(k)["head"])
    np.testing.assert_allclose(np.std(head(jax.random.key(0))["kernel"]), 4097**-0.5, rtol=0.05)
    assert float(head(jax.random.key(0))["bias"]) == 0.0
    # The seed decides the head: the same twice, another with another seed.
    np.testing.assert_array_equal(head(jax.random.key(3))["kernel"], head(jax.random.key(3))["kernel"])
    assert np.abs(np.asarray(head(jax.random.key(3))["kernel"] - head(jax.random.key(4))["kernel"])).max() > 0


def test_scalar_is_hidden_times_kernel_plus_bias(model):
    scalar = Model(model.config, "scalar")
    params = shaken(scalar.init(jax.random.key(0)))
    hidden = hidden_of(scalar, params, tokens(2, 5))
    got = scalar.scalar(params, hidden)
    assert got.shape == (2, 5) and got.dtype == jnp.float32
    kernel, bias = np.asarray(params["head"]["kernel"], np.float64), float(params["head"]["bias"])
    hidden = np.asarray(hidden, np.float64)
    size = np.abs(hidden) @ np.abs(kernel) + abs(bias)  # of what is summed: float32 rounds each term of it
    assert (np.abs(got - (hidden @ kernel + bias)) < 1e-6 * size).all()


def test_a_language_models_backbone_fits_a_scalar_model(model):
    lm, scalar = (jax.eval_shape(Model(model.config, head).init, jax.random.key(0)) for head in ("lm", "scalar"))
    assert lm["backbone"] == scalar["backbone"]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_has_axis_names(model, head, scan):
    model = Model(dataclasses.replace(model.config, scan_layers=scan), head)
    params = jax.eval_shape(model.init, jax.random.key(0))
    known = make_layout(MeshConfig()).rules
    pairs = jax.tree.map(lambda x, names: (x, names), params, model.axes())
    for x, names in jax.tree.leaves(pairs, is_leaf=lambda y: isinstance(y, tuple)):
        assert len(names) == x.ndim
        assert all(name in known for name in names)
    if scan:
        assert model.axes()["backbone"]["layers"]["mlp"]["up"]["kernel"] == ("layers", "embed", "mlp")


@pytest.mark.parametrize(
    ("family", "mesh", "scan"),
    [
        ("llama", {"data": 4}, False),
        ("gpt2", {"data": 1, "fsdp": 4}, False),
        ("qwen2", {"data": 1, "tensor": 2, "fsdp": 2}, False),
        ("neox", {"data": 2, "tensor": 2}, True),
    ],
)
def test_four_devices_are_one(family, mesh, scan):
    if jax.device_count() < 4:
        pytest.skip("one device")
    config = dataclasses.replace(FAMILIES[family], vocab_size=64, scan_layers=scan)
    model = Model(config)
    params = model.init(jax.random.key(0))
    rows, targets = tokens(4, 8), tokens(4, 8, seed=2)

    def loss(p, rows, targets):
        return model.cross_entropy(p, model.hidden(p, rows), targets, jnp.ones((4, 8)))[0]

    expected = jax.jit(jax.value_and_grad(loss))(params, rows, targets)
    layout = make_layout(MeshConfig(**mesh), jax.devices()[:4])
    names = model.axes()

    def put(n, x):
        return jax.device_put(x, layout.sharding(*n))

    sharded = jax.tree.map(put, names, params, is_leaf=lambda x: isinstance(x, tuple))
    with layout.use():
        got = jax.jit(jax.value_and_grad(loss))(sharded, *(put(("batch",), x) for x in (rows, targets)))

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)

    jax.tree.map(close, got, expected)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 5}, "n_heads = 5 does not divide model.d_model = 24"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3 does not divide"),
        ({"d_head": 7}, "of a head of 7 is 7: model.positions = 'rope' rotates pairs, so it must be even"),
        ({"rope_fraction": 0.25}, "model.rope_fraction = 0.25 of a head of 6 is 1"),
        ({"rope_fraction": 0.1}, "at least 2"),
        ({"rope_fraction": 0.0}, "model.rope_fraction is 0.0: it must be above 0 and at most 1"),
        ({"rope_fraction": 1.5}, "model.rope_fraction is 1.5: it must be above 0 and at most 1"),
        ({"dropout": 1.0}, "below 1"),
        ({"n_layers": 0}, "n_layers is 0: it must be at least 1"),
        ({"d_head": -2}, "d_head is -2: it must be at least 1"),
        ({"norm_eps": 0.0}, "above 0"),
        *[({name: "other"}, ", ".join(accepted)) for name, accepted in CHOICES.items()],
    ],
)
def test_impossible_configs_say_why(change, words):
    with pytest.raises(ConfigError, match=r"model|width") as caught:
        TransformerConfig(**{**SIZE, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_from_before_an_option_is_that_model_still():
    """A saved model's config.json names the options of its day; later ones stand at what was then the only way."""
    later = {"rope_fraction": 1.0, "residual": "pre_norm", "qkv_bias": False}
    saved = {name: value for name, value in dataclasses.asdict(FAMILIES["gpt2"]).items() if name not in later}
    assert build(TransformerConfig, saved) == FAMILIES["gpt2"]
    assert {name: getattr(FAMILIES["gpt2"], name) for name in later} == later


def test_too_long_a_sequence_says_so(model, params):
    with pytest.raises(ConfigError, match="33 tokens is longer than model"):
        model.hidden(params, tokens(1, 33))


def test_unknown_head():
    with pytest.raises(ConfigError, match="lm, scalar"):
        Model(FAMILIES["llama"], "value")
