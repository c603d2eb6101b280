"""The world of `benchmarks.optimum` for tests of policy stages.

What a setting compiles is kept and used again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import optimum
from rlhfjax.models.config import TransformerConfig
from rlhfjax.rl import rollout

_STARTED: dict[str, tuple[Any, Any, Any]] = {}  # by config and model_config

response_logprobs = jax.jit(
    rollout.response_logprobs, static_argnames=("model", "r", "temperature")
)


def begin(
    config: Any, shape: TransformerConfig = optimum.SHAPE
) -> tuple[Any, Any, Any]:
    """(algorithm, state, reference): the algorithm is one for all calls with a config, the state is
    a new copy.
    """
    key = repr((config, shape))
    if key not in _STARTED:
        _STARTED[key] = optimum.start(config, shape)
    algorithm, state, reference = _STARTED[key]
    return algorithm, jax.tree.map(jnp.array, state), reference


def with_loss(patch: Any, module: Any, loss: Any) -> None:
    """Has the updates of a stage's module take the gradients of another loss, with the same beta.

    Args:
      loss: (params, batch, key, beta) -> (scalar, metrics).
    """
    minibatch_epochs = module.minibatch_epochs

    def epochs(learner: Any, *args: Any) -> Any:
        other = functools.partial(loss, **learner.loss.keywords)
        return minibatch_epochs(learner._replace(loss=other), *args)

    patch.setattr(module, "minibatch_epochs", epochs)


def moved(params: Any, size: float = 0.3, seed: int = 11) -> Any:
    """Parameters some way from others."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        x + size * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)
