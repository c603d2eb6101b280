import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model, stacked, unstacked
from rlhfjax.optim import (
    OptimConfig,
    clip_by_global_norm,
    decayed,
    make_optimizer,
    make_schedule,
    moments_per_parameter,
    scale_by_adam_tf,
)
from tests.models.families import FAMILIES


def rates(total_steps, steps, **fields):
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **fields), total_steps)
    return [float(schedule(n)) for n in steps]


def test_linear_by_hand():
    # 2 steps of warm-up from 0, then 1 -> 0 over 8 steps: at n = 6, u = 4/8.
    found = rates(10, [0, 1, 2, 6, 10], schedule="linear", warmup_steps=2)
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_cosine_to_ten_percent_by_hand():
    # 0.1 + 0.9 (1 + cos(pi u)) / 2 at u = 0, 1/4, 1/2, 1.
    found = rates(8, [0, 2, 4, 8, 100], schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose(
        found, [1, 0.1 + 0.9 * 0.8535534, 0.55, 0.1, 0.1], rtol=1e-5
    )


def test_constant_with_instructgpts_warmup():
    # From 1/10 of the peak over 10 updates: 0.1 + 0.9 n / 10.
    found = rates(
        500, [0, 1, 5, 10, 499], schedule="constant", warmup_steps=10, warmup_start=0.1
    )
    np.testing.assert_allclose(found, [0.1, 0.19, 0.55, 1, 1], rtol=1e-6)


def test_decay_steps_end_the_decay_before_the_run():
    # GPT-3: cosine over 260 of 300 billion tokens, then constant at 10 %.
    found = rates(
        300, [130, 260, 299], schedule="cosine", final_fraction=0.1, decay_steps=260
    )
    np.testing.assert_allclose(found, [0.55, 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, total", [(0, 1), (1, 1), (3, 10), (10, 10), (0, 7)])
def test_pitfall_22_never_negative_and_used_up_exactly_at_the_end(
    schedule, warmup, total
):
    found = np.array(
        rates(total, range(total + 50), schedule=schedule, warmup_steps=warmup)
    )
    assert (
        np.all(found >= 0) and np.all(found <= 1 + 1e-6) and np.all(np.isfinite(found))
    )
    if schedule != "constant":
        np.testing.assert_allclose(found[total + 1 :], 0, atol=1e-6)
        assert warmup == total or found[total - 1] > 0  # the last update still moves


def test_pitfall_22_the_optimizer_counts_updates():
    # sgd without momentum moves by exactly the rate: the updates 0 .. 4 of a linear decay over 5.
    config = OptimConfig(
        name="sgd", b1=0.0, learning_rate=1.0, schedule="linear", clip_norm=0.0
    )
    tx = make_optimizer(config, total_steps=5)
    params = jnp.zeros(())
    state, moves = tx.init(params), []
    for _ in range(7):
        updates, state = tx.update(jnp.ones(()), state, params)
        moves.append(-float(updates))
    np.testing.assert_allclose(moves, [1, 0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-6)


def loop_adam(
    gradients, lr, b1, b2, eps, tf, decay=0.0, theta=1.0, first=lambda b1, m: b1 * m
):
    """Kingma & Ba 2015, algorithm 1 (and the TensorFlow form), one scalar, in Python's doubles.

    `first` is how the first moment decays, b1 m, from one step to the next.
    """
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = first(b1, m) + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        if tf:
            step = lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + eps)
        else:
            step = lr * m_hat / (math.sqrt(v_hat) + eps)
        theta -= step + lr * decay * theta
    return theta


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name, tf, decay",
    [
        ("adam", False, 0.0),
        ("adamw", False, 0.1),
        ("adam_tf", True, 0.0),
        ("adamw_tf", True, 0.1),
    ],
)
def test_adam_equals_the_algorithm(name, tf, decay, moments):
    """Moments in bfloat16: the first one is rounded to it between steps, the second is not."""
    how = {
        "b1": 0.8,
        "b2": 0.95,
        "eps": 0.1,
        "weight_decay": decay,
        "clip_norm": 0.0,
        "moments": moments,
    }
    config = OptimConfig(name=name, learning_rate=0.01, schedule="constant", **how)
    gradients = [0.5, -1.0, 0.25, 2.0]
    tx, params = make_optimizer(config, 4), {"kernel": jnp.ones((1, 1))}
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update({"kernel": jnp.full((1, 1), g)}, state, params)
        params = optax.apply_updates(params, updates)
    kept = float if moments == "float32" else jnp.bfloat16
    expected = loop_adam(
        gradients,
        0.01,
        0.8,
        0.95,
        0.1,
        tf,
        decay,
        first=lambda b1, m: b1 * float(kept(m)),
    )
    np.testing.assert_allclose(params["kernel"][0, 0], expected, rtol=1e-6)
    assert (
        state[0].mu["kernel"].dtype == moments
        and state[0].nu["kernel"].dtype == jnp.float32
    )


@pytest.mark.parametrize(
    "name, b1, moments, numbers",
    [
        ("adamw", 0.9, "float32", 2.0),
        ("adam_tf", 0.9, "bfloat16", 1.5),
        ("rmsprop", 0.9, "float32", 1.0),
        ("sgd", 0.9, "bfloat16", 0.5),
        ("sgd", 0.0, "float32", 0.0),
    ],
)
def test_what_is_kept_is_what_the_state_has(name, b1, moments, numbers):
    config = OptimConfig(name=name, b1=b1, moments=moments)
    state = make_optimizer(config, 2).init(jnp.ones((8, 8)))
    assert moments_per_parameter(config) == numbers
    assert (
        sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim == 2) == 4 * 64 * numbers
    )


def test_momentum_in_bfloat16():
    tx = make_optimizer(
        OptimConfig(name="sgd", b1=0.9, clip_norm=0.0, moments="bfloat16"), 2
    )
    assert [
        x.dtype for x in jax.tree.leaves(tx.init(jnp.ones((1, 1)))) if x.ndim == 2
    ] == [jnp.bfloat16]


def test_pitfall_21_tf_epsilon_is_outside_of_the_bias_correction():
    # First update, gradient g = 1e-5 = eps, b2 = 0.999: sqrt(v) = 1e-5 sqrt(0.001) = 3.162e-7.
    #   inside:  g / (|g| + eps)                                   = 1/2
    # outside: sqrt(0.001) / 0.1 * 0.1 g / (3.162e-7 + 1e-5)     = 3.162e-7 / 1.03162e-5 = 0.030653
    #
    g = jnp.full((1,), 1e-5)
    tf, standard = (
        scale_by_adam_tf(0.9, 0.999, 1e-5),
        optax.scale_by_adam(0.9, 0.999, 1e-5),
    )
    first_tf, _ = tf.update(g, tf.init(g))
    first_standard, _ = standard.update(g, standard.init(g))
    np.testing.assert_allclose(
        [first_tf[0], first_standard[0]], [0.0306534, 0.5], rtol=1e-4
    )


def test_pitfall_21_the_two_agree_without_epsilon():
    rng = np.random.default_rng(0)
    tf, standard = scale_by_adam_tf(0.9, 0.95, 0.0), optax.scale_by_adam(0.9, 0.95, 0.0)
    g = jnp.array(rng.normal(size=5), jnp.float32)
    state_tf, state_standard = tf.init(g), standard.init(g)
    for _ in range(3):
        g = jnp.array(rng.normal(size=5), jnp.float32)
        a, state_tf = tf.update(g, state_tf)
        b, state_standard = standard.update(g, state_standard)
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_clip_by_global_norm_by_hand():
    # sqrt(3^2 + 4^2) = 5 -> scaled by 2/5; below the limit untouched; no gradient no NaN.
    clip = clip_by_global_norm(2.0)
    found, _ = clip.update(
        {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}, clip.init({})
    )
    np.testing.assert_allclose([found["a"][0], found["b"][0, 0]], [1.2, 1.6], rtol=1e-6)
    for small in (1.0, 0.0):
        found, _ = clip.update({"a": jnp.array([small])}, clip.init({}))
        np.testing.assert_array_equal(found["a"], [small])


def test_clipping_is_of_the_gradient_and_not_of_the_update():
    # Momentum-free sgd with limit 1 and rate 0.1: a gradient of norm 5 moves 0.1; with clip_norm =
    # 0 it moves 0.5.
    for clip_norm, moved in ((1.0, 0.1), (0.0, 0.5)):
        config = OptimConfig(
            name="sgd",
            b1=0.0,
            learning_rate=0.1,
            schedule="constant",
            clip_norm=clip_norm,
        )
        tx = make_optimizer(config, 1)
        updates, _ = tx.update(
            jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)), jnp.zeros(2)
        )
        np.testing.assert_allclose(jnp.linalg.norm(updates), moved, rtol=1e-6)


