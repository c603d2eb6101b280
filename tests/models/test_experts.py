"""The mixture of experts against dense formulations and numbers by hand, on one device and several.

tests/models/test_transformer.py compares the whole model with a plain loop over tokens and experts
(family "moe").
"""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import state as states
from rlhfjax.algos.masked import divide
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, quantized
from rlhfjax.models.experts import (
    Experts,
    Routing,
    add_balance,
    balance,
    mixture,
    routing_metrics,
    routing_of,
)
from rlhfjax.models.lora import LoraConfig
from rlhfjax.plan import topology
from tests.collectives import collectives
from tests.models.families import CONFIGS, random_params, tokens
from tests.needs import needs

MOE = CONFIGS["moe"]
E, K, D, F = MOE.n_experts, MOE.experts_per_token, MOE.d_model, MOE.d_ff
SEGMENTS = jnp.array([[1] * 8, [1] * 4 + [2] * 2 + [0] * 2] * 2)
MODULE = "tests/models/test_experts.py"


# ------------------------------------------------------------------ the products


def dense_mixture(x, weights, chosen, gate, up, down):
    """Every expert on every token, times a weight that is 0 unless the expert was chosen."""
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate))
    hidden = hidden * jnp.einsum("btd,edf->btef", x, up)
    y = jnp.einsum("btef,efd->bted", hidden, down)
    one_hot = chosen[..., None] == jnp.arange(E)
    return jnp.einsum("bted,btk,btke->btd", y, weights, one_hot)


def random_mixture(seed=0):
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((2, 5, E)))[..., :K]
    shapes = [(2, 5, D), (2, 5, K), (E, D, F), (E, D, F), (E, F, D)]
    x, weights, *kernels = (jnp.asarray(rng.normal(0, 0.4, s), "f") for s in shapes)
    return x, weights, jnp.asarray(chosen, jnp.int32), kernels


def test_outputs_and_gradients_are_those_of_every_expert_on_every_token():
    x, weights, chosen, kernels = random_mixture()

    def ours(x, weights, kernels):
        return jnp.sin(mixture(MOE, x, weights, chosen, kernels)).sum()

    def plain(x, weights, kernels):
        return jnp.sin(dense_mixture(x, weights, chosen, *kernels)).sum()

    got, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, weights, kernels)
        for f in (ours, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        got,
        expected,
    )
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(got))


def test_experts_without_tokens_have_no_gradient():
    x, weights, _, kernels = random_mixture()
    chosen = jnp.broadcast_to(jnp.array([4, 1]), weights.shape)
    gradients = jax.jit(
        jax.grad(lambda kernels: mixture(MOE, x, weights, chosen, kernels).sum())
    )(kernels)
    for gradient in gradients:
        size = np.abs(gradient).max((1, 2))
        assert (size[[1, 4]] > 0).all() and not size[[0, 2, 3, 5]].any()


