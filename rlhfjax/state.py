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
from rlhfjax.types import Metrics, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "extra"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes and that a checkpoint holds."""

    step: Any
    """Number of finished calls of the stage's step: an int32 scalar, or its shape."""
    params: PyTree
    """The trained parameters of each model."""
    opt_state: PyTree
    """The state of the optax optimizer."""
    extra: PyTree = dataclasses.field(default_factory=dict)
    """What else a stage carries from step to step (KL coefficient, EMA weights, counters)."""

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

    What is absent in `pretrained` stays fresh. `pretrained` may be on another mesh.
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
    """Returns the shardings of a whole state, given the logical axes of its parameters.

    Optimizer moments and EMA weights are sharded like the parameter whose path theirs ends with.

    Args:
      state: TrainState of arrays or ShapeDtypeStructs.
      axes: the parameters' tree with a tuple of logical axis names in place of each array.
    Raises:
      ConfigError: an array of two or more dimensions matches no parameter in `axes`.
    """
    axes_with_path = jax.tree.leaves_with_path(
        axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    names_by_path = {tuple(map(str, path)): names for path, names in axes_with_path}

    def sharding_of(path: tuple, leaf: Any) -> NamedSharding:
        path = tuple(map(str, path))
        for start in range(len(path)):
            names = names_by_path.get(path[start:])
            if names is not None and len(names) == leaf.ndim:
                return NamedSharding(layout.mesh, layout.spec(names, leaf.shape))
        if leaf.ndim >= 2:
            raise ConfigError(
                f"array {'/'.join(path)} of shape {leaf.shape} has no logical axis names"
            )
        return layout.replicated

    return jax.tree.map_with_path(sharding_of, state)


def abstract(shapes: PyTree, axes: PyTree, layout: Layout) -> PyTree:
    """Returns ShapeDtypeStructs with shardings, into which a checkpoint is restored."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(shapes, axes, layout),
    )


def create_sharded(
    init: Callable[[jax.Array], PyTree], key: jax.Array, axes: PyTree, layout: Layout
) -> PyTree:
    """Returns `init(key)`, computed in shards, so that no device ever holds a whole array."""
    out_shardings = shardings(jax.eval_shape(init, key), axes, layout)
    return jax.jit(init, out_shardings=out_shardings)(key)


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether no number in a tree is NaN or infinite, a bool scalar."""
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
) -> tuple[PyTree, Metrics]:
    """Returns the gradients of a loss over a batch, and the loss's metrics.

    The gradients do not depend on the number of microbatches. With L_i = S_i / W_i the mean loss of
    microbatch i, where the metric "loss" is (S_i, W_i), the gradient of the batch is
    sum_i W_i grad(L_i) / sum_i W_i. A plain mean of the grad(L_i) would weigh a token by how full
    its microbatch is.

    Args:
      loss: (params, batch, key) -> (scalar, metrics); the scalar is sum / weight of "loss".
      params: the trained parameters.
      batch: arrays whose first axis is divided among the microbatches.
      frozen: parameters that the loss needs and that are not trained.
    Raises:
      ConfigError: the batch does not divide into the microbatches.
    """

    def loss_of_merged(trained: PyTree, *args: Any) -> Any:
        return loss(merge_params(frozen or {}, trained), *args)

    loss_and_grad = jax.value_and_grad(loss_of_merged, has_aux=True)
    if microbatches == 1:
        (_, metrics), grads = loss_and_grad(params, batch, key)
        return grads, metrics
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % microbatches:
        raise ConfigError(
            f"a batch of {size} does not divide into {microbatches} microbatches"
        )
    # A microbatch takes rows from all over the batch: each device keeps its share of every one.
    split = jax.tree.map(
        lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def accumulate(total: PyTree, part: tuple) -> tuple[PyTree, Metrics]:
        i, microbatch = part
        micro_key = None if key is None else jax.random.fold_in(key, i)
        (_, metrics), grads = loss_and_grad(params, microbatch, micro_key)
        weight = metrics["loss"][1]
        return jax.tree.map(lambda t, g: t + weight * g, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, metrics = jax.lax.scan(accumulate, zeros, (jnp.arange(microbatches), split))
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    weight = metrics["loss"][1]
    grads = jax.tree.map(lambda t: t / jnp.maximum(weight, 1e-9), total)
    return grads, metrics


def apply_gradients(
    state: TrainState,
    grads: PyTree,
    tx: optax.GradientTransformation,
    *,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Metrics]:
    """Updates the parameters once; the global norm of the gradients is a metric.

    Args:
      skip_nonfinite: if the norm is NaN or infinite, leave parameters and optimizer as they were
        and count it in the metric "skipped". Without it the loop stops at the reported norm.
    """
    norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    one = jnp.ones(())
    metrics = {"grad_norm": (norm, one)}
    if skip_nonfinite:
        is_finite = jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        counted_norm = jnp.where(is_finite, norm, 0.0)
        metrics = {
            "grad_norm": (counted_norm, is_finite.astype(jnp.float32)),
            "skipped": (1.0 - is_finite, one),
        }
    return state.replace(params=params, opt_state=opt_state), metrics
