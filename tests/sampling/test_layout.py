"""The decode layout: what it costs, where its weights lie, and that it samples the same."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import state
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig, quantized
from rlhfjax.models.size import parameters
from rlhfjax.rl import placement, rollout
from rlhfjax.roles import Workload
from rlhfjax.sampling import layout as layouts
from rlhfjax.sampling.config import Sampling
from rlhfjax.sampling.samples import uniforms
from rlhfjax.strategy import AXES, Need
from tests.collectives import collectives

# Sizes that make an array known by its shape. Two devices divide the vocabulary, four do not.
CONFIG = TransformerConfig(
    vocab_size=94,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_head=6,
    d_ff=40,
    max_length=32,
    scan_layers=True,
)
MODEL = Model(CONFIG)
FSDP_TENSOR = make_layout(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
ONE = make_layout(MeshConfig(), jax.devices()[:1])
ROWS, PROMPT = 28, 8
SAMPLING = Sampling(max_new_tokens=6, eos_id=1, pad_id=0, samples_per_prompt=2)
NEAR = 1e-5  # of an edge of the distribution, and of log-probabilities


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, CONFIG.vocab_size, (ROWS // 2, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT) >= rng.integers(0, 4, (ROWS // 2, 1))
    return np.repeat(prompts, 2, 0), np.repeat(mask.astype(np.int32), 2, 0)


@pytest.fixture(scope="module")
def weights():
    return jax.device_get(MODEL.init(jax.random.key(0)))


def on(layout, params):
    return jax.device_put(params, state.shardings(params, MODEL.axes(), layout))


def sampled(place, params, batch, sampling=SAMPLING):
    """Returns a rollout as arrays of the host."""
    with place.home.use():
        rows = place.home.put(batch)
        weights = place.place(on(place.home, params))
        return jax.device_get(place.sample(weights, *rows, jax.random.key(7), sampling))


@pytest.fixture(scope="module")
def alone(weights, batch):
    return sampled(placement.at_home(ONE, MODEL), weights, batch)


@pytest.fixture(scope="module")
def decode():
    layout = layouts.decode_layout(FSDP_TENSOR, CONFIG, 2)
    return placement._placement(FSDP_TENSOR, layout, MODEL, "none")


# ------------------------------------------------------------------ the same samples


def assert_same_samples(one, other, params):
    """Asserts equal tokens, except after a draw whose uniform number lies at an edge."""
    keys = rollout.row_keys(jax.random.key(7), ROWS)
    uniform = np.asarray(uniforms(keys, SAMPLING.max_new_tokens))
    for row in range(ROWS):
        differs = np.nonzero(one.responses[row] != other.responses[row])[0]
        end = differs[0] if len(differs) else one.mask.shape[1]
        np.testing.assert_allclose(
            other.logprobs[row, :end], one.logprobs[row, :end], atol=NEAR
        )
        if len(differs):
            edges = cdf(params, one, row, end)
            assert np.abs(edges - uniform[end, row]).min() < NEAR


def cdf(params, result, row, step):
    """The CDF [v] that token `step` of a row was drawn from."""
    tokens = jnp.asarray(result.tokens[row : row + 1, : PROMPT + step])
    mask = jnp.asarray(result.attention_mask[row : row + 1, : PROMPT + step])
    hidden = MODEL.hidden(params, tokens, segment_ids=mask)
    return np.cumsum(jax.nn.softmax(MODEL.logits(params, hidden[:, -1]))[0])


@pytest.mark.parametrize("way", [{}, {"decode_batch": 8}, {"cache_parts": 4}], ids=str)
def test_it_samples_what_one_device_samples(way, alone, decode, weights, batch):
    """Prompts share their prefill in pairs; lanes are refilled; a cache grows."""
    sampling = dataclasses.replace(SAMPLING, **way)
    assert_same_samples(alone, sampled(decode, weights, batch, sampling), weights)


def test_int8_samples_what_int8_on_one_device_samples(weights, batch, decode):
    one = placement._placement(ONE, None, MODEL, "all")
    four = placement._placement(FSDP_TENSOR, decode.layout, MODEL, "all")
    expected = quantized.weights(jax.tree.map(jnp.asarray, weights), MODEL.axes())
    with FSDP_TENSOR.use():
        found = four.place(on(FSDP_TENSOR, weights))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
    assert one.model.int8_cache and four.model.int8_cache
    a, b = sampled(one, weights, batch), sampled(four, weights, batch)
    assert (a.responses == b.responses).mean() > 0.95
    same = a.responses == b.responses
    first = np.cumprod(same, 1) > 0
    np.testing.assert_allclose(a.logprobs[first], b.logprobs[first], atol=1e-3)


# ------------------------------------------------------------------ where things lie


def test_weights_are_split_over_all_devices_and_no_device_has_more_in_between(
    weights, decode
):
    """Heads and MLP over four devices, keys over two, and the embedding over two; never more."""
    rules = decode.layout.rules
    assert rules["heads"] == rules["mlp"] == layouts.MODEL_AXES
    assert rules["kv_heads"] == rules["vocab"] == ("tensor", "sequence")
    assert rules["embed"] == () and rules["batch"] == ("replica", "data", "fsdp")
    devices = list(FSDP_TENSOR.mesh.devices.flat)
    assert list(decode.layout.mesh.devices.flat) == devices
    params = on(FSDP_TENSOR, weights)
    with FSDP_TENSOR.use():
        found = decode.place(params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), weights)
    mlp = found["backbone"]["layers"]["mlp"]["up"]["kernel"]
    assert mlp.sharding.shard_shape(mlp.shape) == (2, 16, 10)
    compiled = decode.place.function.lower(params).compile()
    largest = max(math.prod(s.shape) for s in shards(found))
    for x in collectives(compiled.as_text()):
        assert x.kind in ("all-to-all", "all-gather", "collective-permute"), x
        assert max(math.prod(shape) for shape in x.shapes) <= largest, x


def shards(tree):
    return [
        jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        for x in jax.tree.leaves(tree)
    ]


def sent(place, params, batch):
    """The kinds of the collectives of a rollout that have the shape of a matrix or its shard."""
    with place.home.use():
        weights = place.place(on(place.home, params))
        rows = jax.device_put(place.home.put(batch), place.layout.sharding("batch"))
    with place.layout.use():
        lowered = rollout.sample.function.lower(
            place.model, weights, *rows, jax.random.key(7), sampling=SAMPLING
        )
    found = collectives(lowered.compile().as_text())
    matrices = matrix_shapes(params)
    return {x.kind for x in found if matrices & {core(shape) for shape in x.shapes}}


def core(shape):
    return tuple(sorted(n for n in shape if n > 1))


def matrix_shapes(params):
    """The shapes of matrices, whole or sharded; heads and head_dim may be one axis."""
    shapes = set()
    for x in jax.tree.leaves(params):
        own = x.shape[1:] if x.shape[0] == CONFIG.n_layers else x.shape
        if len(own) < 2:
            continue
        flat = (math.prod(own[:-1]), own[-1]), (own[0], math.prod(own[1:]))
        for shape in {own, *flat}:
            for cut in itertools.product((1, 2, 4), repeat=len(shape)):
                whole = all(n % c == 0 for n, c in zip(shape, cut, strict=True))
                sizes = [n // c for n, c in zip(shape, cut, strict=True)]
                shapes |= {core(sizes)} if whole else set()
    return shapes


def test_a_rollout_sends_no_weights(weights, batch, decode, optimized):
    """Nothing with the shape of a matrix; in the layout of training they are gathered."""
    assert sent(decode, weights, batch) == set()
    training = placement.at_home(FSDP_TENSOR, MODEL)
    assert sent(training, weights, batch) == {"all-gather"}


def test_one_device_and_data_parallelism_copy_nothing():
    workload = Workload(rows=8, batch=8, length=14, decoded=8, sampled=6)
    for home in (ONE, make_layout(MeshConfig(data=4), jax.devices()[:4])):
        n, _ = layouts.choose(CONFIG, workload, layouts.sizes_of(home))
        assert placement._split(home, MODEL, n, "") is None
    place = placement.at_home(ONE, MODEL)
    params = {"x": object()}
    assert place.place(params) is params and place.model is MODEL


# ------------------------------------------------------------------ what it costs


WIDE = TransformerConfig(
    vocab_size=1000,
    d_model=1024,
    n_layers=10,
    n_heads=16,
    d_ff=4096,
    max_length=256,
    dtype="bfloat16",
)
AXES_64 = dict.fromkeys(AXES, 1) | {"fsdp": 64}


def test_the_traffic_of_both_layouts_by_hand():
    """64 devices, 640 rows of 100 + 100 tokens."""
    workload = Workload(rows=640, batch=640, length=200, decoded=640, sampled=100)
    weights = 2 * parameters(WIDE)
    cache = 10 * 2 * 1024 * 2 * 200 * 10.0  # layers, k and v, bytes, entries, rows
    training = layouts.traffic(WIDE, workload, AXES_64, None)
    assert training.hbm == pytest.approx(100 * (weights + cache / 2))
    assert training.gathered == pytest.approx(101 * weights * 63 / 64)
    assert training.reduced == training.resharded == 0
    # Eight devices share the weights; each group of eight has 80 rows.
    split = layouts.traffic(WIDE, workload, AXES_64, 8)
    assert split.hbm == pytest.approx(100 * (weights / 8 + cache / 2))
    assert split.resharded == pytest.approx(weights / 8 * 7 / 8)
    activations = 80 * 200 * 1024 * 2
    assert split.reduced == pytest.approx(2 * 10 * activations * 2 * 7 / 8)
    assert split.gathered == 0 and split.ici < training.ici / 10


def test_the_cheapest_layout_that_fits_is_chosen():
    workload = Workload(rows=640, batch=640, length=200, decoded=640, sampled=100)
    best, why = layouts.choose(WIDE, workload, AXES_64)
    costs = {
        n: layouts.traffic(WIDE, workload, AXES_64, n).cost for n in (1, 2, 4, 8, 16)
    }
    assert list(layouts.divisors(WIDE, AXES_64)) == list(costs)  # 16 heads
    assert costs[best] == min(costs.values()) and f"over {best} devices" in why
    needed = {n: layouts.rollout_bytes(WIDE, workload, AXES_64, n) for n in costs}
    for room, expected in (
        (needed[1], best),
        (needed[16], 16),
        (needed[16] * 0.99, None),
    ):
        n, _ = layouts.choose(WIDE, workload, AXES_64, 1e6, (room + 1.1e6) / 0.9)
        assert n == expected
    # Six tokens of a huge batch: the activations of all layers are more than the weights.
    huge = workload._replace(decoded=64 * 10**4, length=206, sampled=6)
    assert layouts.choose(WIDE, huge, AXES_64, 0.0, None)[0] in (1, None)


def test_a_size_that_divides_nothing_is_an_error():
    assert layouts.given(WIDE, AXES_64, 8, "ppo") == 8
    assert layouts.given(WIDE, AXES_64 | {"tensor": 2}, 8, "ppo") == 4
    with pytest.raises(
        ConfigError, match=r"ppo.rollout_tensor=3: .* possible here: 1, 2, 4, 8, 16"
    ):
        layouts.given(WIDE, AXES_64, 3, "ppo")


def test_auto_takes_it_where_it_fits():
    """The mesh of strategy auto knows what the stage keeps on its devices."""
    need = Need(
        rows=64,
        widths=(1024,),
        splits=(16, 4096),
        device_bytes=lambda axes: 1.2e9 / axes["fsdp"],
        held_bytes=lambda axes: 1e9 / axes["fsdp"],
    )
    wide = Model(dataclasses.replace(WIDE, vocab_size=1024))
    for memory, expected in ((1.2e9, True), (0.4e9, False)):
        auto = MeshConfig(strategy="auto")
        home = make_layout(auto, jax.devices()[:4], need, memory)
        place = placement.job_placement(home, wide, 64, 100, SAMPLING)
        assert home.mesh.shape["fsdp"] == 4
        assert (layouts.DECODE in place.layout.mesh.shape) == expected
    given = make_layout(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    assert placement.job_placement(given, wide, 64, 100, SAMPLING).layout is given
