import math

import jax.numpy as jnp
import numpy as np

from rlhfjax.algos import language
from tests.jitted import jitted

language = jitted(language)


def test_bits_per_byte():
    # 8 ln 2 nats over 4 bytes are 2 bits per byte.
    np.testing.assert_allclose(language.bits_per_byte(jnp.float32(8 * math.log(2)), jnp.float32(4)), 2.0, rtol=1e-6)