@pytest.mark.parametrize(("normalize", "weight"), [(True, 1 / K), (False, 1 / E)])
def test_equal_probabilities_take_the_experts_of_lower_index(normalize, weight):
    """A router of zeros."""
    config = dataclasses.replace(MOE, normalize_routing=normalize)
    x, _, _, (gate, up, down) = random_mixture()
    router = jnp.zeros((D, E))
    kernels = {"router": router, "gate": gate, "up": up, "down": down}
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    first = jnp.broadcast_to(jnp.arange(2), (2, 5, 2))
    expected = dense_mixture(x, jnp.full((2, 5, 2), weight), first, gate, up, down)
    got = Experts(config).apply({"params": params}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_bf16_activations_are_routed_in_float32():
    """Two experts whose probabilities bfloat16 cannot tell apart: the second one is chosen."""
    config = dataclasses.replace(
        MOE, n_layers=1, n_experts=2, experts_per_token=1, dtype="bfloat16"
    )
    params = random_params(Model(config))
    mlp = params["backbone"]["layers"]["layer_0"]["mlp"]
    ones = jnp.ones_like(mlp["router"]["kernel"][:, 0])
    mlp["router"]["kernel"] = jnp.stack([ones, ones], axis=1)
    _, even = Model(config).hidden_and_routing(params, tokens(1, 8))
    # A difference of one part in 2^14, with the sign of the sum of the inputs.
    mlp["router"]["kernel"] = jnp.stack([ones, ones * (1 + 2.0**-14)], axis=1)
    _, tilted = Model(config).hidden_and_routing(params, tokens(1, 8))
    np.testing.assert_array_equal(even.load, [[1, 0]])
    assert 0 < tilted.load[0, 1] < 1


# ------------------------------------------------------------------ routing


def test_balance_of_even_routing_is_the_number_of_chosen_experts():
    even = Routing(jnp.full((2, E), K / E), jnp.full((2, E), 1 / E))
    assert balance(even) == pytest.approx(K)
    metrics = {name: divide(*pair) for name, pair in routing_metrics(even).items()}
    assert metrics["router_balance"] == pytest.approx(K)
    assert metrics["router_most_loaded"] == pytest.approx(1)
    assert metrics["router_entropy"] == pytest.approx(math.log(E))


def test_balance_of_one_expert_for_all_is_the_number_of_experts():
    one = jnp.zeros((1, E)).at[0, 3].set(1)
    metrics = {
        name: divide(*p) for name, p in routing_metrics(Routing(one, one)).items()
    }
    assert balance(Routing(one, one)) == E == metrics["router_most_loaded"]
    assert metrics["router_entropy"] == 0


def test_balance_by_hand():
    """e = 2 and k = 1: layers 2 (3/4 x 0.6 + 1/4 x 0.4) = 1.1 and 2 (1/2 x 0.9 + 1/2 x 0.1) = 1."""
    load = jnp.array([[0.75, 0.25], [0.5, 0.5]])
    probability = jnp.array([[0.6, 0.4], [0.9, 0.1]])
    routing = Routing(load, probability)
    assert balance(routing) == pytest.approx((1.1 + 1.0) / 2)
    metrics = routing_metrics(routing)
    assert metrics["router_most_loaded"][0] == pytest.approx((1.5 + 1.0) / 2)
    entropies = [-0.6 * math.log(0.6) - 0.4 * math.log(0.4)]
    entropies += [-0.9 * math.log(0.9) - 0.1 * math.log(0.1)]
    assert metrics["router_entropy"][0] == pytest.approx(sum(entropies) / 2)


def test_routing_by_hand_without_padding():
    probability = jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]])
    chosen = jnp.array([[[0, 1], [2, 1], [0, 1]]])
    is_chosen = jax.nn.one_hot(chosen, 3)
    sown = {"probability": (probability,), "is_chosen": (is_chosen,)}
    routing = routing_of(sown, jnp.array([[1, 2, 0]]))
    np.testing.assert_allclose(routing.load, [0.5, 1.0, 0.5])
    np.testing.assert_allclose(routing.probability, [0.3, 0.25, 0.45])


def test_routing_counts_every_layer_and_no_padding():
    """The routing of two rows is the mean of the rows', weighted by their tokens."""
    model = Model(MOE)
    params, rows = random_params(model), tokens(2, 8)
    route = jax.jit(
        lambda rows, segments: model.hidden_and_routing(
            params, rows, segment_ids=segments
        )[1]
    )
    both = route(rows, SEGMENTS[:2])
    parts = [route(rows[i : i + 1], SEGMENTS[i : i + 1]) for i in range(2)]
    assert both.load.shape == both.probability.shape == (MOE.n_layers, E)
    for name in ("load", "probability"):
        whole, (first, second) = getattr(both, name), (getattr(p, name) for p in parts)
        np.testing.assert_allclose(whole, (8 * first + 6 * second) / 14, rtol=1e-5)
    np.testing.assert_allclose(both.load.sum(1), K, rtol=1e-6)
    np.testing.assert_allclose(both.probability.sum(1), 1, rtol=1e-6)
    changed = rows.at[1, 6:].set(7)
    np.testing.assert_array_equal(route(changed, SEGMENTS[:2]).load, both.load)


