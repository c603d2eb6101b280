"""The model against an independent transcription, and the invariances that a Transformer has by its
definition.

What is asked of every family is asked of one compiled program: `logits_of` at rows of 12 positions.
An equality of one component (attention, a head, dropout, recomputation) is asked of one family that
has it.
"""

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
from rlhfjax.models.lora import LoraConfig
from tests.models.families import (
    CONFIGS,
    DISTINCT,
    FAMILIES,
    FEATURES,
    SIZE,
    random_params,
    tokens,
)
from tests.models.reference import forward

ONE = [1] * 12
PACKED = [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]
LEFT_PADDED = [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.fixture(scope="module", params=DISTINCT)
def model(request):
    return Model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, rows, segments=None, key=None):
    return model.logits(
        params, model.hidden(params, rows, segment_ids=segments, key=key)
    )


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(model, params, segments, key=None):
    def loss(p):
        hidden = model.hidden(p, tokens(2, 9), segment_ids=segments, key=key)
        return model.cross_entropy(
            p, hidden, tokens(2, 9, seed=3), (segments > 0).astype(jnp.float32)
        )[0]

    return jax.value_and_grad(loss)(params)


TWO_DOCUMENTS = jnp.array([[1] * 9, [1] * 4 + [2] * 5])


def test_forward_is_the_papers(model, params):
    rows, segments = tokens(3, 12), [ONE, PACKED, LEFT_PADDED]
    got = logits_of(model, params, rows, jnp.array(segments))
    assert got.dtype == jnp.float32
    for i in range(3):
        expected = forward(params, model.config, np.asarray(rows[i]), segments[i])
        real = np.array(segments[i]) > 0
        np.testing.assert_allclose(
            np.asarray(got[i])[real], expected[real], rtol=2e-5, atol=2e-5
        )


def test_no_segments_are_one_document():
    model = Model(FAMILIES["llama-gqa"])
    params, rows = random_params(model), tokens(3, 12)
    expected = logits_of(model, params, rows, jnp.array([ONE] * 3))
    np.testing.assert_allclose(
        logits_of(model, params, rows), expected, rtol=1e-6, atol=1e-6
    )


def test_causal_by_gradient():
    """d loss(t) / d input(s) is exactly 0 for s > t, and not 0 for s <= t."""
    model = Model(FAMILIES["llama-gqa"])
    wide = Model(dataclasses.replace(model.config, vocab_size=8))
    params, positions = random_params(model), jnp.array([0, 3, 7])
    table = params["backbone"]["embed"]["tokens"]

    # A row of the table of its own for each position, so that the gradient says which position
    # mattered.
    def out(own, t):
        backbone = params["backbone"] | {"embed": {"tokens": own}}
        return (
            wide.hidden(params | {"backbone": backbone}, jnp.arange(8)[None])[
                0, t
            ].sum()
            ** 2
        )

    gradients = jax.jit(jax.vmap(jax.grad(out), (None, 0)))(
        table[tokens(1, 8)[0]], positions
    )
    for t, gradient in zip(positions, gradients, strict=True):
        size = np.abs(np.asarray(gradient)).max(-1)
        assert (size[: t + 1] > 0).all()
        assert (size[t + 1 :] == 0).all()


def test_packed_is_unpacked(model, params):
    """Three documents in one row give what each gives at the beginning of a row of its own."""
    row, packed = np.asarray(tokens(1, 12)), np.array([PACKED])
    together = logits_of(
        model, params, jnp.asarray(row.repeat(3, 0)), jnp.asarray(packed.repeat(3, 0))
    )[0]
    places = [np.flatnonzero(packed[0] == document) for document in (1, 2, 3)]
    rows, segments = (
        np.asarray(tokens(3, 12, seed=2)).copy(),
        np.zeros((3, 12), np.int32),
    )
    for i, where in enumerate(places):
        rows[i, : len(where)], segments[i, : len(where)] = row[0, where], 1
    alone = logits_of(model, params, jnp.asarray(rows), jnp.asarray(segments))
    for i, where in enumerate(places):
        np.testing.assert_allclose(
            together[where], alone[i, : len(where)], rtol=1e-5, atol=1e-5
        )


