"""Sampling against teacher forcing and against a sampler without a cache; ends, independence,
repeatability.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model
from rlhfjax.sampling import Samples, Sampling, generate, stream
from rlhfjax.sampling.choose import choose
from tests.models.families import (
    CONFIGS,
    DISTINCT,
    FAMILIES,
    MOSTLY_SLOW,
    random_params,
    tokens,
)

EOS, PAD, NEW, PROMPT = 1, 0, 10, 7
LENGTHS = (7, 1, 4, 6)
UNIT = [
    ("llama-gqa", 1.3),
    ("gpt2", 0.0),
]  # families and temperatures that are not left to other proofs
# Greedy tokens are of the logits that the sampled ones are drawn from.
REST = {0.0: pytest.mark.nightly, 1.3: pytest.mark.slow}


@pytest.fixture(scope="module", params=MOSTLY_SLOW)
def made(request):
    model = Model(CONFIGS[request.param])
    return model, random_params(model)


@pytest.fixture(scope="module")
def gpt2():
    model = Model(FAMILIES["gpt2"])
    return model, random_params(model)


def left_padded(lengths=LENGTHS, width=PROMPT):
    segments = (np.arange(width)[None] >= width - np.array(lengths)[:, None]).astype(
        np.int32
    )
    return jnp.asarray(
        np.where(segments > 0, tokens(len(lengths), width), PAD)
    ), jnp.asarray(segments)


@functools.partial(jax.jit, static_argnums=0)
def keys(n, seed=3):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        jnp.arange(n)
    )


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=(
        "max_new_tokens",
        "eos_id",
        "temperature",
        "top_k",
        "top_p",
        "samples_per_prompt",
        "decode_batch",
    ),
)
def run(model, params, prompts, segments, keys, **settings):
    return generate(model, params, prompts, segments, keys, sampling(**settings))


def sampling(**settings):
    own = {"max_new_tokens": NEW, "eos_id": EOS, "pad_id": PAD, "temperature": 0.8}
    return Sampling(**own | settings)


@functools.partial(jax.jit, static_argnums=1)
def draws(keys, steps):
    """[n, steps]: the uniform numbers that each row's tokens are drawn with, from its key and the
    step alone.
    """
    return jax.vmap(
        lambda key: jnp.stack(
            [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(steps)]
        )
    )(keys)


@functools.partial(jax.jit, static_argnums=0)
def forced_logits(model, params, prompts, segments, samples, temperature):
    """[n, r, v]: what each response's tokens were drawn from, by one pass over the whole rows."""
    rows = jnp.concatenate([prompts, samples.tokens], axis=1)
    seen = jnp.concatenate([segments, samples.mask.astype(jnp.int32)], axis=1)
    width = prompts.shape[1]
    return (
        model.logits(
            params, model.hidden(params, rows, segment_ids=seen)[:, width - 1 : -1]
        )
        / temperature
    )


def teacher_forced(model, params, prompts, segments, samples, temperature):
    logits = np.asarray(
        forced_logits(model, params, prompts, segments, samples, temperature),
        np.float64,
    )
    picked = np.take_along_axis(logits, np.asarray(samples.tokens)[..., None], -1)[
        ..., 0
    ]
    return (picked - np.log(np.exp(logits).sum(-1))) * np.asarray(samples.mask)


def decided(model, params, prompts, segments, drawn, samples, temperature=0.8):
    """[n] which responses are for the sampler to decide, and not for rounding: every draw is 1e-5
    from the next token.

    Where u lies on the edge between two tokens of the CDF, another order of summation may draw the
    other one.
    """
    logits = np.asarray(
        forced_logits(model, params, prompts, segments, samples, temperature),
        np.float64,
    )
    edges = np.cumsum(np.exp(logits), axis=-1)
    u = np.asarray(draws(drawn, samples.tokens.shape[1]))
    far = np.abs(edges / edges[..., -1:] - u[..., None]).min(-1) > 1e-5
    sure = (far | (np.asarray(samples.mask) == 0)).all(1)
    assert sure.mean() > 0.8
    return sure


