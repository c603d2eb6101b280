"""The constants of the random streams: a changed value would change every run."""

import itertools

import jax
import numpy as np

from rlhfjax import streams
from rlhfjax.ranges import MOST_COUNTED


def _bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_values_are_pinned():
    values = {name: value for name, value in vars(streams).items() if name.isupper()}
    assert values == {
        "UPDATE": 1,
        "FIRST_ROLLOUT": 2,
        "HELD_OUT": 2147483648,
        "VALUE_INIT": 1,
        "LORA_DROPOUT": 2,
        "PRETRAINING_MIX": 1,
        "PER_DATA_STREAM": 104729,
        "PER_SOURCE": 7919,
        "PER_CRITIQUE_SEED": 1000003,
        "PER_SYNTHESIS_SEED": 1000033,
    }


def test_streams_of_one_key_do_not_collide():
    key = jax.random.key(0)
    layer = {*map(_bits, jax.random.split(key))}
    layer.add(_bits(jax.random.fold_in(key, streams.LORA_DROPOUT)))
    assert len(layer) == 3  # attention, block, adapters

    iteration = {_bits(key)}  # the rollout
    for number in (streams.UPDATE, streams.FIRST_ROLLOUT):
        iteration.add(_bits(jax.random.fold_in(key, number)))
    assert len(iteration) == 3

    steps = [0, 1, 1000, MOST_COUNTED]
    held_out = [streams.HELD_OUT + batch for batch in (0, 1, 1000)]
    seed = {_bits(jax.random.fold_in(key, number)) for number in steps + held_out}
    assert len(seed) == 7


def test_a_folded_number_collides_with_a_split_of_the_same_key():
    """Why LORA_DROPOUT is 2 where a layer's key is split in two."""
    key = jax.random.key(7)
    for i, split in enumerate(jax.random.split(key)):
        assert _bits(split) == _bits(jax.random.fold_in(key, i))


def test_data_seeds_do_not_collide_among_the_first_sources_and_streams():
    seeds = [
        *(streams.PER_SOURCE * i for i in range(1, 100)),
        *(streams.PER_DATA_STREAM * j for j in range(1, 1000)),
        streams.PRETRAINING_MIX,
    ]
    assert len(seeds) == len(set(seeds))
    draws = itertools.product(range(100), range(1000))
    critique = {seed * streams.PER_CRITIQUE_SEED + draw for seed, draw in draws}
    assert len(critique) == 100 * 1000
