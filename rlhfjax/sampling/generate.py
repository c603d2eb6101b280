"""Autoregressive sampling with a KV cache: `generate` for batches, under jit; `stream` token by token, for a chat."""

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from rlhfjax.errors import ConfigError
from rlhfjax.models.transformer import Cache, Model
from rlhfjax.sampling.choose import check, choose
from rlhfjax.sampling.continuous import continuous, repeat
from rlhfjax.sampling.samples import Samples, uniforms

log = logging.getLogger("rlhfjax")


class _Loop(NamedTuple):
    """State of the decoding loop when `step` tokens a row have been drawn."""

    step: Int[Array, ""]
    token: Int[Array, " b"]  # the last one drawn (pad_id in a row that is done)
    done: Bool[Array, " b"]  # rows that have drawn their eos
    cache: Cache  # holds the prompt and the tokens before the last
    samples: Samples


def generate(
    model: Model,
    params: dict[str, Any],
    tokens: Int[Array, "b p"],
    segments: Int[Array, "b p"],
    keys: Key[Array, " n"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    decode_batch: int = 0,
) -> Samples:
    """Sample `each` responses of at most max_new_tokens tokens to each left-padded prompt.

    y_i ~ top_p(top_k(softmax(logits(prompt, y_<i) / temperature))). The eos is part of the response; slots after it
    hold pad_id with mask 0. A row that reaches max_new_tokens simply ends: no eos is forced on it. The loop stops when every
    row is done. A row depends on its own prompt and key only.

    Args:
      tokens, segments: prompts, left-padded; segments are 1 on real tokens and 0 on padding.
      keys: one typed key a row; rows i * each .. (i + 1) * each - 1 answer prompt i, which is prefilled once.
      temperature: 0 is greedy, and logprobs are then those of temperature 1.
      top_k, top_p: 0 and 1 are off. For evaluation: a training rollout must not truncate.
      slots: so many rows are decoded at a time, and one that ends makes room for the next (continuous batching): the
        same responses, sooner where lengths differ much. 0, or no fewer than there are rows: all of them at once.
    Returns: Samples(tokens, mask, logprobs), each [n, max_new_tokens] with n = b * each.
    Raises: ConfigError for impossible settings, or when prompt and response exceed the model's context.
    """
    check(temperature, top_k, top_p)
    if eos_id == pad_id:
        raise ConfigError(
            f"eos_id and pad_id are both {eos_id}: a response's end would be taken for padding"
        )
    (b, p), n = tokens.shape, keys.shape[0]
    _check_length(model, p, max_new_tokens)
    check_rows(b, n, samples_per_prompt, decode_batch)
    if isinstance(tokens, jax.core.Tracer):  # that is, once a shape
        log.info(
            "the sampler is compiled for %d prompts of %d tokens, %d responses of %d",
            b,
            p,
            n,
            max_new_tokens,
        )
    pick = functools.partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)
    u = uniforms(keys, max_new_tokens)
    ends = {"eos_id": eos_id, "pad_id": pad_id}
    if 0 < decode_batch < n:
        return continuous(
            model,
            params,
            tokens,
            segments,
            u,
            pick,
            decode_batch=decode_batch,
            samples_per_prompt=samples_per_prompt,
            **ends,
        )
    return _static(
        model,
        params,
        tokens,
        segments,
        u,
        pick,
        samples_per_prompt=samples_per_prompt,
        **ends,
    )


def check_rows(
    prompts: int, rows: int, samples_per_prompt: int, decode_batch: int, where: str = ""
) -> None:
    """Raises ConfigError unless every prompt has `each` >= 1 rows, and the slots (0: off) hold those of one prompt."""
    if samples_per_prompt < 1 or rows != prompts * samples_per_prompt:
        raise ConfigError(
            f"{where}samples_per_prompt is {samples_per_prompt}: {prompts} prompts and {rows} keys are given"
        )
    if decode_batch < 0 or 0 < decode_batch < samples_per_prompt:
        raise ConfigError(
            f"{where}decode_batch is {decode_batch}: it must be 0 (off) or hold at least the {samples_per_prompt} responses to a prompt"
        )


