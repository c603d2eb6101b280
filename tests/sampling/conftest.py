"""As for the models: compile quickly, where a test does not ask otherwise."""

from tests.models.conftest import _compile_quickly, optimised

__all__ = ["_compile_quickly", "optimised"]
