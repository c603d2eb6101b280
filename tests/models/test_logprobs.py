"""Chunked cross-entropy and logprobs against the plain formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import logprobs as chunked
from rlhfjax.models.linear import linear
from tests.collectives import collectives

TEMPERATURE = 0.7


CASES = pytest.mark.parametrize(
    ("tied", "chunk"),
    [(True, 1), (False, 3 * 11 * 2), (True, 10**6)],
    ids=["tied, chunks of 1", "untied, chunks of 2", "tied, one chunk"],
)


def case(tied):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 7, 5))
    output = jax.random.normal(keys[1], (11, 5) if tied else (5, 11))
    targets = jax.random.randint(keys[2], (3, 7), 0, 11)
    mask = (jax.random.uniform(keys[3], (3, 7)) > 0.3).astype(jnp.float32)
    return hidden, output, targets, mask


def plain_logprobs(hidden, output, targets, tied, temperature=1.0):
    logits = hidden @ (output.T if tied else output) / temperature
    logp = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], -(
        jnp.exp(logp) * logp
    ).sum(-1)


def close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b
    )


@CASES
def test_cross_entropy_is_plain(tied, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    hidden, output, targets, mask = case(tied)

    def got(hidden, output, mask):
        nll, weight = chunked.cross_entropy(hidden, output, targets, mask, tied=tied)
        return 1.7 * nll, weight

    def expected(hidden, output, mask):
        return -1.7 * (
            plain_logprobs(hidden, output, targets, tied)[0] * mask
        ).sum(), mask.sum()

    @jax.jit
    def both(*args):
        return [
            jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*args)
            for f in (got, expected)
        ]

    close(*both(hidden, output, mask))


@CASES
def test_logprobs_are_plain(tied, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    hidden, output, targets, mask = case(tied)

    def weighted(fn):
        def loss(hidden, output):
            logprob, entropy = fn(
                hidden, output, targets, tied=tied, temperature=TEMPERATURE
            )
            return (logprob * mask).sum() + 0.3 * (entropy**2).sum(), (logprob, entropy)

        return loss

    @jax.jit
    def both(*args):
        functions = chunked.logprobs, plain_logprobs
        return [
            jax.value_and_grad(weighted(f), (0, 1), has_aux=True)(*args)
            for f in functions
        ]

    close(*both(hidden, output))


@CASES
def test_ids_that_are_left_out_are_as_if_they_had_no_rows(tied, chunk, monkeypatch):
    """In value and gradient, and their own rows have none; also where their logits are largest."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    hidden, output, targets, mask = case(tied)
    targets = jnp.minimum(targets, 7)
    rows = output if tied else output.T
    rows = rows.at[8:].mul(40.0)

    def whole(hidden, rows):
        output = rows if tied else rows.T
        return chunked.logprobs(hidden, output, targets, 0.7, tied=tied, ids=8)

    def few(hidden, rows):
        output = rows[:8] if tied else rows[:8].T
        return chunked.logprobs(hidden, output, targets, 0.7, tied=tied)

    def loss(fn):
        def weighted(hidden, rows):
            logprob, entropy = fn(hidden, rows)
            return (logprob * mask).sum() + 0.3 * (entropy**2).sum(), (logprob, entropy)

        return jax.value_and_grad(weighted, (0, 1), has_aux=True)

    got, expected = jax.jit(lambda *x: [loss(f)(*x) for f in (whole, few)])(
        hidden, rows
    )
    close(got, expected)
    assert not got[1][1][8:].any() and got[1][1][:8].all()


def two_models(tied, v=11):
    keys = jax.random.split(jax.random.key(3), 4)
    hiddens = tuple(2 * jax.random.normal(key, (3, 7, 5)) for key in keys[:2])
    shape = (v, 5) if tied else (5, v)
    return hiddens, tuple(jax.random.normal(key, shape) for key in keys[2:])