def _static(
    model, params, tokens, segments, u, pick, *, samples_per_prompt, eos_id, pad_id
):
    """All rows at once, until the last one ends."""
    (b, p), (max_new_tokens, n) = tokens.shape, u.shape
    length = repeat((segments > 0).sum(1, dtype=jnp.int32), samples_per_prompt)

    def draw(step, hidden, done, samples):
        token, logprob = pick(model.logits(params, hidden), u[step])
        live = (~done).astype(jnp.float32)
        token = jnp.where(done, pad_id, token)
        samples = _write(samples, step, Samples(token, live, logprob * live))
        return token, done | (token == eos_id), samples

    def unfinished(s: _Loop):
        return (s.step < max_new_tokens) & ~s.done.all()

    def advance(s: _Loop) -> _Loop:
        hidden, cache = model.decode(
            params, s.token, length + s.step - 1, p + s.step - 1, s.cache
        )
        token, done, samples = draw(s.step, hidden, s.done, s.samples)
        return _Loop(s.step + 1, token, done, cache, samples)

    # The last token drawn is never run through the model, so it needs no slot.
    hidden, cache = repeat(
        model.prefill(
            params, tokens, segments, model.init_cache(b, p + max_new_tokens - 1)
        ),
        samples_per_prompt,
    )
    token, done, samples = draw(
        0, hidden, jnp.zeros(n, bool), Samples.empty(n, max_new_tokens, pad_id)
    )
    start = _Loop(jnp.ones((), jnp.int32), token, done, cache, samples)
    return jax.lax.while_loop(unfinished, advance, start).samples


def _write(samples, step, column):
    def put(rows, new):
        return jax.lax.dynamic_update_slice(
            rows, new[:, None].astype(rows.dtype), (0, step)
        )

    return jax.tree.map(put, samples, column)


def _check_length(model, prompt, new):
    if new < 1:
        raise ConfigError(f"max_new_tokens is {new}: it must be at least 1")
    if prompt + new > model.config.max_length:
        raise ConfigError(
            f"a prompt of {prompt} and a response of {new} tokens exceed model.max_length = {model.config.max_length}"
        )


def stream(
    model: Model,
    params: dict[str, Any],
    tokens: Int[Array, "1 p"],
    segments: Int[Array, "1 p"],
    key: Key[Array, ""],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[int]:
    """Yield the tokens of one response as they are drawn, the eos (if it comes) last.

    The same tokens as `generate` gives for this prompt and key. Pad prompts (on the left) to a few lengths: each
    length compiles once. Raises ConfigError as `generate` does.
    """
    check(temperature, top_k, top_p)
    _check_length(model, tokens.shape[1], max_new_tokens)
    return _stream(
        model,
        params,
        tokens,
        segments,
        key,
        max_new_tokens,
        eos_id,
        (temperature, top_k, top_p),
    )


def _stream(model, params, tokens, segments, key, max_new_tokens, eos_id, settings):
    p = tokens.shape[1]
    length = (segments > 0).sum(1, dtype=jnp.int32)
    hidden, cache = _first(model, p + max_new_tokens - 1, params, tokens, segments)
    for step in range(max_new_tokens):
        token = _next_token(model, settings, params, hidden, key, step)
        yield int(token[0])
        if int(token[0]) == eos_id or step + 1 == max_new_tokens:
            return
        hidden, cache = _advance(
            model, params, token, length + step, jnp.int32(p + step), cache
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first(model, decode_batch, params, tokens, segments):
    return model.prefill(
        params, tokens, segments, model.init_cache(tokens.shape[0], decode_batch)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_token(model, settings, params, hidden, key, step):
    temperature, top_k, top_p = settings
    u = jax.random.uniform(jax.random.fold_in(key, step))[None]
    return choose(
        model.logits(params, hidden),
        u,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _advance(model, params, token, position, slot, cache):
    return model.decode(params, token, position, slot, cache)
