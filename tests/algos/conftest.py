"""The equations are compiled by the hundred and run once: compile them quickly."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