def test_pitfall_01_left_padding_changes_nothing(model, params):
    """Positions count real tokens: whatever the padding, and whatever ids it holds, the real
    tokens' logits stay.
    """
    padding = (0, 1, 5)
    row, rows = np.asarray(tokens(1, 6)[0]), np.asarray(tokens(3, 12, seed=5)).copy()
    segments = np.zeros((3, 12), np.int32)
    for i, pad in enumerate(padding):
        rows[i, pad : pad + 6], segments[i, pad : pad + 6] = row, 1
    got = logits_of(model, params, jnp.asarray(rows), jnp.asarray(segments))
    for i, pad in enumerate(padding):
        np.testing.assert_allclose(
            got[i, pad : pad + 6], got[0, :6], rtol=1e-5, atol=1e-5
        )


def test_pitfall_01_positions_count_real_tokens():
    segments = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(positions_of(segments), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "neox"])  # both norms
def test_a_row_of_padding_is_finite(family):
    """Not NaN in the value or in the gradient, which one NaN anywhere would poison."""
    model = Model(CONFIGS[family])
    value_and_grad = loss_and_grad(
        model, random_params(model), jnp.array([[0] * 9, [1] * 9])
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(value_and_grad))


def test_grouped_heads_are_repeated_heads():
    grouped = Model(FAMILIES["llama-gqa"])
    full = Model(dataclasses.replace(grouped.config, n_kv_heads=None))
    params = random_params(grouped)
    repeated = jax.tree.map(lambda x: x, params)
    for layer in repeated["backbone"]["layers"].values():
        for name in ("key", "value"):
            layer["attention"][name]["kernel"] = jnp.repeat(
                layer["attention"][name]["kernel"], 2, axis=1
            )
    rows = tokens(3, 12), jnp.array([PACKED] * 3)
    np.testing.assert_allclose(
        logits_of(grouped, params, *rows),
        logits_of(full, repeated, *rows),
        rtol=2e-5,
        atol=2e-5,
    )


# ------------------------------------------------------------------ scanned and recomputed layers


def stack(params):
    layers = params["backbone"]["layers"]
    rows = [layers[f"layer_{i}"] for i in range(len(layers))]
    stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
    return params | {"backbone": params["backbone"] | {"layers": stacked}}


def with_options(**options):
    return Model(dataclasses.replace(FAMILIES["llama-gqa"], **options))


def test_scanned_layers_begin_as_unrolled_ones():
    """Same seed, same parameters."""
    unrolled, scanned = (
        jax.jit(with_options(scan_layers=scan).init)(jax.random.key(0))
        for scan in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, stack(unrolled), scanned)


def test_scanned_is_unrolled():
    unrolled, scanned = with_options(), with_options(scan_layers=True)
    params, rows = random_params(unrolled), (tokens(3, 12), jnp.array([PACKED] * 3))
    np.testing.assert_allclose(
        logits_of(scanned, stack(params), *rows),
        logits_of(unrolled, params, *rows),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("remat", "scan"),
    [("none", True), ("dots", False), ("full", True), ("offload", False)],
    ids=str,
)
def test_scan_and_remat_change_only_what_is_compiled_and_kept(remat, scan):
    """The same loss and gradients as of layers that are unrolled and kept, with dropout."""
    plain, other = (
        with_options(dropout=0.2),
        with_options(dropout=0.2, remat=remat, scan_layers=scan),
    )
    params, key = random_params(plain), jax.random.key(5)
    value, grad = loss_and_grad(plain, params, TWO_DOCUMENTS, key)
    params, grad = (stack(params), stack(grad)) if scan else (params, grad)
    other_value, other_grad = loss_and_grad(other, params, TWO_DOCUMENTS, key)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)

    jax.tree.map(close, other_grad, grad)

    # Really recomputed: the backward pass holds checkpoint regions where it is asked to.
    program = loss_and_grad.trace(other, params, TWO_DOCUMENTS, key).jaxpr
    assert ("remat" in str(program)) == (remat != "none")


