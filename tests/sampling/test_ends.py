"""Several ends of a response, the repetition penalty, and ids that are not sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import Model
from rlhfjax.sampling import Samples, generate, stream
from tests.models.families import FAMILIES, random_params
from tests.sampling.test_generate import NEW, PAD, forced_logits, keys, left_padded
from tests.sampling.test_generate import sampling as settings_of

LENGTHS = (7, 1, 4, 6, 2)
LANES = {"static": 0, "continuous": 2}


@pytest.fixture(scope="module")
def llama():
    model = Model(FAMILIES["llama-gqa"])
    return model, random_params(model)


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def sampled(model, params, prompts, segments, keys, settings) -> Samples:
    return generate(model, params, prompts, segments, keys, settings)


def streamed(model, params, prompts, segments, drawn, settings):
    """The tokens of each row, one at a time; one token takes part in all three programs."""
    return [
        list(
            stream(
                model, params, prompts[i : i + 1], segments[i : i + 1], key, settings
            )
        )
        for i, key in enumerate(drawn)
    ]


def responses(samples):
    rows = zip(np.asarray(samples.tokens), np.asarray(samples.mask), strict=True)
    return [tokens[mask > 0].tolist() for tokens, mask in rows]


def cut_after(row, ends):
    places = [i for i, token in enumerate(row) if token in ends]
    return row[: places[0] + 1] if places else row


@pytest.fixture(scope="module")
def endless(llama):
    """Responses that nothing ends, and the two tokens that would end most of them."""
    drawn = keys(len(LENGTHS))
    samples = sampled(*llama, *left_padded(LENGTHS), drawn, settings_of(eos_id=-1))
    rows = responses(samples)
    often = np.bincount(np.concatenate(rows)[np.concatenate(rows) > 1])
    return rows, tuple(int(i) for i in np.argsort(-often)[:2])


@pytest.mark.parametrize("way", LANES)
def test_any_of_several_ids_ends_a_response(llama, endless, way):
    """Each response is the endless one up to its first end, of whichever kind; pad follows."""
    rows, (first, second) = endless
    expected = [cut_after(row, (first, second)) for row in rows]
    by_one = [[cut_after(row, (end,)) for row in rows] for end in (first, second)]
    assert expected not in by_one and {row[-1] for row in expected} >= {first, second}
    settings = settings_of(
        eos_id=first, extra_eos_ids=(second,), decode_batch=LANES[way]
    )
    samples = sampled(*llama, *left_padded(LENGTHS), keys(len(LENGTHS)), settings)
    assert responses(samples) == expected
    assert set(np.asarray(samples.tokens)[np.asarray(samples.mask) == 0]) == {PAD}


def test_a_stream_ends_at_any_of_them(llama, endless):
    rows, (first, second) = endless
    settings = settings_of(eos_id=first, extra_eos_ids=(second,))
    got = streamed(*llama, *left_padded(LENGTHS), keys(len(LENGTHS)), settings)
    assert got == [cut_after(row, (first, second)) for row in rows]


def test_pad_may_be_one_of_several_ends(llama):
    """As in Qwen2, whose pad ends a document: the pad that is sampled counts, the others do not."""
    model, params = llama
    params = jax.tree.map(jnp.zeros_like, params)  # every token is as likely
    drawn = keys(4)
    settings = settings_of(extra_eos_ids=(PAD,), temperature=0.0)
    samples = sampled(model, params, *left_padded(), drawn, settings)
    assert samples.tokens.tolist() == [[PAD] * NEW] * 4
    assert samples.mask.tolist() == [[1] + [0] * (NEW - 1)] * 4


PENALTY = {"eos_id": -1, "repetition_penalty": 1.7, "temperature": 0.0}


def penalized_logits(llama, samples, penalty):
    """[n, r, v]: what each token was drawn from, by a loop over the ids before it."""
    model, params = llama
    prompts, segments = left_padded(LENGTHS)
    logits = forced_logits(model, params, prompts, segments, samples, 1.0)
    logits = np.array(logits, np.float64)
    for i, row in enumerate(np.asarray(samples.tokens).tolist()):
        before = np.asarray(prompts)[i][np.asarray(segments)[i] > 0].tolist()
        for step, token in enumerate(row):
            for j in set(before):
                x = logits[i, step, j]
                logits[i, step, j] = x / penalty if x > 0 else x * penalty
            before.append(token)
    return logits


@pytest.mark.parametrize("way", LANES)
def test_the_repetition_penalty_counts_prompt_and_response(llama, way):
    settings = settings_of(**PENALTY, decode_batch=LANES[way])
    samples = sampled(*llama, *left_padded(LENGTHS), keys(len(LENGTHS)), settings)
    logits = penalized_logits(llama, samples, 1.7)
    np.testing.assert_array_equal(samples.tokens, logits.argmax(-1))
    picked = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(samples.logprobs, picked, atol=1e-5)
    plain = settings_of(**{**PENALTY, "repetition_penalty": 1.0})
    without = sampled(*llama, *left_padded(LENGTHS), keys(len(LENGTHS)), plain)
    assert (np.asarray(without.tokens) != np.asarray(samples.tokens)).any(1).sum() >= 3


def test_a_stream_and_a_shared_prompt_have_the_same_penalty(llama):
    prompts, segments = left_padded(LENGTHS)
    drawn = keys(2 * len(LENGTHS))
    settings = settings_of(**{**PENALTY, "temperature": 0.8}, samples_per_prompt=2)
    shared = responses(sampled(*llama, prompts, segments, drawn, settings))
    alone = settings_of(**{**PENALTY, "temperature": 0.8})
    twice = [jnp.repeat(x, 2, axis=0) for x in (prompts, segments)]
    assert shared == responses(sampled(*llama, *twice, drawn, alone))
    first = [x[:2] for x in twice]
    assert shared[:2] == streamed(*llama, *first, drawn[:2], alone)
    assert shared[0] != shared[1]


def test_without_a_penalty_there_is_no_mask_of_seen_ids(llama):
    """The program is the one that it was: no array of booleans per id."""
    model, params = llama
    rows, drawn = left_padded(LENGTHS), keys(len(LENGTHS))
    shape = f"tensor<{len(LENGTHS)}x{model.config.vocab_size}xi1>"
    for penalty, expected in ((1.0, False), (1.5, True)):
        settings = settings_of(temperature=0.0, repetition_penalty=penalty)
        text = sampled.lower(model, params, *rows, drawn, settings).as_text()
        carried = [line for line in text.splitlines() if "stablehlo.while" in line]
        assert any(shape in line for line in carried) == expected


IDS = 40  # of the model's 61


@pytest.mark.parametrize("way", LANES)
def test_ids_that_a_tokenizer_lacks_are_not_sampled_and_logprobs_know_it(llama, way):
    """Sampler and trainer: the same softmax over the ids of the vocabulary alone."""
    model, params = llama
    few = model.restricted(IDS)
    assert model.restricted(0) == model.restricted(model.config.vocab_size) == model
    prompts, segments = left_padded(LENGTHS)
    settings = settings_of(eos_id=-1, decode_batch=LANES[way])
    drawn = keys(len(LENGTHS))
    samples = sampled(few, params, prompts, segments, drawn, settings)
    assert np.asarray(samples.tokens).max() < IDS
    logits = np.asarray(forced_logits(few, params, prompts, segments, samples, 0.8))
    logits = np.float64(logits)
    assert logits.argmax(-1).max() >= IDS  # raw logits stay
    chosen = np.asarray(samples.tokens)[..., None]
    picked = np.take_along_axis(logits, chosen, -1)[..., 0]
    expected = picked - np.log(np.exp(logits[..., :IDS]).sum(-1))
    np.testing.assert_allclose(samples.logprobs, expected, atol=1e-5)
    rows = jnp.concatenate([prompts, samples.tokens], axis=1)
    seen = jnp.concatenate([segments, samples.mask.astype(jnp.int32)], axis=1)
    hidden = few.hidden(params, rows, segment_ids=seen)[:, -NEW - 1 : -1]
    logprobs, entropy = few.logprobs(params, hidden, samples.tokens, 0.8)
    np.testing.assert_allclose(logprobs, samples.logprobs, atol=1e-5)
    p = np.exp(logits[..., :IDS])
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    raw, _ = model.logprobs(params, hidden, samples.tokens, 0.8)
    assert (np.asarray(raw) < np.asarray(logprobs) - 0.01).mean() > 0.5


def test_a_stream_samples_the_same_ids(llama):
    model, params = llama
    few = model.restricted(IDS)
    rows, drawn = left_padded(LENGTHS), keys(len(LENGTHS))
    settings = settings_of(eos_id=-1)
    samples = sampled(few, params, *rows, drawn, settings)
    first = [x[:2] for x in rows]
    got = streamed(few, params, *first, drawn[:2], settings)
    assert got == np.asarray(samples.tokens)[:2].tolist()
