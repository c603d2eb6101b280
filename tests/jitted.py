"""A module's functions, each compiled whole.

One compilation a call signature instead of one an operation.
"""

import inspect
import types

import jax


def jitted(module: types.ModuleType) -> types.SimpleNamespace:
    """The public functions of `module` under jit.

    Keyword-only hyper-parameters stay Python values.
    """
    functions = {
        name: f
        for name, f in vars(module).items()
        if inspect.isfunction(f)
        and f.__module__ == module.__name__
        and not name.startswith("_")
    }
    return types.SimpleNamespace(
        **{
            name: jax.jit(f, static_argnames=_static(f))
            for name, f in functions.items()
        }
    )


def _static(function) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