# ------------------------------------------------------------------ weight decay

# What decays goes from 1 to 1 - 0.1 * 0.5.
DECAY = {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.5}
KERNELS = {
    *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    *(f"mlp/{name}/kernel" for name in ("gate", "up", "down")),
    *("embed/tokens", "embed/positions"),
}


def after_one_update(params, name="adamw"):
    """Every parameter, 1 before, after an update with gradients of 0; params are shapes."""
    params = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    tx = make_optimizer(OptimConfig(name=name, **DECAY), 1)
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    return jax.tree.map(np.asarray, optax.apply_updates(params, updates))


def shapes(family, head="lm", scan_layers=False, init="init", **options):
    model = Model(
        dataclasses.replace(FAMILIES[family], scan_layers=scan_layers), head, **options
    )
    return jax.eval_shape(getattr(model, init), jax.random.key(0))


def by_path(tree):
    """{"a/b/c": array} of a nested dict."""
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
    }


@pytest.mark.parametrize("name", ["adamw", "adamw_tf", "rmsprop", "sgd"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_pitfall_33_a_norms_gain_does_not_decay_and_a_kernel_does(scan_layers, name):
    layers = after_one_update(shapes("gpt2", scan_layers=scan_layers), name)[
        "backbone"
    ]["layers"]
    layer = layers if scan_layers else layers["layer_0"]
    np.testing.assert_array_equal(layer["norm_1"]["scale"], 1.0)
    np.testing.assert_array_equal(layer["attention"]["query"]["bias"], 1.0)
    np.testing.assert_allclose(layer["attention"]["query"]["kernel"], 0.95, rtol=1e-6)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_33_scanned_and_separate_layers_have_one_update(family, head):
    """It makes kernels and tables 0.95 and leaves all else at 1, also where members are stacked."""
    separate = after_one_update(shapes(family, head))
    scanned = after_one_update(shapes(family, head, scan_layers=True))
    jax.tree.map(np.testing.assert_array_equal, scanned, stacked(separate))
    jax.tree.map(np.testing.assert_array_equal, unstacked(scanned), separate)
    output = {"head/kernel"} if head == "lm" else set()
    for path, x in by_path(separate).items():
        kernel = path in output or any(path.endswith(f"/{name}") for name in KERNELS)
        np.testing.assert_allclose(x, 0.95 if kernel else 1.0, rtol=1e-6, err_msg=path)
    assert decayed(jax.tree.map(lambda x: np.stack([x] * 3), separate)) == decayed(
        separate
    )


def test_pitfall_33_adapters_decay_whole_and_in_scanned_layers():
    """A stacked B [layers, r, heads, head_dim], a separate A [width, r]; not the scalar head."""
    for scan_layers in (False, True):
        options = {"init": "init_trained", "lora": LoraConfig(rank=2)}
        trained = by_path(
            after_one_update(shapes("qwen2", "scalar", scan_layers, **options))
        )
        for path, x in trained.items():
            expected = 1.0 if path.startswith("head/") else 0.95
            np.testing.assert_allclose(x, expected, rtol=1e-6, err_msg=path)
        names = {path.split("/")[-1] for path in trained}
        assert names == {"lora_a", "lora_b", "kernel", "bias"}


def test_a_parameter_of_unknown_name_is_an_error_where_something_decays():
    params = {"mixer": {"kernel": jnp.ones((2, 2)), "gate": jnp.ones((2, 2))}}
    with pytest.raises(
        ValueError, match=r"parameter mixer/gate: .* does not know its name"
    ):
        make_optimizer(OptimConfig(**DECAY), 1).init(params)
    make_optimizer(OptimConfig(**{**DECAY, "weight_decay": 0.0}), 1).init(params)


def test_rmsprop_and_sgd_by_hand():
    # rmsprop, b2 = 0.75, g = 2: v = 0.25 * 4 = 1, update 2 / (1 + eps). sgd with momentum 1/2: g,
    # then g + g/2.
    rms = make_optimizer(
        OptimConfig(
            name="rmsprop",
            learning_rate=1.0,
            schedule="constant",
            b2=0.75,
            clip_norm=0.0,
        ),
        1,
    )
    updates, _ = rms.update(jnp.array([2.0]), rms.init(jnp.zeros(1)), jnp.zeros(1))
    np.testing.assert_allclose(updates, [-2.0], rtol=1e-6)
    sgd = make_optimizer(
        OptimConfig(
            name="sgd", learning_rate=1.0, schedule="constant", b1=0.5, clip_norm=0.0
        ),
        2,
    )
    state = sgd.init(jnp.zeros(1))
    first, state = sgd.update(jnp.array([2.0]), state, jnp.zeros(1))
    second, _ = sgd.update(jnp.array([2.0]), state, jnp.zeros(1))
    np.testing.assert_allclose([first[0], second[0]], [-2, -3])


def test_rmsprops_epsilon_is_added_to_the_root():
    """b2 = 3/4, g = 2: v = 1, 2 / (sqrt(1) + 1/2) = 4/3; under the root, 2 / sqrt(1.5) = 1.63."""
    how = {"learning_rate": 1.0, "schedule": "constant", "clip_norm": 0.0}
    tx = make_optimizer(OptimConfig(name="rmsprop", b2=0.75, eps=0.5, **how), 1)
    updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.zeros(1))
    np.testing.assert_allclose(updates, [-4 / 3], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adam_tf"])
def test_the_gradient_is_clipped_before_the_moments(name):
    """Gradients (3, 4), then (0.3, 0.4), clipped to norm 1: Adam sees (0.6, 0.8), (0.3, 0.4)."""
    how = {"b1": 0.8, "b2": 0.95, "eps": 0.1}
    rate = {"learning_rate": 0.01, "schedule": "constant"}
    tx = make_optimizer(OptimConfig(name=name, clip_norm=1.0, **rate, **how), 2)
    params = jnp.ones(2)
    state = tx.init(params)
    for gradient in ([3.0, 4.0], [0.3, 0.4]):
        updates, state = tx.update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
    clipped = ([0.6, 0.3], [0.8, 0.4])
    expected = [loop_adam(seen, 0.01, **how, tf=name == "adam_tf") for seen in clipped]
    np.testing.assert_allclose(params, expected, rtol=1e-6)


def test_sharded_parameters_get_the_same_updates_and_keep_their_shards():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    config = OptimConfig(
        learning_rate=0.01, weight_decay=0.1, warmup_steps=2, clip_norm=0.5
    )
    tx = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8, 4), "bias": (4,)}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = {name: jnp.array(x, jnp.float32) for name, x in drawn.items()}

    @jax.jit
    def three_steps(params):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=3)[0]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = {
        "kernel": jax.device_put(
            params["kernel"], NamedSharding(mesh, P("data", None))
        ),
        "bias": jax.device_put(params["bias"], NamedSharding(mesh, P())),
    }
    (one, _), (four, state) = three_steps(params), three_steps(sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, four)
    for x in (
        four["kernel"],
        *(x for x in jax.tree.leaves(state) if x.shape == (8, 4)),
    ):
        assert x.sharding.shard_shape((8, 4)) == (2, 4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "adamax"}, "optim.name='adamax': expected one of 'adamw'"),
        ({"schedule": "step"}, "optim.schedule='step': expected one of 'constant'"),
        ({"learning_rate": -1.0}, "optim.learning_rate"),
        ({"learning_rate": math.nan}, "optim.learning_rate"),
        ({"clip_norm": -1.0}, "optim.clip_norm"),
        (
            {"final_fraction": 1.5},
            "optim.final_fraction=1.5: expected float >= 0 and <= 1",
        ),
        ({"b2": -0.1}, "optim.b2"),
        (
            {"moments": "int8"},
            "optim.moments='int8': expected one of 'float32', 'bfloat16'",
        ),
        (
            {"name": "rmsprop", "moments": "bfloat16"},
            "rmsprop with b1=0.9 has no first moment",
        ),
        ({"name": "adam", "weight_decay": 0.1}, "use adamw"),
        ({"name": "adam_tf", "weight_decay": 0.1}, "use adamw_tf"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(OptimConfig, fields, "optim")


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps: 20"):
        make_schedule(OptimConfig(warmup_steps=20), total_steps=10)
    with pytest.raises(ConfigError, match="warmup_steps: 20"):
        make_optimizer(OptimConfig(warmup_steps=20, decay_steps=10), total_steps=100)


def test_a_config_is_data():
    config = OptimConfig(**dataclasses.asdict(OptimConfig(name="adam_tf", eps=1e-5)))
    assert (config.name, config.eps) == ("adam_tf", 1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.eps = 0.0
