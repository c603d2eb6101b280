"""Small models are compiled by the dozen and run once: compile them quickly, where a test does not ask otherwise."""

import jax
import pytest

OPTION = "jax_disable_most_optimizations"


@pytest.fixture
def optimised():
    """Asked for by a test that looks at the compiled program."""


@pytest.fixture(autouse=True)
def _compile_quickly(request):
    before = jax.config.values[OPTION]
    jax.config.update(OPTION, "optimised" not in request.fixturenames)
    yield
    jax.config.update(OPTION, before)