@pytest.mark.parametrize(
    "remat", ["none", pytest.param("full", marks=pytest.mark.slow)]
)
def test_scanned_layers_have_the_routing_of_unrolled_ones(remat):
    model = Model(MOE)
    scanned = Model(dataclasses.replace(MOE, scan_layers=True, remat=remat))
    params = random_params(model)
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *params["backbone"]["layers"].values()
    )
    restacked = params | {"backbone": params["backbone"] | {"layers": stacked}}
    expected = loss_and_gradients(model, params)
    got, gradients = loss_and_gradients(scanned, restacked)
    np.testing.assert_allclose(got, expected[0], rtol=1e-5)
    layers = gradients["backbone"]["layers"]["mlp"]
    for i, layer in enumerate(expected[1]["backbone"]["layers"].values()):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            layers,
            layer["mlp"],
        )


def test_the_last_hidden_state_and_the_routing_of_all_layers():
    model = Model(MOE, head="scalar")
    params, rows, mask = random_params(model), tokens(2, 8), (SEGMENTS[:2] > 0) * 1
    hidden, routing = model.last_hidden_and_routing(params, rows, mask)
    expected = model.hidden_and_routing(params, rows, segment_ids=mask)[1]
    np.testing.assert_allclose(
        hidden, model.last_hidden(params, rows, mask), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(routing.load, expected.load)


def test_the_balancing_loss_is_added_to_the_loss_and_its_metric():
    routing = Routing(jnp.array([[0.75, 0.25]]), jnp.array([[0.6, 0.4]]))
    config = dataclasses.replace(MOE, n_experts=2, router_loss=0.5)
    loss = (jnp.float32(3.0), {"loss": (jnp.float32(12.0), jnp.float32(4.0))})
    scalar, metrics = add_balance(config, loss, routing, prefix="value_")
    assert scalar == pytest.approx(3 + 0.5 * 1.1) == divide(*metrics["loss"])
    assert metrics["value_router_balance"][0] == pytest.approx(1.1)
    assert add_balance(config, loss, None) is loss


# ------------------------------------------------------------------ several devices


def loss_and_gradients(model, params, layout=None):
    """The loss of a language model with its balancing loss, and the gradients."""
    rows, targets = tokens(4, 8), tokens(4, 8, seed=2)
    weight = (SEGMENTS > 0).astype(jnp.float32)

    def loss(params, rows, targets):
        hidden, routing = model.hidden_and_routing(params, rows, segment_ids=SEGMENTS)
        total = model.cross_entropy(params, hidden, targets, weight)[0]
        return add_balance(
            model.config, (total, {"loss": (total, jnp.ones(()))}), routing
        )[0]

    step = jax.jit(jax.value_and_grad(loss))
    if layout is None:
        return step(params, rows, targets)
    with layout.use():
        batch = layout.put((np.asarray(rows), np.asarray(targets)))
        compiled = step.lower(placed(model, params, layout), *batch).compile()
        return compiled, compiled(placed(model, params, layout), *batch)


def placed(model, params, layout):
    return jax.tree.map(
        lambda names, x: jax.device_put(x, layout.sharding(*names)),
        model.axes(),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )


MESHES = {
    "data": {"data": 2, "expert": 2},
    "fsdp": {"data": 1, "fsdp": 2, "expert": 2},
    "tensor": {"data": 1, "tensor": 2, "expert": 2},
    "sequence": {"data": 1, "sequence": 2, "expert": 2},
    "8 data-tensor": {"data": 2, "tensor": 2, "expert": 2},
    "8 fsdp-tensor": {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2},
    "8 fsdp": {"data": 1, "fsdp": 4, "expert": 2},
    "8 data": {"data": 4, "expert": 2},
    "8 of the data axis": {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "rules": {"expert": "data"},
    },
}
OFTEN = ("data", "tensor")


@pytest.mark.parametrize(
    "name",
    [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in MESHES],
)
def test_devices_that_share_the_experts_are_one(name):
    mesh = MeshConfig(**MESHES[name])
    devices = 8 if name.startswith("8") else 4
    if jax.device_count() < devices:
        pytest.skip(f"{devices} devices")
    config = dataclasses.replace(MOE, vocab_size=64, scan_layers=name == "tensor")
    model = Model(config)
    params = random_params(model)
    expected = loss_and_gradients(model, params)
    layout = make_layout(mesh, jax.devices()[:devices])
    compiled, got = loss_and_gradients(model, params, layout)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
        got,
        expected,
    )
    if mesh.expert > 1:
        assert_no_expert_is_sent(compiled, layout)