def kl_in_float64(hiddens, outputs, temperature, ids, cap):
    """sum_v p (log p - log q) position by position, from probabilities in float64."""
    found = np.zeros(hiddens[0].shape[:2])
    for place in np.ndindex(found.shape):
        p, q = (
            np.asarray(h, np.float64)[place] @ np.asarray(o, np.float64)
            for h, o in zip(hiddens, outputs, strict=True)
        )
        if cap is not None:
            p, q = cap * np.tanh(p / cap), cap * np.tanh(q / cap)
        p, q = (np.exp(x[:ids] / temperature) for x in (p, q))
        p, q = p / p.sum(), q / q.sum()
        found[place] = sum(p * np.log(p / q))
    return found


@pytest.mark.parametrize("cap", [None, 1.5])
@CASES
def test_kl_over_the_vocabulary_is_plain(tied, chunk, cap, monkeypatch):
    """At a temperature, and over the ids that are sampled; those left out have large logits."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    hiddens, outputs = two_models(tied)
    rows = [o if tied else o.T for o in outputs]
    rows = [o.at[8:].mul(40.0) for o in rows]
    outputs = tuple(o if tied else o.T for o in rows)
    how = chunked.Output(tied, cap)

    def kl(hiddens, outputs):
        return chunked.vocabulary_kl(hiddens, outputs, TEMPERATURE, how=how, ids=8)

    got = jax.jit(kl)(hiddens, outputs)
    expected = kl_in_float64(hiddens, [o.T for o in rows], TEMPERATURE, 8, cap)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    same = jax.jit(kl)(hiddens[:1] * 2, outputs[:1] * 2)
    np.testing.assert_array_equal(same, 0)


def test_kl_over_the_vocabulary_by_hand():
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): 1/2 ln 2 - 1/4 ln 2.
    logits = [jnp.log(jnp.array([[x]])) for x in ([2.0, 1, 1], [1.0, 1, 2])]
    found = chunked.vocabulary_kl(
        tuple(logits), (jnp.eye(3),) * 2, how=chunked.Output(tied=True)
    )
    np.testing.assert_allclose(found, [[np.log(2) / 4]], rtol=1e-6)


def test_pitfall_34_the_kl_of_models_that_are_close_is_not_rounding():
    """Logits around 100 that differ by 1e-3: the KL is about 5e-7, never below 0."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 8, 64)) + 100
    both = [logits, logits + 1e-3 * rng.normal(size=logits.shape)]
    hiddens = tuple(jnp.array(x, jnp.float32) for x in both)
    eyes = (jnp.eye(64),) * 2
    found = chunked.vocabulary_kl(hiddens, eyes, how=chunked.Output(tied=True))
    given = [np.asarray(x, np.float64) for x in hiddens]
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in given)
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), atol=1e-7)


def test_whole_logits_of_two_models_never_live(monkeypatch, optimized):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 4 * 1024)
    hiddens, outputs = (jnp.ones((4, 32, 8)),) * 2, (jnp.ones((1024, 8)),) * 2

    def kl(hiddens, outputs):
        how = chunked.Output(tied=True)
        return chunked.vocabulary_kl(hiddens, outputs, how=how).sum()

    compiled = jax.jit(kl).lower(hiddens, outputs).compile()
    whole = 4 * 32 * 1024 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2


@pytest.mark.parametrize(
    ("axes", "tied"),
    [
        ({"data": 1, "fsdp": 4}, True),
        ({"data": 1, "fsdp": 2, "tensor": 2}, False),
        ({"data": 1, "fsdp": 2, "sequence": 2}, True),
    ],
)
def test_the_kl_of_several_devices_is_that_of_one(axes, tied, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 3 * 11)
    hiddens, outputs = two_models(tied, v=12)
    hiddens = tuple(jnp.concatenate([h, h[:1]]) for h in hiddens)
    how = chunked.Output(tied)

    def kl(hiddens, outputs):
        return chunked.vocabulary_kl(hiddens, outputs, TEMPERATURE, how=how, ids=8)

    expected = jax.jit(kl)(hiddens, outputs)
    layout = make_layout(MeshConfig(**axes))
    with layout.use():
        placed = jax.device_put(hiddens, layout.sharding("batch"))
        matrices = jax.device_put(outputs, layout.replicated)
        np.testing.assert_allclose(
            jax.jit(kl)(placed, matrices), expected, rtol=1e-4, atol=1e-6
        )


