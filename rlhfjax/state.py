"""The training state and its placement on the mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "extra"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes and a checkpoint holds.

    step: int32 scalar, the number of finished calls of the stage's step.
    params: the trained parameter trees.
    opt_state: optax's state.
    extra: what else a stage carries from step to step (KL coefficient, EMA of weights, counters).
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    extra: dict[str, PyTree] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, params: PyTree, tx: optax.GradientTransformation, **extra: PyTree) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), extra)

    def replace(self, **changes: Any) -> "TrainState":
        return dataclasses.replace(self, **changes)


def shardings(state: PyTree, axes: PyTree, layout: Layout) -> PyTree:
    """Shardings of a whole state from the logical axes of its parameters.

    Optimiser moments and averages are laid out as the parameter whose path they end in.

    Args:
      state: TrainState of arrays or ShapeDtypeStructs.
      axes: the parameters' tree with a tuple of logical names in place of each array.
    Raises:
      ConfigError: an array of two or more dimensions that no annotated parameter accounts for.
    """
    named = {
        tuple(map(str, path)): names
        for path, names in jax.tree.leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    }

    def place(path: tuple, leaf: Any) -> NamedSharding:
        path = tuple(map(str, path))
        for start in range(len(path)):
            names = named.get(path[start:])
            if names is not None and len(names) == leaf.ndim:
                return NamedSharding(layout.mesh, layout.spec(names, leaf.shape))
        if leaf.ndim >= 2:
            raise ConfigError(f"array {'/'.join(path)} of shape {leaf.shape} has no logical axis names")
        return layout.replicated

    return jax.tree.map_with_path(place, state)


def create_sharded(init: Callable[[jax.Array], PyTree], key: jax.Array, axes: PyTree, layout: Layout) -> PyTree:
    """Runs `init(key)` so that every array is born in its shards; no device ever holds the whole."""
    out = shardings(jax.eval_shape(init, key), axes, layout)
    return jax.jit(init, out_shardings=out)(key)


def apply_gradients(
    state: TrainState, grads: PyTree, tx: optax.GradientTransformation, *, skip_nonfinite: bool = False
) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
    """One optimiser update, with the global norm of the gradients as a metric.

    skip_nonfinite leaves parameters and optimiser as they were when the norm is NaN or infinite, and counts it;
    otherwise the loop stops on the reported norm.
    """
    norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    one = jnp.ones(())
    metrics = {"grad_norm": (norm, one)}
    if skip_nonfinite:
        ok = jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {
            "grad_norm": (jnp.where(ok, norm, 0.0), ok.astype(jnp.float32)),
            "skipped": (1.0 - ok, one),
        }
    return state.replace(params=params, opt_state=opt_state), metrics
