"""What the compiled sampler does not do: copy its cache, make logits of a whole prompt, prefill one
prompt twice.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.models import Model, TransformerConfig
from rlhfjax.sampling import Sampling, generate

# Sizes that make an array known by its shape.
CONFIG = TransformerConfig(
    vocab_size=97,
    d_model=24,
    n_layers=2,
    n_heads=4,
    d_ff=40,
    max_length=64,
    n_kv_heads=2,
)
PROMPTS, PROMPT, NEW = 34, 19, 11
PLACES = PROMPT + NEW - 1
IN_PLACE = {"dynamic-update-slice", "scatter"}
NO_WORK = {
    "parameter",
    "get-tuple-element",
    "bitcast",
    "tuple",
    "while",
    "call",
    "conditional",
}


@functools.cache
def compiled_text(samples_per_prompt=1, decode_batch=0):
    """The optimized program; ask for it in a test that has the fixture `optimized`."""
    model = Model(CONFIG)
    sampling = Sampling(
        max_new_tokens=NEW,
        eos_id=1,
        pad_id=0,
        samples_per_prompt=samples_per_prompt,
        decode_batch=decode_batch,
    )
    params = model.shapes()
    rows = jax.ShapeDtypeStruct((PROMPTS, PROMPT), jnp.int32)
    keys = jax.eval_shape(
        lambda: jax.random.split(jax.random.key(0), PROMPTS * samples_per_prompt)
    )
    return (
        jax.jit(lambda *x: generate(model, *x, sampling))
        .lower(params, rows, rows, keys)
        .compile()
        .as_text()
    )


def computations(text):
    """name -> [(what an instruction makes, its operation, the computations that it calls)], and the
    entry's name.
    """
    found, entry, name = {}, None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            found[name], entry = [], name if header[1] else entry
        elif made := re.match(
            r"\s+(?:ROOT )?%?[\w.\-]+ = (\S+|\(.*?\)) ([\w\-]+)\(", line
        ):
            called = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line)
            found[name].append((made[1], made[2], called))
    return found, entry


def inside(found, names):
    """All computations that these call, and themselves."""
    seen, todo = set(), list(names)
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += [other for *_, called in found[name] for other in called]
    return seen


def sizes(shape):
    return [
        math.prod(map(int, filter(None, dims.split(","))))
        for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
    ]


def copies(text, size):
    """Instructions within loops that make an array of `size` elements otherwise than by an update
    in place.
    """
    found, entry = computations(text)
    bodies = inside(
        found,
        [
            b
            for name in found
            for _, op, called in found[name]
            if op == "while"
            for b in called
        ],
    )
    assert bodies
    wrong = []
    for name in bodies - {entry}:
        for shape, op, called in found[name]:
            inner = (
                {o for c in called for _, o, _ in found[c]} if op == "fusion" else {op}
            )
            if (
                not shape.startswith("(")
                and size in sizes(shape)
                and not inner & IN_PLACE
                and not {op} & NO_WORK
            ):
                wrong.append((name, shape, op))
    return wrong


@pytest.mark.parametrize(
    ("samples_per_prompt", "decode_batch", "rows"),
    [(1, 0, 34), (2, 0, 68), (2, 16, 16)],
)
def test_the_cache_is_never_copied_in_a_loop(
    samples_per_prompt, decode_batch, rows, optimized
):
    """Not in a step, nor in a refill: one layer's keys are [rows, 2, places, 6], and only updates
    in place make them.

    (With a single key head XLA's CPU compiler does copy: it fuses the update into what reads it,
    for a second time.)
    """
    text = compiled_text(samples_per_prompt, decode_batch)
    assert f"f32[{rows},2,{PLACES},6]" in text
    assert copies(text, rows * 2 * PLACES * 6) == []


def test_a_copy_in_a_loop_is_noticed(optimized):
    """A step that keeps the cache from before its update has to copy it."""

    def step(i, s):
        cache, before = s
        return jax.lax.dynamic_update_slice(cache, before[:1] + 1, (i, 0)), cache

    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 5, step, (x, x + 1)))
    assert copies(loop.lower(jnp.zeros((7, 11))).compile().as_text(), 77)


@pytest.mark.parametrize(("samples_per_prompt", "decode_batch"), [(1, 0), (2, 16)])
def test_prefill_makes_logits_of_the_last_slot_alone(
    samples_per_prompt, decode_batch, optimized
):
    """No array with a vocabulary axis is larger than one row of logits a row of the batch."""
    text = compiled_text(samples_per_prompt, decode_batch)
    largest = max(max(sizes(s)) for s in re.findall(r"\w+\[[\d,]*\b97\b[\d,]*\]", text))
    assert largest <= max(
        PROMPTS * (97 + 31), 97 * CONFIG.d_model
    )  # blocks of the inverse CDF pad 97 to 128


def test_a_shared_prompt_is_prefilled_once(optimized):
    """The prompt's activations, [prompts, time, d], do not grow with the answers to it."""
    text = compiled_text(2, 0)
    assert re.search(rf"\[{PROMPTS},{PROMPT},24\]|\[{PROMPTS * PROMPT},24\]", text)
    assert not re.search(
        rf"\[{2 * PROMPTS},{PROMPT},24\]|\[{2 * PROMPTS * PROMPT},24\]", text
    )
