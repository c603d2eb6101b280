import jax.numpy as jnp

from rlhfjax.algos import language
from tests.jitted import jitted

language = jitted(language)


def test_pitfall_42_nats_per_byte_of_the_counted_targets():
    # Bytes: bos 0, "a" 1, "é" 2, "今" 3. Counted: a é eos | 今, 6 bytes and 12 nats.
    targets, mask = (
        jnp.array([[1, 2, 0, 3], [3, 3, 1, 0]]),
        jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0]]),
    )
    nats, size = language.nats_per_byte(
        jnp.float32(12.0), targets, mask, jnp.array([0, 1, 2, 3])
    )
    assert (float(nats), float(size)) == (12.0, 6.0)