def assert_no_expert_is_sent(compiled, layout):
    """No collective but the sum of gradients has an expert's matrices, and that only its own.

    With fsdp, matrices are gathered along it, those of the device's own experts.
    """
    own = E // layout.mesh.shape["expert"]
    found = collectives(compiled.as_text())
    width, hidden = D, F // layout.mesh.shape["tensor"]
    matrices = [{width, hidden}, {width // layout.mesh.shape["fsdp"], hidden}]
    sent = set()
    for x in found:
        for shape in x.shapes:
            sizes = [n for n in shape if n > 1]
            if len(sizes) >= 2 and set(sizes[-2:]) in matrices:
                assert E not in sizes, x
                assert math.prod(sizes) <= own * width * hidden * MOE.n_layers, x
                sent.add(x.kind)
    gathers = {"all-gather"} if layout.mesh.shape["fsdp"] > 1 else set()
    assert sent <= {"all-reduce"} | gathers, sent
    if (
        layout.batch_shards * layout.mesh.shape["expert"] == layout.mesh.size
        and not gathers
    ):
        assert not [x for x in found if x.kind in ("all-gather", "all-to-all")]


@pytest.mark.slow
def test_eight_devices_that_share_the_experts_are_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "slow", MODULE]
    result = subprocess.run(
        [*command, "-k", "devices_that_share and 8 and not eight", "-rs"],
        env=os.environ | flags,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "SKIPPED" not in result.stdout, result.stdout


@needs("libtpu", extra="plan")
@pytest.mark.slow
def test_the_tpu_compiler_sends_no_experts(optimized):
    """Along `expert` nothing is gathered, and the products are those of ragged kernels."""
    devices = topology.target("v5e:2x2").devices
    layout = make_layout(MeshConfig(data=2, expert=2), devices)
    model = Model(dataclasses.replace(MOE, d_model=128, d_ff=128, d_head=64))
    with layout.use():
        params = states.abstract(model.shapes(), model.axes(), layout)
        rows = jax.ShapeDtypeStruct(
            (4, 32), jnp.int32, sharding=layout.sharding("batch")
        )

        def loss(params, rows):
            hidden, routing = model.hidden_and_routing(params, rows)
            return hidden.sum() + balance(routing)

        with topology.quiet():
            lowered = jax.jit(jax.grad(loss)).lower(params, rows)
            text = lowered.compile().as_text()
    kinds = {x.kind for x in collectives(text)}
    assert kinds == {"all-reduce"} and "ragged" in text


# ------------------------------------------------------------------ errors


def test_adapters_of_experts_are_refused_by_name():
    config = LoraConfig(rank=2, targets="attention|mlp")
    with pytest.raises(ConfigError, match="matches backbone/layers/layer_0/mlp/down"):
        Model(MOE, lora=config).trained_shapes()
    adapted = Model(MOE, lora=LoraConfig(rank=2, targets="attention")).trained_shapes()
    assert "mlp" not in adapted["backbone"]["layers"]["layer_0"]


def test_quantized_experts_are_refused():
    model = Model(MOE)
    with pytest.raises(ConfigError, match="int8 weights: experts have none"):
        quantized.weights(random_params(model), model.axes())
    with pytest.raises(ConfigError, match=r"lora\.base='nf4'"):
        Model(MOE, lora=LoraConfig(rank=2, base="nf4"))