def test_pitfall_05_logprobs_are_teacher_forced(made, optimized):
    """...

    At a temperature other than 1, for prompts of other lengths: sampler and trainer are one
    distribution.
    """
    model, params = made
    prompts, segments = left_padded()
    samples = run(model, params, prompts, segments, keys(4))
    expected = teacher_forced(model, params, prompts, segments, samples, 0.8)
    np.testing.assert_allclose(samples.logprobs, expected, atol=1e-5)
    assert float(samples.mask.sum()) > 20


def test_pitfall_03_logprobs_carry_the_temperature(gpt2):
    """The same tokens' logprobs at temperature 1 are others: a trainer that forgets it is off by
    this much.
    """
    model, params = gpt2
    prompts, segments = left_padded()
    samples = run(model, params, prompts, segments, keys(4))
    right, wrong = (
        teacher_forced(model, params, prompts, segments, samples, t) for t in (0.8, 1.0)
    )
    np.testing.assert_allclose(samples.logprobs, right, atol=1e-5)
    assert np.abs(samples.logprobs - wrong).max() > 0.1


@functools.partial(jax.jit, static_argnums=0, static_argnames="temperature")
def next_token(model, params, rows, segments, at, u, temperature):
    """Token and logprob after slot `at` of every row, by a pass over the whole rows."""
    hidden = model.hidden(params, rows, segment_ids=segments)
    logits = model.logits(
        params, jnp.take_along_axis(hidden, at[:, None, None], 1)[:, 0]
    )
    return choose(logits, u, sampling(temperature=temperature))


def uncached(model, params, prompts, segments, keys, temperature):
    """The sampler again without a cache: the whole row through the model for each token."""
    width, done, u = (
        prompts.shape[1],
        np.zeros(len(prompts), bool),
        np.asarray(draws(keys, NEW)),
    )
    rows, seen = (np.pad(x, ((0, 0), (0, NEW))) for x in (prompts, segments))
    mask, logprobs = np.zeros((len(rows), NEW)), np.zeros((len(rows), NEW))
    for step in range(NEW):
        at = np.full(len(rows), width + step - 1)
        token, logprob = next_token(
            model, params, rows, seen, at, u[:, step], temperature=temperature
        )
        live = ~done
        rows[:, width + step] = np.where(live, token, PAD)
        seen[:, width + step] = mask[:, step] = live
        logprobs[:, step] = np.where(live, logprob, 0)
        done |= np.asarray(token) == EOS
    return Samples(rows[:, width:], mask, logprobs)


@pytest.mark.parametrize(
    ("family", "temperature"),
    [
        pytest.param(
            family,
            temperature,
            marks=[] if (family, temperature) in UNIT else REST[temperature],
        )
        for family in DISTINCT
        for temperature in (0.0, 1.3)
    ],
)
def test_pitfall_05_cached_is_uncached(family, temperature):
    model = Model(CONFIGS[family])
    params, (prompts, segments) = random_params(model), left_padded()
    got = run(model, params, prompts, segments, keys(4), temperature=temperature)
    expected = uncached(model, params, prompts, segments, keys(4), temperature)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_a_row_depends_on_its_own_prompt_and_key_alone(gpt2):
    """Alone, in another order, among other neighbors, with more padding: the same tokens."""
    model, params = gpt2
    prompts, segments = left_padded()
    together = run(model, params, prompts, segments, keys(4))
    for i in range(4):
        alone = run(
            model, params, prompts[i : i + 1], segments[i : i + 1], keys(4)[i : i + 1]
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-5)
    order = jnp.array([2, 0, 3, 1])
    moved = run(model, params, prompts[order], segments[order], keys(4)[order])
    np.testing.assert_array_equal(moved.tokens, together.tokens[order])
    wider = run(
        model,
        params,
        *(jnp.pad(x, ((0, 0), (3, 0))) for x in (prompts, segments)),
        keys(4),
    )
    np.testing.assert_array_equal(wider.tokens, together.tokens)


