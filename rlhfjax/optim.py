"""Builds optimizers and learning-rate schedules (optax) from a config."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from rlhfjax.errors import ConfigError
from rlhfjax.ranges import Count, NonNegative, Positive, Share, ShareBelow1
from rlhfjax.types import PyTree

# Names of parameters that weight decay applies to, and of those it does not.
DECAYED = frozenset({"kernel", "tokens", "positions", "lora_a", "lora_b"})
NOT_DECAYED = frozenset({"scale", "bias"})


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """One optimizer. Steps are *updates* of the parameters: not microsteps, not PPO iterations, not examples.

    Attributes:
      name: adamw, adam; adamw_tf, adam_tf (epsilon outside of the bias correction, as TensorFlow has it); rmsprop
        (decay b2); sgd (momentum b1, 0 for none). Only the two with a w, rmsprop and sgd take weight decay.
      learning_rate: the peak.
      schedule: after the warm-up: constant; linear or cosine from the peak to final_fraction of it.
      warmup_steps: of a linear warm-up from warmup_start of the peak.
      warmup_start: fraction of the peak at the first update; 0 makes the first update a no-op. InstructGPT: 0.1.
      final_fraction: of the peak, reached at decay_steps and kept after it. GPT-3 and InstructGPT: 0.1.
      decay_steps: the update at which the decay ends; 0 is the end of training.
      b1, b2, eps: of the moments.
      weight_decay: decoupled (theta -= lr * weight_decay * theta), of kernels, adapters and
        embedding tables; norms, biases and the scalar head have none (see `decayed`).
      moments: float32 or bfloat16, of the first moment (or momentum); the second stays float32, for near b2 = 0.999
        an update changes it by less than bfloat16 can tell apart.
      clip_norm: the gradient is scaled down to this global norm; 0 is off.
    """

    name: Literal["adamw", "adam", "adamw_tf", "adam_tf", "rmsprop", "sgd"] = "adamw"
    learning_rate: NonNegative = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Count = 0
    warmup_start: Share = 0.0
    final_fraction: Share = 0.0
    decay_steps: Count = 0
    b1: ShareBelow1 = 0.9
    b2: ShareBelow1 = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.moments != "float32" and (
            self.name == "rmsprop" or (self.name == "sgd" and not self.b1)
        ):
            raise ConfigError(
                f"optim.moments: {self.name} with b1={self.b1} has no first moment"
            )
        if self.weight_decay and self.name in ("adam", "adam_tf"):
            raise ConfigError(
                f"optim.weight_decay: {self.name} has none; use {self.name.replace('m', 'mw', 1)}"
            )


def moments_per_parameter(config: OptimConfig) -> float:
    """Returns the float32 numbers that the optimizer keeps per parameter; bfloat16 counts half."""
    has_first = config.name != "rmsprop" and not (
        config.name == "sgd" and not config.b1
    )
    has_second = config.name != "sgd"
    first_size = 0.5 if config.moments == "bfloat16" else 1.0
    return has_first * first_size + has_second


Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Returns the learning rate as a function of the update n = 0, 1, ...; it is never negative.

    With w = warmup_steps, e = decay_steps (total_steps if that is 0), f = final_fraction and
    u = clip((n - w) / (e - w), 0, 1):
      n < w:    peak (warmup_start + (1 - warmup_start) n / w)
      constant: peak
      linear:   peak (f + (1 - f) (1 - u))
      cosine:   peak (f + (1 - f) (1 + cos(pi u)) / 2)

    Args:
      config: the optimizer's config.
      total_steps: updates in the whole run: iterations * epochs * minibatches for PPO.

    Raises:
      ConfigError: the warm-up is longer than the run or than decay_steps.

    Source: Brown et al. 2020, appendix B; Ouyang et al. 2022, appendix C.
    """
    warmup = config.warmup_steps
    end = config.decay_steps if config.decay_steps > 0 else total_steps
    if warmup > end:
        raise ConfigError(
            f"optim.warmup_steps: {warmup} is more than the {end} steps until the end of the decay"
        )
    peak = config.learning_rate
    start = config.warmup_start
    floor = config.final_fraction

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        u = jnp.clip((step - warmup) / max(end - warmup, 1), 0, 1)
        decay = {"constant": 1.0, "linear": floor + (1 - floor) * (1 - u)}
        decay["cosine"] = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * u))
        warm = start + (1 - start) * step / max(warmup, 1)
        return peak * jnp.where(step < warmup, warm, decay[config.schedule])

    return schedule