@pytest.mark.parametrize(
    ("remat", "scan"), [("none", True), ("full", True), ("dots", False)], ids=str
)
def test_layers_of_several_kinds_are_chosen_at_run_time_too(remat, scan):
    """Window, full and unrotated layers: the same loss and gradients scanned and recomputed."""
    config = FEATURES["gemma-like"]
    plain = Model(config)
    other = Model(dataclasses.replace(config, remat=remat, scan_layers=scan))
    params = random_params(plain)
    value, grad = loss_and_grad(plain, params, TWO_DOCUMENTS)
    params, grad = (stack(params), stack(grad)) if scan else (params, grad)
    other_value, other_grad = loss_and_grad(other, params, TWO_DOCUMENTS)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(other_grad), jax.tree.leaves(grad), strict=True):
        # Parameters that differ by one unit in the last place move the gradients by up to 2e-5 of
        # the largest element; rounding, which scans change, by 4e-6 on a CPU with AVX2.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_capped_gradients_are_those_of_finite_differences():
    """Of scores and logits: along the gradient, the loss rises by its squared norm."""
    model = Model(FEATURES["gemma-like"])
    params = random_params(model)
    value, grad = loss_and_grad(model, params, TWO_DOCUMENTS)
    size = sum(float((g**2).sum()) for g in jax.tree.leaves(grad))
    step = 1e-4 / size**0.5
    ends = [
        loss_and_grad(
            model,
            jax.tree.map(lambda p, g, s=sign: p + s * step * g, params, grad),
            TWO_DOCUMENTS,
        )[0]
        for sign in (-1, 1)
    ]
    np.testing.assert_allclose((ends[1] - ends[0]) / (2 * step), size, rtol=5e-3)
    assert float(value) > 0


# ------------------------------------------------------------------ bfloat16


def narrow(model):
    return Model(dataclasses.replace(model.config, dtype="bfloat16"))


@pytest.mark.parametrize(
    "family", ["llama-gqa", "neox"]
)  # a tied output and one of its own
def test_logits_bf16_are_float32(family):
    model = Model(CONFIGS[family])
    params, rows = random_params(model), (tokens(3, 12), jnp.array([ONE] * 3))
    logits = logits_of(narrow(model), params, *rows)
    assert logits.dtype == jnp.float32
    assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).any()
    # bf16 has 8 bits: about 1% of the logits' size
    exact = logits_of(model, params, *rows)
    assert (
        float(jnp.abs(logits - exact).mean())
        < 0.02 * float(jnp.abs(exact).mean()) + 0.02
    )

    def parts(params):
        hidden = narrow(model).hidden(params, tokens(2, 9))
        return hidden, narrow(model).logprobs(params, hidden, tokens(2, 9))

    hidden, (logprob, entropy) = jax.eval_shape(parts, params)
    assert hidden.dtype == jnp.bfloat16
    assert logprob.dtype == entropy.dtype == jnp.float32


@pytest.mark.parametrize("family", ["llama-gqa", "neox"])
def test_bf16_gradients_are_float32(family):
    model = Model(CONFIGS[family])
    params = random_params(model)
    grad = loss_and_grad(narrow(model), params, TWO_DOCUMENTS)[1]
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype("float32")}
    exact = loss_and_grad(model, params, TWO_DOCUMENTS)[1]
    for a, b in zip(
        *(map(np.asarray, jax.tree.leaves(tree)) for tree in (grad, exact)), strict=True
    ):
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-12)
        # A key bias shifts every score of a query alike: its gradient is 0 but for rounding.
        assert float(cosine) > 0.97 or float(np.abs(b).max()) < 1e-3


# ------------------------------------------------------------------ dropout


@pytest.fixture(scope="module")
def dropping():
    """(a model with dropout, the same without, parameters, rows)."""
    model = Model(FAMILIES["gpt1"])
    config = dataclasses.replace(model.config, dropout=0.5)
    return (
        Model(config),
        model,
        random_params(model),
        (tokens(3, 12), jnp.array([ONE] * 3)),
    )


def test_pitfall_20_no_dropout_without_a_key(dropping):
    dropping, model, params, rows = dropping
    np.testing.assert_array_equal(
        logits_of(dropping, params, *rows), logits_of(model, params, *rows)
    )


def test_dropout_with_a_key(dropping):
    dropping, model, params, rows = dropping
    one, same, other = (
        logits_of(dropping, params, *rows, jax.random.key(i)) for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 0.1
    np.testing.assert_array_equal(
        logits_of(model, params, *rows, jax.random.key(0)),
        logits_of(model, params, *rows),
    )


def zeros(model):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.shapes())


