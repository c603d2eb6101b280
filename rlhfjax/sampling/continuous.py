"""Continuous batching: many prompts through a few slots; a slot whose response has ended takes the next prompt.

Static batching runs every row as long as the longest. Here the loop's shapes are just as fixed, but a slot is free for
the next prompt as soon as its response ends, so that lengths with a long tail cost about their mean.

The cache of a slot is a ring of p + r - 1 places, and all slots write their token's keys and values to the same place,
one further each step, as a static batch does. A prompt that comes in late is put into the p places just behind: its
response fills the others, and no more, before the ring comes round. Positions are in the keys already, so that
attention asks only which places are valid, not in what order they stand.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.transformer import Cache, Model
from rlhfjax.sampling.samples import Samples


class _State(NamedTuple):
    """`k` slots answer `n` rows."""

    time: Int[Array, ""]  # decode steps so far
    asked: Int[Array, ""]  # rows that have been given to a slot
    row: Int[Array, " k"]  # the row that a slot answers; n where it is free
    step: Int[Array, " k"]  # tokens drawn for that row
    token: Int[Array, " k"]  # the last of them
    cache: Cache
    samples: Samples  # [n, r]


def refill_size(decode_batch: int, samples_per_prompt: int) -> int:
    """How many slots are filled at once: an eighth of them, in whole groups of `each` rows with one prompt.

    A prefill of few rows wastes no slot for long; one of many uses the machine better.
    """
    return samples_per_prompt * max(1, decode_batch // 8 // samples_per_prompt)


def continuous(
    model: Model,
    params: dict[str, Any],
    tokens: Int[Array, "b p"],
    segments: Int[Array, "b p"],
    u: Float[Array, "r n"],
    pick: Callable[[Array, Array], tuple[Array, Array]],
    *,
    decode_batch: int,
    samples_per_prompt: int,
    eos_id: int,
    pad_id: int,
) -> Samples:
    """Responses [n, r] to n = b * each rows, `slots` of them at a time; see `generate`.

    Args:
      u: what row i's token j is drawn with, u[j, i].
      pick: (logits [k, v], u [k]) -> (token [k], logprob [k]).
    """
    (b, p), (r, n) = tokens.shape, u.shape
    ring, group = p + r - 1, refill_size(decode_batch, samples_per_prompt)
    lengths = jnp.repeat((segments > 0).sum(1, dtype=jnp.int32), samples_per_prompt)

    def draw(hidden, row, step, samples):
        """Token number `step` of each row, written down; the row becomes n where it was the last."""
        token, logprob = pick(
            model.logits(params, hidden), u.at[step, row].get(mode="clip")
        )
        new = Samples(token, jnp.ones_like(logprob), logprob)
        samples = jax.tree.map(
            lambda x, y: x.at[row, step].set(y, mode="drop"), samples, new
        )
        return token, jnp.where((token == eos_id) | (step == r - 1), n, row), samples

    def refill(s: _State) -> _State:
        """The next `group` rows into the first free slots. Rows past the last leave theirs free."""
        free = jnp.nonzero(s.row == n, size=group)[0]
        rows = s.asked + jnp.arange(group)
        prompts = jnp.minimum(rows[::samples_per_prompt] // samples_per_prompt, b - 1)
        fresh = model.init_cache(group // samples_per_prompt, ring)
        hidden, fresh = model.prefill(params, tokens[prompts], segments[prompts], fresh)
        hidden, fresh = repeat((hidden, fresh), samples_per_prompt)
        token, rows, samples = draw(hidden, rows, jnp.zeros_like(rows), s.samples)
        rows = jnp.where(rows < n, rows, n)
        cache = _put(s.cache, fresh, free, s.time % ring)
        row, step, token = (
            x.at[free].set(y)
            for x, y in ((s.row, rows), (s.step, jnp.ones_like(rows)), (s.token, token))
        )
        return _State(s.time, s.asked + group, row, step, token, cache, samples)

    def advance(s: _State) -> _State:
        position = lengths.at[s.row].get(mode="clip") + s.step - 1
        hidden, cache = model.decode(
            params, s.token, position, (p + s.time) % ring, s.cache
        )
        token, row, samples = draw(hidden, s.row, s.step, s.samples)
        return _State(s.time + 1, s.asked, row, s.step + 1, token, cache, samples)

    def refillable(s: _State):
        return (s.asked < n) & ((s.row == n).sum() >= group)

    def answering(s: _State):
        return (s.row < n).any()

    def turn(s: _State) -> _State:
        return jax.lax.while_loop(
            lambda s: answering(s) & ~refillable(s), advance, refill(s)
        )

    idle, zero = jnp.full(decode_batch, n), jnp.zeros((), jnp.int32)
    empty = Samples.empty(n, r, pad_id)
    start = _State(
        zero,
        zero,
        idle,
        jnp.zeros_like(idle),
        jnp.zeros_like(idle),
        model.init_cache(decode_batch, ring),
        empty,
    )
    return jax.lax.while_loop(
        lambda s: answering(s) | (s.asked < n), turn, start
    ).samples


def repeat(tree: Any, samples_per_prompt: int) -> Any:
    """Every row of every array `each` times, one after the other."""
    return (
        tree
        if samples_per_prompt == 1
        else jax.tree.map(lambda x: jnp.repeat(x, samples_per_prompt, axis=0), tree)
    )


def _put(
    cache: Cache, fresh: Cache, lanes: Int[Array, " m"], shift: Int[Array, ""]
) -> Cache:
    """`fresh`, turned by `shift` places, in the place of some slots' rings."""

    def put(axis, old, new):
        return old.at[lanes].set(jnp.roll(new, shift, axis), unique_indices=True)

    k, v = jax.tree.map(
        functools.partial(put, 2), (cache.k, cache.v), (fresh.k, fresh.v)
    )
    return Cache(k, v, put(1, cache.valid, fresh.valid))
