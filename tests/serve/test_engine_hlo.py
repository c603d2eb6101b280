"""What the engine's compiled programs do not do: copy the cache, or send more than one array."""

import re

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.lanes import empty_lanes
from rlhfjax.sampling.lanes import Settings, words
from rlhfjax.serve import programs

# Sizes that make the cache known by its shape.
CONFIG = TransformerConfig(
    vocab_size=97,
    d_model=24,
    n_layers=2,
    n_heads=4,
    d_ff=40,
    max_length=64,
    n_kv_heads=2,
)
LANES, ENTRIES, READ, CHUNK, ALTERNATIVES = 5, 53, 31, 7, 4
CACHE = f"[{LANES},2,{ENTRIES}"
IN_PLACE = {"dynamic-update-slice", "scatter", "fusion"}
NO_WORK = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "call"}


def of_lanes(dtype, *shape):
    return jax.ShapeDtypeStruct((*shape, LANES), dtype)


def lowered(name, model):
    cache = jax.eval_shape(
        lambda: empty_lanes(model, LANES, ENTRIES, begins_again=True)
    )
    if name == "prefill":
        place = jax.ShapeDtypeStruct((2,), jnp.int32)
        tokens = jax.ShapeDtypeStruct((CHUNK,), jnp.int32)
        return programs.prefill.lower(model, READ, model.shapes(), cache, place, tokens)
    settings = Settings(
        seed=of_lanes(jnp.uint32),
        temperature=of_lanes(jnp.float32),
        top_k=of_lanes(jnp.int32),
        top_p=of_lanes(jnp.float32),
        log_min_p=of_lanes(jnp.float32),
        wants_top=of_lanes(bool),
    )
    mask = jax.ShapeDtypeStruct((LANES, words(CONFIG.vocab_size)), jnp.uint32)
    step = jax.ShapeDtypeStruct((4, 1 if name == "decode_one" else LANES), jnp.int32)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    return programs.decode.lower(
        model, READ, ALTERNATIVES, model.shapes(), cache, step, first, settings, mask
    )


@pytest.mark.parametrize("name", ["decode", "decode_one", "prefill"])
@pytest.mark.parametrize(
    "int8_cache", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_the_cache_is_written_in_place(name, int8_cache, optimized):
    model = Model(CONFIG, int8_cache=int8_cache)
    program = lowered(name, model)
    text = program.compile().as_text()
    arrays = 8 if int8_cache else 4
    assert text.splitlines()[0].count("may-alias") == arrays
    made = re.findall(r"= (\S+) ([\w\-]+)\(", text)
    operations = {op for result, op in made if CACHE in result}
    assert operations & IN_PLACE and operations <= IN_PLACE | NO_WORK


def test_a_step_sends_one_small_array(optimized):
    cache, packed = lowered("decode", Model(CONFIG)).out_info
    assert jax.tree.leaves(cache)[0].shape == (LANES, 2, ENTRIES, 6)
    assert packed.shape == (LANES, 2 + 2 * ALTERNATIVES) and packed.dtype == jnp.int32