@functools.partial(jax.jit, static_argnums=0)
def dropped_out(model, params):
    return model.hidden(params, tokens(1, 8), key=jax.random.key(0))[0]


def test_dropout_differs_between_the_branches_of_a_parallel_layer():
    """Attention and MLP both give 1: an entry keeps none, one or both, where one mask would leave
    none or both.
    """
    model = Model(
        dataclasses.replace(
            FAMILIES["neox"], dropout=0.5, d_model=256, n_layers=1, norm_eps=1.0
        )
    )
    params = zeros(model)
    layer = params["backbone"]["layers"]["layer_0"]
    layer["attention"]["out"]["bias"] = layer["mlp"]["down"]["bias"] = jnp.ones(256)
    params["backbone"]["norm"]["scale"] = jnp.ones(256)
    hidden = dropped_out(model, params)
    assert [len(np.unique(np.round(row, 4))) for row in np.asarray(hidden)] == [3] * 8


def test_dropout_differs_between_layers():
    """Two layers with the same weights, whose MLPs give a constant: with one mask for both, both
    would drop alike.
    """
    config = dataclasses.replace(FAMILIES["gpt2"], dropout=0.5, d_model=256)
    model = Model(config)
    params = zeros(model)
    for layer in params["backbone"]["layers"].values():
        layer["mlp"]["down"]["bias"] = jnp.ones(256)
    params["backbone"]["norm"]["scale"] = jnp.ones(256)
    hidden = dropped_out(model, params)
    # Per entry 0, 1 or 2 layers kept it: three levels, of which one shared mask would leave two.
    assert [len(np.unique(np.round(row, 4))) for row in np.asarray(hidden)] == [3] * 8


# ------------------------------------------------------------------ init and parameters


def test_init_standard_deviations():
    config = TransformerConfig(
        vocab_size=512,
        d_model=128,
        n_layers=2,
        n_heads=4,
        d_ff=256,
        max_length=64,
        positions="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        scale_residual_init=True,
        init_std=0.02,
        tie_embeddings=False,
    )
    params = jax.jit(Model(config).init)(jax.random.key(0))
    layer, other = (params["backbone"]["layers"][f"layer_{i}"] for i in range(2))
    for kernel in (
        layer["attention"]["query"],
        layer["attention"]["value"],
        layer["mlp"]["up"],
        params["head"],
    ):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.03)
    for table in params["backbone"]["embed"].values():
        np.testing.assert_allclose(np.std(table), 0.02, rtol=0.03)
    for kernel in (
        layer["attention"]["out"],
        layer["mlp"]["down"],
    ):  # 2 residual layers a block, 2 blocks: / 2
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.01, rtol=0.03)
        assert not np.asarray(kernel["bias"]).any()
    np.testing.assert_array_equal(layer["norm_1"]["scale"], np.ones(128))
    assert (
        np.abs(
            np.asarray(layer["mlp"]["up"]["kernel"] - other["mlp"]["up"]["kernel"])
        ).max()
        > 0.01
    )


@pytest.mark.parametrize(
    ("family", "biased"),
    [
        ("llama", set()),
        ("qwen2", {"query", "key", "value"}),
        *[
            (family, {"query", "key", "value", "out", "up", "down"})
            for family in ("gpt1", "gpt2", "neox")
        ],
    ],
)
def test_which_projections_have_a_bias(family, biased):
    for layer in Model(CONFIGS[family]).shapes()["backbone"]["layers"].values():
        projections = layer["attention"] | layer["mlp"]
        assert {
            name for name, leaves in projections.items() if "bias" in leaves
        } == biased


