"""Autoregressive sampling with a KV cache: `generate` for jitted batches, `stream` for a chat."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Bool, Int, Key

from rlhfjax.algos.shaping import is_any
from rlhfjax.errors import ConfigError
from rlhfjax.models.cache import grown
from rlhfjax.models.transformer import Cache, Model
from rlhfjax.sampling.choose import REMOVED, also_seen, choose, seen_in
from rlhfjax.sampling.config import Sampling, end_ids
from rlhfjax.sampling.continuous import continuous, repeat
from rlhfjax.sampling.samples import Samples, uniforms
from rlhfjax.sampling.structured import Structure

log = logging.getLogger("rlhfjax")


def generate(
    model: Model,
    params: dict[str, Any],
    tokens: Int[Array, "b p"],
    attention_mask: Int[Array, "b p"],
    keys: Key[Array, " n"],
    sampling: Sampling,
) -> Samples:
    """Samples samples_per_prompt responses of at most max_new_tokens tokens to each prompt.

    y_i ~ top_p(top_k(softmax(logits(prompt, y_<i) / temperature))). The eos is part of the
    response; pad_id follows it, with mask 0. A row that reaches max_new_tokens simply ends: no eos
    is forced on it. Decoding stops when every row has ended. A response depends on its own prompt
    and key only: with continuous batching (decode_batch) it is the same. Stop texts are not looked
    for; `sampling.stop` cuts responses at them.

    Args:
      tokens: prompts, left-padded.
      attention_mask: 1 on real tokens, 0 on padding.
      keys: one typed key per row. Rows i * K .. (i + 1) * K - 1 are the K = samples_per_prompt
        responses to prompt i, which is prefilled once.
    Returns: Samples(tokens, mask, logprobs), each [n, max_new_tokens] with n = b * K.
    Raises: ConfigError if the number of keys is wrong, or if prompt and response exceed the model's
      context.
    """
    (b, p), n = tokens.shape, keys.shape[0]
    _validate_length(model, p, sampling.max_new_tokens)
    if n != b * sampling.samples_per_prompt:
        raise ConfigError(
            f"samples_per_prompt={sampling.samples_per_prompt}: "
            f"must be the number of keys per prompt; {b} prompts have {n} keys"
        )
    # Under jit this line runs once per compiled program.
    if isinstance(tokens, core.Tracer):
        log.info(
            "compiling the sampler: %d prompts of %d tokens, %d responses of %d",
            b,
            p,
            n,
            sampling.max_new_tokens,
        )
    if sampling.cache_parts > 1 and model.config.window is not None:
        raise ConfigError(
            f"cache_parts={sampling.cache_parts}: must be 1 with window layers"
        )
    u = uniforms(keys, sampling.max_new_tokens)
    is_continuous = 0 < sampling.decode_batch < n
    sample = continuous if is_continuous else _static
    return sample(model, params, tokens, attention_mask, u, sampling)


def _validate_length(model, prompt_length, max_new_tokens):
    limit = model.config.max_length
    if prompt_length + max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt_length} and a response of {max_new_tokens} tokens "
            f"exceed model.max_length={limit}"
        )


# ------------------------------------------------------------------ static batches


class _State(NamedTuple):
    """The state of the decoding loop."""

    step: Int[Array, ""]  # tokens drawn so far per row
    token: Int[Array, " b"]  # the last one drawn; pad_id in a row that has ended
    done: Bool[Array, " b"]  # rows that have drawn their eos
    cache: Cache  # holds the prompt and all tokens before the last one
    samples: Samples
    seen: Bool[Array, "b v"] | None  # ids of prompt and response; None without penalty


def _static(model, params, tokens, attention_mask, u, sampling):
    """Returns what `generate` does, decoding all rows together until the last one ends."""
    (b, p), (max_new_tokens, n) = tokens.shape, u.shape
    samples_per_prompt, pad_id = sampling.samples_per_prompt, sampling.pad_id
    params = model.for_decoding(params, n)
    length = (attention_mask > 0).sum(1, dtype=jnp.int32)
    length = repeat(length, samples_per_prompt)

    ends = end_ids(sampling)

    def draw(step, hidden, done, samples, seen):
        """Draws and stores token number `step` of each row."""
        logits = model.sampling_logits(params, hidden)
        token, logprob = choose(logits, u[step], sampling, seen)
        live = (~done).astype(jnp.float32)
        token = jnp.where(done, pad_id, token)
        new = Samples(tokens=token, mask=live, logprobs=logprob * live)
        samples = _write_column(samples, step, new)
        return token, done | is_any(token, ends), samples, also_seen(seen, token)

    def is_decoding(s: _State):
        return (s.step < max_new_tokens) & ~s.done.all()

    def decode(s: _State) -> _State:
        """Runs one decode step: each row takes its last token in and draws the next one."""
        position, place = length + s.step - 1, p + s.step - 1
        hidden, cache = model.decode(params, s.token, position, place, s.cache)
        drawn = draw(s.step, hidden, s.done, s.samples, s.seen)
        token, done, samples, seen = drawn
        return _State(
            step=s.step + 1,
            token=token,
            done=done,
            cache=cache,
            samples=samples,
            seen=seen,
        )

    # The last token drawn never goes through the model, so the cache has no place for it.
    ends_of_parts = part_ends(max_new_tokens, sampling.cache_parts)
    cache = model.init_cache(b, p + ends_of_parts[0] - 1)
    prefilled = model.prefill(params, tokens, attention_mask, cache)
    hidden, cache = repeat(prefilled, samples_per_prompt)
    done = jnp.zeros(n, bool)
    samples = Samples.empty(n, max_new_tokens, pad_id)
    seen = seen_in(sampling, tokens, attention_mask, model.config.vocab_size)
    seen = repeat(seen, samples_per_prompt)
    token, done, samples, seen = draw(0, hidden, done, samples, seen)
    start = _State(
        step=jnp.ones((), jnp.int32),
        token=token,
        done=done,
        cache=cache,
        samples=samples,
        seen=seen,
    )
    if len(ends_of_parts) == 1:
        return jax.lax.while_loop(is_decoding, decode, start).samples
    return _decode_in_parts(decode, start, ends_of_parts).samples


def part_ends(max_new_tokens: int, parts: int) -> list[int]:
    """Returns how many tokens a row may have after each part of a response."""
    parts = min(parts, max_new_tokens)
    return [-(-max_new_tokens * (i + 1) // parts) for i in range(parts)]


def _decode_in_parts(
    decode: Callable[[_State], _State], state: _State, ends_of_parts: list[int]
) -> _State:
    """Decodes with a cache that grows: attention reads fewer entries that are still empty.

    Every part is a separate loop with a separate counter.
    """
    prompt = state.cache.valid.shape[1] - ends_of_parts[0] + 1
    drawn = 1
    for end in ends_of_parts:
        steps, drawn = end - drawn, end
        state = state._replace(cache=grown(state.cache, prompt + end - 1))

        def is_decoding(
            part: tuple[jax.Array, _State], steps: int = steps
        ) -> jax.Array:
            return (part[0] < steps) & ~part[1].done.all()

        def advance(part: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
            return part[0] + 1, decode(part[1])

        start = jnp.zeros((), jnp.int32), state
        _, state = jax.lax.while_loop(is_decoding, advance, start)
    return state


def _write_column(samples, step, column):
    """Returns samples [n, r] with token number `step` of every row."""

    def write(rows, new):
        new = new[:, None].astype(rows.dtype)
        return jax.lax.dynamic_update_slice(rows, new, (0, step))

    return jax.tree.map(write, samples, column)


# ------------------------------------------------------------------ token by token


def stream(
    model: Model,
    params: dict[str, Any],
    tokens: Int[Array, "1 p"],
    attention_mask: Int[Array, "1 p"],
    key: Key[Array, ""],
    sampling: Sampling,
    entries: int = 0,
    structure: Structure | None = None,
) -> Iterator[int]:
    """Yields the tokens of one response as they are drawn; the eos (if it comes) is the last.

    They are the tokens that `generate` returns for this prompt and key. Pad prompts (on the left)
    to a few lengths: the prefill is compiled for each, and the decode step for each number of
    entries. Raises ConfigError as `generate` does.

    Args:
      entries: of the cache; it has at least those of the prompt and all new tokens but the last.
      structure: which tokens may follow; the response ends where none may. None: any may.
    """
    p, max_new_tokens = tokens.shape[1], sampling.max_new_tokens
    _validate_length(model, p, max_new_tokens)
    entries = max(entries, p + max_new_tokens - 1)
    prompt = tokens, attention_mask
    return _stream(model, params, *prompt, key, sampling, entries, structure)


def _stream(model, params, tokens, attention_mask, key, sampling, entries, structure):
    p, max_new_tokens = tokens.shape[1], sampling.max_new_tokens
    length = (attention_mask > 0).sum(1, dtype=jnp.int32)
    hidden, cache = _prefill(model, entries, params, tokens, attention_mask)
    seen = seen_in(sampling, tokens, attention_mask, model.config.vocab_size)
    for step in range(max_new_tokens):
        allowed = structure and structure.allowed(model.config.vocab_size)
        token, seen = _next_token(
            model, sampling, params, hidden, key, step, seen, allowed
        )
        yield int(token[0])
        if int(token[0]) in end_ids(sampling) or step + 1 == max_new_tokens:
            return
        if structure:
            structure.accept(int(token[0]))
            if structure.is_complete:
                return
        position, place = length + step, jnp.int32(p + step)
        hidden, cache = _decode(model, params, token, position, place, cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(model, entries, params, tokens, attention_mask):
    cache = model.init_cache(tokens.shape[0], entries)
    return model.prefill(params, tokens, attention_mask, cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_token(model, sampling, params, hidden, key, step, seen, allowed):
    u = jax.random.uniform(jax.random.fold_in(key, step))[None]
    logits = model.sampling_logits(params, hidden)
    if allowed is not None:
        logits = jnp.where(allowed, logits, REMOVED)
    token, _ = choose(logits, u, sampling, seen)
    return token, also_seen(seen, token)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _decode(model, params, token, position, place, cache):
    return model.decode(params, token, position, place, cache)