class AdamTFState(NamedTuple):
    """The state of `scale_by_adam_tf`."""

    count: Int[Array, ""]  # updates so far
    mu: optax.Updates  # first moments
    nu: optax.Updates  # second moments


def scale_by_adam_tf(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam as in TensorFlow 1: epsilon is added to the *uncorrected* second moment's root.

      m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
      update = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    optax and PyTorch compute m_hat / (sqrt(v_hat) + eps), which equals this with eps replaced by
    eps sqrt(1 - b2^t). With a large epsilon (1e-5) TensorFlow's early updates are smaller.

    Source: Kingma & Ba 2015, end of section 2; "N implementation details", the Adam section.
    """

    def init(params: optax.Params) -> AdamTFState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(jnp.zeros_like, params)
        return AdamTFState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, AdamTFState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns a transformation g <- g min(1, limit / ||g||), with the norm over the whole tree.

    It is one multiplication, which XLA fuses into the optimizer's own pass. A norm of 0 is safe.
    The caller has to check that the norm is finite.

    Source: Pascanu et al. 2013, algorithm 1.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = optax.global_norm(updates)
        scale = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def first_moment_in(
    dtype: str, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns an optimizer that stores its first moment (or momentum) in `dtype`.

    The moment is cast to float32 for each update and back after it.
    """

    def cast_moment(state: Any, dtype: Any) -> Any:
        names = {"mu", "trace"} & set(state._fields)
        cast = {name: optax.tree.cast(getattr(state, name), dtype) for name in names}
        return state._replace(**cast)

    def init(params: optax.Params) -> Any:
        return cast_moment(tx.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = cast_moment(state, jnp.float32)
        updates, state = tx.update(updates, state, params)
        return updates, cast_moment(state, dtype)

    return optax.GradientTransformation(init, update)


def decayed(params: PyTree) -> PyTree:
    """Returns the tree of parameters with True for each that weight decay applies to, else False.

    Kernels, adapters and embedding tables decay; norms, biases and the scalar head do not. The name
    decides, never the rank: with `scan_layers` a norm's gain is a matrix, and the bias of a query
    is [heads, head_dim] anyway.

    Args:
      params: a nested dict of arrays or shapes: a model's parameters, or a subtree of them.

    Raises:
      ValueError: the name of a parameter is in neither DECAYED nor NOT_DECAYED.
    """
    paths = {_keys(path) for path, _ in jax.tree.leaves_with_path(params)}

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        *parents, name = _keys(path)
        if name not in DECAYED | NOT_DECAYED:
            where = "/".join(_keys(path))
            raise ValueError(f"parameter {where}: optim.decayed does not know its name")
        # The head of a language model is a kernel without a bias; that of a scalar head has one.
        scalar_head = parents[-1:] == ["head"] and (*parents, "bias") in paths
        return name in DECAYED and not scalar_head

    return jax.tree.map_with_path(decays, params)


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the keys of a path through nested dicts."""
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


def make_optimizer(
    config: OptimConfig, total_steps: int
) -> optax.GradientTransformation:
    """Returns the chain: clip, moments, decoupled weight decay, times minus the learning rate.

    All but the norm is element-wise, so that it runs under jit on parameters with any sharding. Its
    moments have the tree and the shapes of the parameters, and should be sharded like them.

    Args:
      config: the optimizer's config.
      total_steps: updates in the whole run, see `make_schedule`.

    Raises:
      ConfigError: see `make_schedule`.
    """
    b1, b2, eps = config.b1, config.b2, config.eps
    name = config.name.replace("adamw", "adam")
    if name == "adam":
        moments = optax.scale_by_adam(b1, b2, eps)
    elif name == "adam_tf":
        moments = scale_by_adam_tf(b1, b2, eps)
    elif name == "rmsprop":
        moments = optax.scale_by_rms(b2, eps, eps_in_sqrt=False)
    else:
        moments = optax.trace(b1) if b1 else optax.identity()
    if config.moments != "float32":
        moments = first_moment_in(config.moments, moments)
    chain = [moments]
    if config.clip_norm:
        chain.insert(0, clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    learning_rate: Any = make_schedule(config, total_steps)
    return optax.chain(*chain, optax.scale_by_learning_rate(learning_rate))