def test_pitfall_25_scalar_head_starts_at_one_over_root_width_plus_one():
    config = dataclasses.replace(FAMILIES["llama"], d_model=4096, n_layers=1, d_ff=4)
    head = jax.jit(lambda k: Model(config, "scalar").init(k)["head"])
    np.testing.assert_allclose(
        np.std(head(jax.random.key(0))["kernel"]), 4097**-0.5, rtol=0.05
    )
    assert float(head(jax.random.key(0))["bias"]) == 0.0
    # The seed decides the head: the same twice, another with another seed.
    np.testing.assert_array_equal(
        head(jax.random.key(3))["kernel"], head(jax.random.key(3))["kernel"]
    )
    assert (
        np.abs(
            np.asarray(
                head(jax.random.key(3))["kernel"] - head(jax.random.key(4))["kernel"]
            )
        ).max()
        > 0
    )


def test_scalar_is_hidden_times_kernel_plus_bias():
    model = Model(FAMILIES["llama"], "scalar")
    params = random_params(model)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, model.config.d_model))
    got = model.scalar(params, hidden)
    assert got.shape == (2, 5) and got.dtype == jnp.float32
    kernel, bias = (
        np.asarray(params["head"]["kernel"], np.float64),
        float(params["head"]["bias"]),
    )
    hidden = np.asarray(hidden, np.float64)
    size = np.abs(hidden) @ np.abs(kernel) + abs(
        bias
    )  # of what is summed: float32 rounds each term of it
    assert (np.abs(got - (hidden @ kernel + bias)) < 1e-6 * size).all()


@pytest.mark.parametrize("family", ["llama", "gpt1"])  # with a final norm and without
def test_a_language_models_backbone_fits_a_scalar_model(family):
    lm, scalar = (Model(CONFIGS[family], head).shapes() for head in ("lm", "scalar"))
    assert lm["backbone"] == scalar["backbone"]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("family", "head"),
    [*((family, "lm") for family in DISTINCT), ("gpt1", "scalar")],
    ids=lambda x: x,
)
def test_every_parameter_has_axis_names(family, head, scan):
    model = Model(dataclasses.replace(CONFIGS[family], scan_layers=scan), head)
    known = make_layout(MeshConfig()).rules
    pairs = jax.tree.map(lambda x, names: (x, names), model.shapes(), model.axes())
    for x, names in jax.tree.leaves(pairs, is_leaf=lambda y: isinstance(y, tuple)):
        assert len(names) == x.ndim
        assert all(name in known for name in names)
    if scan:
        experts = ("expert",) if model.config.n_experts else ()
        up = model.axes()["backbone"]["layers"]["mlp"]["up"]
        assert up["kernel"] == ("layers", *experts, "embed", "mlp")


@pytest.mark.parametrize(
    ("scan", "lora"),
    [(False, LoraConfig(rank=2)), (True, LoraConfig())],
    ids=["lora", "scan"],
)
def test_shapes_are_those_of_init_and_every_caller_has_a_tree_of_its_own(scan, lora):
    model = Model(
        dataclasses.replace(FAMILIES["llama"], scan_layers=scan), "scalar", lora
    )
    pairs = [(model.init, model.shapes), (model.init_trained, model.trained_shapes)]
    for init, shapes in pairs:
        assert shapes() == jax.eval_shape(init, jax.random.key(0))
    for tree in (model.shapes, model.trained_shapes, model.axes, model.trained_axes):
        before = jax.tree.map(str, tree())
        tree()["head"].clear()
        tree()["backbone"]["layers"].clear()
        assert jax.tree.map(str, tree()) == before


