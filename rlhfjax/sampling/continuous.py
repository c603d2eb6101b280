"""Continuous batching: many rows through a few lanes; a lane that finished takes the next prompt.

Static batching decodes every row until the longest one ends. Here shapes are just as fixed, but a
lane is free as soon as its response ends, so that a batch costs about the mean length of its
responses, not their maximum.

A decode step is that of the server (`models.lanes`): every lane has its own position, and the first
entries of its cache are those of its row, whatever the lanes beside it do. A prompt is prefilled as
in a static batch, and moved into its lane without its padding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.algos.shaping import is_any
from rlhfjax.models.lanes import LaneCache, decode_lanes, empty_lanes, fill_lanes
from rlhfjax.models.transformer import Model
from rlhfjax.sampling.choose import also_seen, choose, none_seen, seen_in
from rlhfjax.sampling.config import Sampling, end_ids
from rlhfjax.sampling.samples import Samples


class _State(NamedTuple):
    """The state of the decoding loop: `k` lanes for `n` rows of at most `r` tokens."""

    next_row: Int[Array, ""]  # the first row that no lane has taken yet
    row: Int[Array, " k"]  # the row that each lane decodes; n if the lane is free
    step: Int[Array, " k"]  # tokens drawn so far for that row
    token: Int[Array, " k"]  # the last of these tokens
    cache: LaneCache
    samples: Samples  # [n, r]
    seen: Bool[Array, "k v"] | None  # ids of each lane's row; None without penalty


def continuous(
    model: Model,
    params: dict[str, Any],
    tokens: Int[Array, "b p"],
    attention_mask: Int[Array, "b p"],
    u: Float[Array, "r n"],
    sampling: Sampling,
) -> Samples:
    """Returns responses [n, r] to n = b * samples_per_prompt rows, decode_batch rows at a time.

    Args:
      u: u[j, i] draws token j of row i.
    """
    (b, p), (r, n) = tokens.shape, u.shape
    samples_per_prompt = sampling.samples_per_prompt
    # The last token drawn never goes through the model, so the cache has no entry for it.
    entries, vocab_size = p + r - 1, model.config.vocab_size
    group = refill_size(sampling.decode_batch, samples_per_prompt)
    params = model.for_decoding(params, sampling.decode_batch)
    lengths = (attention_mask > 0).sum(1, dtype=jnp.int32)

    ends = end_ids(sampling)

    def draw(hidden, row, step, samples, seen):
        """Draws and stores token number `step` of each row; a row that it ends becomes n."""
        logits = model.sampling_logits(params, hidden)
        u_drawn = u.at[step, row].get(mode="clip")
        token, logprob = choose(logits, u_drawn, sampling, seen)
        new = Samples(tokens=token, mask=jnp.ones_like(logprob), logprobs=logprob)
        samples = jax.tree.map(
            lambda x, y: x.at[row, step].set(y, mode="drop"), samples, new
        )
        ended = is_any(token, ends) | (step == r - 1)
        return token, jnp.where(ended, n, row), samples, also_seen(seen, token)

    def can_refill(s: _State):
        return (s.next_row < n) & ((s.row == n).sum() >= group)

    def is_decoding(s: _State):
        return (s.row < n).any()

    def refill(s: _State) -> _State:
        """Prefills the next `group` rows into free lanes, and draws their first tokens."""
        lanes = jnp.nonzero(s.row == n, size=group)[0]
        rows = s.next_row + jnp.arange(group)
        prompts = jnp.minimum(rows[::samples_per_prompt] // samples_per_prompt, b - 1)
        cache = model.init_cache(group // samples_per_prompt, p)
        group_tokens, group_mask = tokens[prompts], attention_mask[prompts]
        hidden, cache = model.prefill(params, group_tokens, group_mask, cache)
        seen = seen_in(sampling, group_tokens, group_mask, vocab_size)
        padding = p - lengths[prompts]
        prefilled = hidden, cache, seen, padding
        hidden, cache, seen, padding = repeat(prefilled, samples_per_prompt)
        first = jnp.zeros_like(rows)
        token, rows, samples, seen = draw(hidden, rows, first, s.samples, seen)
        if s.seen is not None:
            seen = s.seen.at[lanes].set(seen)
        # Rows past the last one leave their lanes free.
        rows = jnp.where(rows < n, rows, n)
        cache = fill_lanes(s.cache, cache, lanes, padding)
        step = jnp.ones_like(rows)
        return s._replace(
            row=s.row.at[lanes].set(rows),
            step=s.step.at[lanes].set(step),
            token=s.token.at[lanes].set(token),
            next_row=s.next_row + group,
            cache=cache,
            samples=samples,
            seen=seen,
        )

    def decode(s: _State) -> _State:
        """Runs one decode step: each lane takes its last token in and draws the next one."""
        prompt = jnp.minimum(s.row // samples_per_prompt, b - 1)
        # What a free lane writes is not read.
        position = jnp.minimum(lengths[prompt] + s.step, entries) - 1
        hidden, cache = decode_lanes(
            model, params, s.cache, s.token, position, position, entries
        )
        token, row, samples, seen = draw(hidden, s.row, s.step, s.samples, s.seen)
        return _State(
            next_row=s.next_row,
            row=row,
            step=s.step + 1,
            token=token,
            cache=cache,
            samples=samples,
            seen=seen,
        )

    def refill_and_decode(s: _State) -> _State:
        """Refills free lanes, then decodes until the next refill or the last end."""
        return jax.lax.while_loop(
            lambda s: is_decoding(s) & ~can_refill(s), decode, refill(s)
        )

    free = jnp.full(sampling.decode_batch, n)
    samples = Samples.empty(n, r, sampling.pad_id)
    start = _State(
        next_row=jnp.zeros((), jnp.int32),
        row=free,
        step=jnp.zeros_like(free),
        token=jnp.zeros_like(free),
        cache=empty_lanes(model, sampling.decode_batch, entries, begins_again=False),
        samples=samples,
        seen=none_seen(sampling, sampling.decode_batch, vocab_size),
    )
    end = jax.lax.while_loop(
        lambda s: is_decoding(s) | (s.next_row < n), refill_and_decode, start
    )
    return end.samples


def refill_size(decode_batch: int, samples_per_prompt: int) -> int:
    """Returns how many lanes are refilled at once: an eighth, in whole groups of one prompt.

    Refills of few rows leave no lane free for long; refills of many rows use the device better.
    """
    return samples_per_prompt * max(1, decode_batch // 8 // samples_per_prompt)


def repeat(tree: Any, samples_per_prompt: int) -> Any:
    """Returns a tree of arrays with every row repeated, copies next to each other."""
    if samples_per_prompt == 1:
        return tree
    return jax.tree.map(lambda x: jnp.repeat(x, samples_per_prompt, axis=0), tree)