def test_pitfall_07_keys_make_the_draw(gpt2):
    """Equal keys repeat, other keys differ, and rows with one prompt but own keys differ among
    themselves.
    """
    model, params = gpt2
    prompts, segments = (jnp.repeat(x[:1], 4, axis=0) for x in left_padded())
    one, again, other = (
        run(model, params, prompts, segments, keys(4, seed)).tokens
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    assert len({tuple(row) for row in np.asarray(one).tolist()}) == 4
    greedy = [
        run(model, params, prompts, segments, keys(4, s), temperature=0.0).tokens
        for s in (3, 4)
    ]
    np.testing.assert_array_equal(*greedy)


def rigged(gpt2, script):
    """A model whose greedy continuation is `script[position]`: position embeddings alone decide the
    token.
    """
    model, params = gpt2
    params = jax.tree.map(jnp.zeros_like, params)
    embed = params["backbone"]["embed"]
    # Small, so that the choice is clear but not certain and every logprob is below 0.
    table = 0.2 * jax.random.normal(jax.random.key(0), embed["tokens"].shape)
    embed["tokens"] = (
        jnp.zeros_like(table).at[jnp.array(script)].set(table[jnp.array(script)])
    )
    embed["positions"] = (
        embed["positions"]
        .at[: len(script)]
        .set(100 * embed["tokens"][jnp.array(script)])
    )
    params["backbone"]["norm"]["scale"] = jnp.ones(model.config.d_model)
    return model, params


def test_pitfall_08_the_end(gpt2):
    """Rows of length 4, 3 and 1 reach the position whose next token is eos (position 5) after 3, 4
    and 6 tokens.

    The eos is the response's last token, with mask 1; after it pad, mask 0 and logprob 0. A row of
    length 7 is past that position: it ends at the limit, without an eos.
    """
    model, params = rigged(gpt2, [10, 11, 12, 13, 14, EOS, *range(16, 16 + NEW)])
    prompts, segments = left_padded((4, 3, 1, 7))
    samples = run(model, params, prompts, segments, keys(4), temperature=0.0)
    ended = [
        [13, 14, EOS],
        [12, 13, 14, EOS],
        [10, 11, 12, 13, 14, EOS],
        list(range(16, 16 + NEW)),
    ]
    assert samples.tokens.tolist() == [row + [PAD] * (NEW - len(row)) for row in ended]
    assert samples.mask.tolist() == [
        [1] * len(row) + [0] * (NEW - len(row)) for row in ended
    ]
    np.testing.assert_array_equal(
        np.asarray(samples.logprobs) == 0, np.asarray(samples.mask) == 0
    )


def test_the_loop_stops_when_all_rows_are_done(gpt2, monkeypatch):
    """Decode steps counted as they run: two rows end after 3 and 4 tokens, so 3 decodes, not
    max_new_tokens - 1 = 9.
    """
    model, params = rigged(gpt2, [10, 11, 12, 13, 14, EOS, 16, 17])
    prompts, segments = left_padded((4, 3))
    calls, decode = [], Model.decode

    def counted(self, params, token, position, slot, cache):
        jax.debug.callback(lambda s: calls.append(int(s)), slot)
        return decode(self, params, token, position, slot, cache)

    monkeypatch.setattr(Model, "decode", counted)
    samples = jax.jit(lambda *x: generate(model, *x, sampling(temperature=0.0)))(
        params, prompts, segments, keys(2)
    )
    jax.block_until_ready(samples)
    jax.effects_barrier()
    assert calls == [PROMPT, PROMPT + 1, PROMPT + 2]
    assert samples.mask.sum(1).tolist() == [3, 4]


def test_pitfall_04_truncated_logprobs_are_those_sampled_from(gpt2):
    """top-k 3: every token is among the 3 likeliest, and its probability is over their sum."""
    model, params = gpt2
    prompts, segments = left_padded()
    samples = run(model, params, prompts, segments, keys(4), top_k=3, temperature=1.0)
    logits = np.asarray(
        forced_logits(model, params, prompts, segments, samples, 1.0), np.float64
    )
    for i, step in zip(*np.nonzero(np.asarray(samples.mask)), strict=True):
        best = np.sort(np.exp(logits[i, step]))[-3:]
        chosen = np.exp(logits[i, step, samples.tokens[i, step]])
        np.testing.assert_allclose(
            samples.logprobs[i, step], np.log(chosen / best.sum()), atol=1e-4
        )
        assert chosen >= best[0] * (1 - 1e-5)


def test_stream_is_generate(gpt2):
    model, params = gpt2
    prompts, segments = left_padded((5,))
    whole = run(model, params, prompts, segments, keys(1))
    got = list(stream(model, params, prompts, segments, keys(1)[0], sampling()))
    assert got == np.asarray(whole.tokens)[np.asarray(whole.mask) > 0].tolist()
    ended = rigged(gpt2, [10, 11, 12, 13, 14, EOS, 16])
    greedy = stream(*ended, prompts, segments, keys(1)[0], sampling(temperature=0.0))
    assert list(greedy) == [14, EOS]


def test_bf16_logprobs_are_near_teacher_forced(gpt2):
    """bf16 keeps 8 bits: on logits of about 3 the two computations differ by a few hundredths of a
    nat.
    """
    model = Model(dataclasses.replace(gpt2[0].config, dtype="bfloat16"))
    prompts, segments = left_padded()
    samples = run(model, gpt2[1], prompts, segments, keys(4))
    assert samples.logprobs.dtype == jnp.float32
    expected = teacher_forced(model, gpt2[1], prompts, segments, samples, 0.8)
    assert np.abs(samples.logprobs - expected).max() < 0.15


def test_four_devices_sample_what_one_does(gpt2):
    if jax.device_count() < 4:
        pytest.skip("one device")
    model, params = gpt2
    prompts, segments = left_padded()
    expected = run(model, params, prompts, segments, keys(4))
    layout = make_layout(MeshConfig(), jax.devices()[:4])

    def put(x):
        return jax.device_put(x, layout.sharding("batch"))

    with layout.use():
        got = jax.jit(lambda *x: generate(model, *x, sampling()))(
            jax.device_put(params, layout.replicated),
            put(prompts),
            put(segments),
            put(keys(4)),
        )
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"samples_per_prompt": 2},
            "samples_per_prompt=2: must be the .* keys per prompt; 4 prompts have 4 keys",
        ),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0: must be >= 1"),
        ({"decode_batch": -1}, "decode_batch=-1: must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be >= 1"),
        (
            {"max_new_tokens": 26},
            "prompt of 7 and a response of 26 tokens exceed model.max_length=32",
        ),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_impossible_requests_say_why(gpt2, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(*gpt2, *left_padded(), keys(4), **settings)


def test_pitfall_02_the_end_is_not_padding(gpt2):
    with pytest.raises(ConfigError, match="eos_id=pad_id=0: must differ"):
        run(*gpt2, *left_padded(), keys(4), eos_id=PAD)


def test_every_shape_is_compiled_once_and_logged(caplog):
    """Batches of one length of prompt are one program, whatever stands in them; another length says
    so.
    """
    caplog.set_level("INFO", logger="rlhfjax")
    model = Model(dataclasses.replace(FAMILIES["gpt2"], n_layers=1))
    params = random_params(model)
    jitted = jax.jit(lambda *x: generate(model, *x, sampling(max_new_tokens=1)))
    for lengths, width in (
        ((7, 1, 4, 6), 7),
        ((2, 2, 3, 1), 7),
        ((9, 1, 4, 6), 9),
        ((1, 1, 1, 1), 7),
    ):
        jitted(params, *left_padded(lengths, width), keys(4))
    said = [r.getMessage() for r in caplog.records if "sampler" in r.getMessage()]
    assert said == [
        f"compiling the sampler: 4 prompts of {p} tokens, 4 responses of 1"
        for p in (7, 9)
    ]