@pytest.mark.parametrize(
    ("family", "mesh", "scan"),
    [
        pytest.param("llama", {"data": 4}, False, marks=pytest.mark.slow),
        pytest.param("gpt2", {"data": 1, "fsdp": 4}, False, marks=pytest.mark.slow),
        ("qwen2", {"data": 1, "tensor": 2, "fsdp": 2}, False),
        ("neox", {"data": 2, "tensor": 2}, True),
        pytest.param(
            "gemma-like", {"data": 2, "fsdp": 2}, True, marks=pytest.mark.slow
        ),
        pytest.param(
            "olmo-like", {"data": 2, "tensor": 2}, False, marks=pytest.mark.slow
        ),
    ],
)
def test_four_devices_are_one(family, mesh, scan):
    if jax.device_count() < 4:
        pytest.skip("one device")
    config = dataclasses.replace(CONFIGS[family], vocab_size=64, scan_layers=scan)
    model = Model(config)
    params = random_params(model)
    rows, targets = tokens(4, 8), tokens(4, 8, seed=2)

    def loss(p, rows, targets):
        return model.cross_entropy(p, model.hidden(p, rows), targets, jnp.ones((4, 8)))[
            0
        ]

    expected = jax.jit(jax.value_and_grad(loss))(params, rows, targets)
    layout = make_layout(MeshConfig(**mesh), jax.devices()[:4])
    names = model.axes()

    def put(n, x):
        return jax.device_put(x, layout.sharding(*n))

    sharded = jax.tree.map(put, names, params, is_leaf=lambda x: isinstance(x, tuple))
    with layout.use():
        got = jax.jit(jax.value_and_grad(loss))(
            sharded, *(put(("batch",), x) for x in (rows, targets))
        )

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)

    jax.tree.map(close, got, expected)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 5}, "n_heads = 5 does not divide model.d_model = 24"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3 does not divide"),
        (
            {"d_head": 7},
            "of a head of 7 is 7: must be even and at least 2 with positions='rope'",
        ),
        ({"rope_fraction": 0.25}, "model.rope_fraction = 0.25 of a head of 6 is 1"),
        ({"rope_fraction": 0.1}, "at least 2"),
        (
            {"rope_fraction": 0.0},
            "model.rope_fraction=0.0: expected float > 0 and <= 1",
        ),
        (
            {"rope_fraction": 1.5},
            "model.rope_fraction=1.5: expected float > 0 and <= 1",
        ),
        ({"dropout": 1.0}, "model.dropout=1.0: expected float >= 0 and < 1"),
        ({"n_layers": 0}, "model.n_layers=0: expected int >= 1"),
        ({"d_head": -2}, "model.d_head=-2: expected int >= 1"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0: expected float >= 1.2e-38 and <= 1"),
        ({"attention_pattern": ()}, "model.attention_pattern is empty"),
        ({"window": 4}, "a width is needed if, and only if, a layer is"),
        ({"attention_pattern": ("window",)}, "model.window = None"),
        (
            {"attention_pattern": ("full_no_rope",), "positions": "learned"},
            "a full_no_rope layer: model.positions is 'learned'",
        ),
        ({"window_rope_theta": 10.0}, "no layer is a window"),
        (
            {"rope_scaling": {"kind": "yarn"}},
            "model.rope_scaling.original_length is None",
        ),
        (
            {"rope_scaling": {"low_frequency": 4.0}},
            "model.rope_scaling.low_frequency = 4.0: must be below",
        ),
        (
            {"rope_scaling": {"beta_slow": 32.0}},
            "model.rope_scaling.beta_slow = 32.0: must be below",
        ),
        (
            {"rope_scaling": {"factor": 0.5}},
            "model.rope_scaling.factor=0.5: expected float >= 1",
        ),
        (
            {"attention": "cudnn", "dtype": "bfloat16", "attention_softcap": 5.0},
            "model.attention = 'cudnn' cannot cap scores",
        ),
        (
            {"norm": "other"},
            "model.norm='other': expected one of 'rmsnorm', 'layernorm'",
        ),
    ],
)
def test_impossible_configs_say_why(change, words):
    with pytest.raises(ConfigError, match=r"model|width") as caught:
        build(TransformerConfig, SIZE | change, "model")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_from_before_an_option_is_that_model_still():
    """A saved model's config.json names the options of its day; later ones stand at what was then
    the only way.
    """
    later = {"rope_fraction": 1.0, "residual": "pre_norm", "qkv_bias": False}
    saved = {
        name: value
        for name, value in dataclasses.asdict(FAMILIES["gpt2"]).items()
        if name not in later
    }
    assert build(TransformerConfig, saved) == FAMILIES["gpt2"]
    assert {name: getattr(FAMILIES["gpt2"], name) for name in later} == later


def test_too_long_a_sequence_says_so():
    model = Model(FAMILIES["llama"])
    with pytest.raises(
        ConfigError, match="max_length=32: must be at least the sequence length, 33"
    ):
        jax.eval_shape(
            model.hidden, model.shapes(), jax.ShapeDtypeStruct((1, 33), jnp.int32)
        )


def test_unknown_head():
    with pytest.raises(ConfigError, match="lm, scalar"):
        Model(FAMILIES["llama"], "value")