def test_cross_entropy_by_hand():
    """Logits (0, ln 3): p = (1/4, 3/4); target 1 costs ln(4/3), target 0 costs ln 4, and the masked
    row nothing.
    """
    hidden, output = jnp.ones((1, 3, 1)), jnp.array([[0.0], [np.log(3.0)]])
    total, weight = chunked.cross_entropy(
        hidden, output, jnp.array([[1, 0, 0]]), jnp.array([[1.0, 1, 0]]), tied=True
    )
    np.testing.assert_allclose(total, np.log(4 / 3) + np.log(4), rtol=1e-6)
    assert float(weight) == 2.0


def entropy_in_float64(logits):
    """-sum p log p and its gradient -p_j (log p_j + H), by loops over logits less their maximum."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max()
    total = sum(np.exp(x) for x in logits)
    logp = [x - np.log(total) for x in logits]
    entropy = -sum(np.exp(x) * x for x in logp)
    return entropy, [-np.exp(x) * (x + entropy) for x in logp]


def entropy_of(logits):
    """`logprobs`' entropy [t] of rows of logits [t, v]: its hidden states are unit vectors."""
    t = logits.shape[0]
    targets = jnp.zeros((1, t), jnp.int32)
    return chunked.logprobs(jnp.eye(t)[None], logits, targets, tied=False)[1][0]


HALF_ULP = 2.0**-15  # of 800 in float32, the error of its logsumexp


