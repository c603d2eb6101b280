"""The training state and its placement on the mesh."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.types import PyTree

Pairs = dict[str, tuple[jax.Array, jax.Array]]  # {name: (sum, weight)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "extra"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes and a checkpoint holds.

    step: int32 scalar, the number of finished calls of the stage's step.
    params: the trained parameter trees.
    opt_state: optax's state.
    extra: what else a stage carries from step to step (KL coefficient, EMA of weights, counters).
    """

    step: Any  # an array, or its shape where the whole state is shapes
    params: PyTree
    opt_state: PyTree
    extra: PyTree = dataclasses.field(default_factory=dict)

    @classmethod
    def create(
        cls, params: PyTree, tx: optax.GradientTransformation, **extra: PyTree
    ) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), params, tx.init(params), extra)

    def replace(self, **changes: Any) -> "TrainState":
        return dataclasses.replace(self, **changes)


def merge_params(frozen: PyTree, trained: PyTree) -> PyTree:
    """Merges two nested dicts of parameters; where both have an array, the trained one counts.

    A stage may train a part of a model, such as its adapters or its head. This builds the whole
    model from both parts without copying an array, inside jit and outside.
    """
    if not (isinstance(frozen, dict) and isinstance(trained, dict)):
        return trained
    shared = frozen.keys() & trained.keys()
    merged = {name: merge_params(frozen[name], trained[name]) for name in shared}
    return {**frozen, **trained, **merged}


def copy_into(params: PyTree, pretrained: PyTree) -> PyTree:
    """Returns fresh parameters with pretrained ones copied over them, subtree by subtree.

    What was not loaded stays fresh. The pretrained ones may be on another mesh.
    """
    if isinstance(params, Mapping):
        return {
            name: copy_into(fresh, pretrained[name]) if name in pretrained else fresh
            for name, fresh in params.items()
        }
    return jax.device_put(
        jnp.array(pretrained, params.dtype, copy=True), params.sharding
    )


def shardings(state: PyTree, axes: PyTree, layout: Layout) -> PyTree:
    """Shardings of a whole state from the logical axes of its parameters.

    Optimizer moments and averages are laid out as the parameter whose path they end in.

    Args:
      state: TrainState of arrays or ShapeDtypeStructs.
      axes: the parameters' tree with a tuple of logical names in place of each array.
    Raises:
      ConfigError: an array of two or more dimensions that no annotated parameter accounts for.
    """
    named = {
        tuple(map(str, path)): names
        for path, names in jax.tree.leaves_with_path(
            axes, is_leaf=lambda x: isinstance(x, tuple)
        )
    }

    def place(path: tuple, leaf: Any) -> NamedSharding:
        path = tuple(map(str, path))
        for start in range(len(path)):
            names = named.get(path[start:])
            if names is not None and len(names) == leaf.ndim:
                return NamedSharding(layout.mesh, layout.spec(names, leaf.shape))
        if leaf.ndim >= 2:
            raise ConfigError(
                f"array {'/'.join(path)} of shape {leaf.shape} has no logical axis names"
            )
        return layout.replicated

    return jax.tree.map_with_path(place, state)


def abstract(shapes: PyTree, axes: PyTree, layout: Layout) -> PyTree:
    """Shapes and dtypes with the shardings that the arrays will have: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(shapes, axes, layout),
    )


def create_sharded(
    init: Callable[[jax.Array], PyTree], key: jax.Array, axes: PyTree, layout: Layout
) -> PyTree:
    """Runs `init(key)` so that every array is born in its shards; no device ever holds the whole."""
    out = shardings(jax.eval_shape(init, key), axes, layout)
    return jax.jit(init, out_shardings=out)(key)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Whether no number in a tree is NaN or infinite, bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))


def gradients(
    loss: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    key: jax.Array | None,
    *,
    microbatches: int = 1,
    frozen: PyTree | None = None,
) -> tuple[PyTree, Pairs]:
    """Gradient of a loss over a batch, exactly the same however many microbatches it is taken in.

    With L_i = S_i / W_i the mean of microbatch i (metric "loss" is the pair (S_i, W_i)), the batch's gradient is
    sum_i W_i grad(L_i) / sum_i W_i: a mean of the L_i would weigh a token by how full its microbatch is.

    Args:
      loss: (params, batch, key) -> (scalar, pairs), the scalar being sum / weight of the pair "loss".
      params: what the gradient is of; `frozen` is what the loss needs beside it.
      batch: arrays whose first axis the microbatches share equally.
    Raises:
      ConfigError: the batch does not divide into the microbatches.
    """
    grad = jax.value_and_grad(
        lambda p, *rest: loss(merge_params(frozen or {}, p), *rest), has_aux=True
    )
    if microbatches == 1:
        (_, pairs), grads = grad(params, batch, key)
        return grads, pairs
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % microbatches:
        raise ConfigError(
            f"a batch of {size} does not divide into {microbatches} microbatches"
        )
    # every microbatch takes rows from all over the batch, so that each device keeps its share of each
    split = jax.tree.map(
        lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total: PyTree, part: tuple) -> tuple[PyTree, Pairs]:
        i, micro = part
        (_, pairs), grads = grad(
            params, micro, None if key is None else jax.random.fold_in(key, i)
        )
        return jax.tree.map(lambda t, g: t + pairs["loss"][1] * g, total, grads), pairs

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, pairs = jax.lax.scan(add, zeros, (jnp.arange(microbatches), split))
    pairs = jax.tree.map(lambda x: x.sum(0), pairs)
    return jax.tree.map(lambda t: t / jnp.maximum(pairs["loss"][1], 1e-9), total), pairs


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    tx: optax.GradientTransformation,
    *,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Pairs]:
    """One optimizer update, with the global norm of the gradients as a metric.

    skip_nonfinite leaves parameters and optimizer as they were when the norm is NaN or infinite, and counts it;
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
            lambda new, old: jnp.where(ok, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = {
            "grad_norm": (jnp.where(ok, norm, 0.0), ok.astype(jnp.float32)),
            "skipped": (1.0 - ok, one),
        }
    return state.replace(params=params, opt_state=opt_state), metrics