@pytest.mark.parametrize("offset", [-800.0, -300.0, 0.0, 800.0])
@pytest.mark.parametrize("size", [1, 10**6], ids=["chunks of 1", "one chunk"])
def test_pitfall_34_the_entropy_of_large_logits_does_not_cancel(
    offset, size, monkeypatch
):
    """Two of three tokens alike: ln 2. A sharp row: 2 e^-30 (30 + 1). Four tokens alike: ln 4."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", size)
    rows = [
        [800.0, -800.0, 800.0, -800.0],
        [0.0, -30.0, -30.0, -800.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    rows = jnp.array(rows)
    found = entropy_of(rows + jnp.array([[0.0], [offset], [offset]]))
    np.testing.assert_allclose(found[0], np.log(2), atol=HALF_ULP, rtol=0)
    # The likeliest token's own term, 2 e^-30, is lost: its log-probability rounds to 0.
    np.testing.assert_allclose(
        found[1], 2 * np.exp(-30) * 31, atol=2.01 * np.exp(-30), rtol=0
    )
    np.testing.assert_allclose(
        found[2], np.log(4), atol=HALF_ULP * 1.1 if offset else 1e-7, rtol=0
    )


def test_pitfall_34_the_gradient_of_the_entropy_of_large_logits():
    rng = np.random.default_rng(3)
    scales, offsets = (
        np.array([[1.0], [5.0], [1.0]]),
        np.array([[-300.0], [0.0], [300.0]]),
    )
    rows = jnp.array(rng.normal(size=(3, 5)) * scales + offsets, jnp.float32)
    gradient = jax.grad(lambda x: entropy_of(x).sum())(rows)
    for row, ours, found in zip(rows, entropy_of(rows), gradient, strict=True):
        entropy, expected = entropy_in_float64(row)
        np.testing.assert_allclose(ours, entropy, atol=HALF_ULP, rtol=0)
        np.testing.assert_allclose(found, expected, atol=2 * HALF_ULP, rtol=0)


def test_pitfall_34_the_entropy_of_a_split_vocabulary():
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    layout = make_layout(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    rows = jnp.array([[-300.0, -800.0, -300.0, -800.0]])
    rows = jax.device_put(rows, layout.sharding("embed", "vocab"))
    with layout.use():
        found = jax.jit(entropy_of)(rows)
    np.testing.assert_allclose(found, np.log(2), atol=HALF_ULP, rtol=0)


def test_pitfall_24_a_token_outside_the_mask_has_no_gradient():
    """Of the token that counts: p - 1 at its target; of the other, which is not learnt, 0."""
    output = jnp.array([[0.0], [np.log(3.0)]])
    targets, mask = jnp.array([[1, 0]]), jnp.array([[1.0, 0.0]])

    def loss(hidden):
        return chunked.cross_entropy(hidden, output, targets, mask, tied=True)[0]

    gradient = jax.grad(loss)(jnp.ones((1, 2, 1)))
    np.testing.assert_allclose(
        gradient.ravel(), [(3 / 4 - 1) * np.log(3.0), 0.0], rtol=1e-6
    )


def test_whole_logits_never_live(monkeypatch, optimized):
    """No array of b * t * v elements in the compiled loss and gradient, where the plain form has
    several.
    """
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 4 * 1024)
    hidden, output = jnp.ones((4, 32, 8)), jnp.ones((1024, 8))
    targets, mask = jnp.zeros((4, 32), jnp.int32), jnp.ones((4, 32))

    def temp(fn):
        return (
            jax.jit(jax.grad(fn, (0, 1)))
            .lower(hidden, output)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    whole = 4 * 32 * 1024 * 4
    assert (
        temp(lambda h, o: chunked.cross_entropy(h, o, targets, mask, tied=True)[0])
        < whole / 2
    )
    assert temp(lambda h, o: plain_logprobs(h, o, targets, True)[0].sum()) > whole


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_linear_gradient_is_autodiffs(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (
        jax.random.normal(keys[0], (2, 4, shape[0])),
        jax.random.normal(keys[1], shape),
    )
    weight = jax.random.normal(keys[2], (2, 4, shape[1]))

    @jax.jit
    def both(x, kernel):
        functions = linear, lambda x, kernel: x @ kernel
        losses = [
            lambda x, kernel, f=f: (f(x, kernel) ** 2 * weight).sum() for f in functions
        ]
        return [jax.grad(loss, (0, 1))(x, kernel) for loss in losses]

    close(*both(x, kernel))


@pytest.mark.parametrize(
    ("axes", "tied"),
    [
        ({"data": 1, "fsdp": 4}, True),
        ({"data": 1, "fsdp": 2, "tensor": 2}, True),
        ({"data": 1, "fsdp": 2, "tensor": 2}, False),
        ({"data": 1, "fsdp": 2, "sequence": 2}, False),
    ],
)
def test_devices_add_their_gradients_once_not_in_every_chunk(
    axes, tied, monkeypatch, optimized
):
    """Loss and gradients are one device's; of the loop's collectives none is as large as the output
    matrix's gradient.

    Before, its [d, v] were all-reduced in each of the chunks: 13 times here. 13 positions are no
    multiple of two devices'.
    """
    b, t, d, v = 8, 13, 16, 64
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, targets = (
        jax.random.normal(keys[0], (b, t, d)),
        jax.random.randint(keys[1], (b, t), 0, v),
    )
    output = jax.random.normal(keys[2], (v, d) if tied else (d, v))
    mask = (jax.random.uniform(keys[3], (b, t)) > 0.3).astype(jnp.float32)

    def loss(hidden, output, targets, mask):
        nll, weight = chunked.cross_entropy(hidden, output, targets, mask, tied=tied)
        logprob, entropy = chunked.logprobs(
            hidden, output, targets, TEMPERATURE, tied=tied
        )
        return nll / weight + ((logprob + 0.1 * entropy**2) * mask).mean()

    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, output, targets, mask)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)  # every position a chunk
    layout = make_layout(MeshConfig(**axes))
    names = ("vocab", "embed") if tied else ("embed", "vocab")
    args = [
        jax.device_put(x, layout.sharding("batch")) for x in (hidden, targets, mask)
    ]
    args.insert(1, jax.device_put(output, layout.sharding(*names)))
    out = layout.replicated, (layout.sharding("batch"), layout.sharding(*names))
    with layout.use():
        program = (
            jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=out)
            .lower(*args)
            .compile()
        )
    close(program(*args), expected)
    found = collectives(program.as_text())
    # a softmax over `tensor` needs its devices in every chunk
    assert max(x.times for x in found) == (13 if "tensor" in axes else 1)
    assert all(x.elements <= 2 * b * d for x in found if x.times > 1)
    matrix = d * v // axes.get("tensor", 1)
    sums = [
        x
        for x in found
        if x.kind == "all-reduce"
        for shape in x.shapes
        if np.prod(shape) == matrix
    ]
    assert len(sums) == 2  # one of each function's
