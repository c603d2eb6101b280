"""Optimizers and learning-rate schedules, from a config to an optax transformation."""

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

DECAYED = frozenset(
    {"kernel", "tokens", "positions", "lora_a", "lora_b"}
)  # names of parameters
NOT_DECAYED = frozenset({"scale", "bias"})


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """One optimizer.

    Steps are *updates* of the parameters: not microbatches, not PPO iterations, not examples.
    """

    name: Literal["adamw", "adam", "adamw_tf", "adam_tf", "rmsprop", "sgd"] = "adamw"
    """adam_tf and adamw_tf add epsilon outside of the bias correction, as TensorFlow does; rmsprop
    decays by b2; sgd has momentum b1."""
    learning_rate: NonNegative = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or a decay from the peak to final_fraction."""
    warmup_steps: Count = 0
    """Updates of the linear warm-up from warmup_start to the peak."""
    warmup_start: Share = 0.0
    """Fraction of the peak at the first update; 0 makes it a no-op. InstructGPT: 0.1."""
    final_fraction: Share = 0.0
    """Fraction of the peak at decay_steps and later. GPT-3 and InstructGPT: 0.1."""
    decay_steps: Count = 0
    """Update at which the decay ends; 0: the end of training."""
    b1: ShareBelow1 = 0.9
    """Decay rate of the first moment; of sgd the momentum, 0 for none."""
    b2: ShareBelow1 = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Epsilon, added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay (theta -= lr * weight_decay * theta) of kernels, adapters and embeddings;
    norms, biases and the scalar head have none. Not for adam and adam_tf."""
    clip_norm: NonNegative = 1.0
    """Global norm that a larger gradient is scaled down to; 0: off."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment. The second stays float32: near b2 = 0.999 an update changes it by
    less than bfloat16 resolves."""

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


def kept(config: OptimConfig) -> float:
    """Float32 numbers that the optimizer keeps of a parameter; a moment in bfloat16 is half of one."""
    first = config.name != "rmsprop" and not (config.name == "sgd" and config.b1 == 0)
    second = config.name != "sgd"
    return first * (0.5 if config.moments == "bfloat16" else 1.0) + second


Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """The learning rate of update n = 0, 1, ...: warm-up, then decay to a floor; never negative, however late.

    With w = warmup_steps, e = decay_steps (total_steps where that is 0), f = final_fraction and
    u = clip((n - w) / (e - w), 0, 1):
      n < w:    peak (warmup_start + (1 - warmup_start) n / w)
      constant: peak
      linear:   peak (f + (1 - f) (1 - u))
      cosine:   peak (f + (1 - f) (1 + cos(pi u)) / 2)

    Args:
      config: see `OptimConfig`.
      total_steps: updates in the whole run: iterations * epochs * minibatches for PPO.

    Raises:
      ConfigError: the warm-up is longer than the run (or than decay_steps).

    Source: Brown et al. 2020, appendix B; Ouyang et al. 2022, appendix C.
    """
    warmup = config.warmup_steps
    end = config.decay_steps if config.decay_steps > 0 else total_steps
    if warmup > end:
        raise ConfigError(
            f"optim.warmup_steps: {warmup} is more than the {end} steps until the end of the decay"
        )
    peak, start, floor = (
        config.learning_rate,
        config.warmup_start,
        config.final_fraction,
    )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        u = jnp.clip((step - warmup) / max(end - warmup, 1), 0, 1)
        decay = {"constant": 1.0, "linear": floor + (1 - floor) * (1 - u)}
        decay["cosine"] = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * u))
        warm = start + (1 - start) * step / max(warmup, 1)
        return peak * jnp.where(step < warmup, warm, decay[config.schedule])

    return schedule


class AdamTFState(NamedTuple):
    """State of `scale_by_adam_tf`: updates so far, first and second moments."""

    count: Int[Array, ""]
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam_tf(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 has it: epsilon is added to the *uncorrected* root of the second moment.

      m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
      update = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    optax and PyTorch have m_hat / (sqrt(v_hat) + eps), which is this with eps sqrt(1 - b2^t) for eps: with a large
    epsilon (1e-5) TensorFlow's early updates are the smaller ones.

    Source: Kingma & Ba 2015, end of section 2; "N implementation details", the Adam section.
    """

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AdamTFState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, AdamTFState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """g <- g min(1, limit / ||g||), with the norm over the whole tree.

    One multiplication that XLA fuses into the optimizer's own pass. A norm of 0 is safe; whether it is finite is
    for the caller to check.

    Source: Pascanu et al. 2013, algorithm 1.
    """

    def update(grads, state, params=None):
        del params
        norm = optax.global_norm(grads)
        scale = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def first_moment_in(
    dtype: str, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The same optimizer, its first moment (or momentum) rounded to `dtype` between updates; they are in float32."""

    def kept(state: Any, dtype: Any) -> Any:
        names = {"mu", "trace"} & set(state._fields)
        return state._replace(
            **{name: optax.tree.cast(getattr(state, name), dtype) for name in names}
        )

    def update(grads, state, params=None):
        updates, state = tx.update(grads, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(
        lambda params: kept(tx.init(params), dtype), update
    )


def decayed(params: Any) -> Any:
    """Says of each parameter whether weight decay applies to it.

    It applies to kernels, adapters and embedding tables, not to norms, biases and the scalar head.
    The name decides, never the rank: with `scan_layers` a norm's gain is a matrix, and a query's
    bias [heads, head_dim] is one always.

    Args:
      params: a nested dict of arrays or shapes; a subtree of a model's (adapters, a head) will do.

    Returns:
      The same tree with a bool in place of each array.

    Raises:
      ValueError: a parameter whose name is in neither DECAYED nor NOT_DECAYED.
    """
    paths = {_keys(path) for path, _ in jax.tree.leaves_with_path(params)}

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        *parents, name = _keys(path)
        if name not in DECAYED | NOT_DECAYED:
            where = "/".join(_keys(path))
            raise ValueError(f"parameter {where}: optim.decayed does not know its name")
        # A language model's head is a kernel alone; one with a bias is a scalar head.
        scalar_head = parents[-1:] == ["head"] and (*parents, "bias") in paths
        return name in DECAYED and not scalar_head

    return jax.tree.map_with_path(decays, params)


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path through nested dicts."""
    return tuple(str(getattr(entry, "key", entry)) for entry in path)


def make_optimizer(
    config: OptimConfig, total_steps: int
) -> optax.GradientTransformation:
    """clip -> moments -> decoupled decay -> -learning rate.

    Element-wise but for the norm, so that it runs under jit on parameters sharded in any way; its moments have the
    parameters' tree and shapes, and are to be sharded like them.

    Args:
      config: see `OptimConfig`.
      total_steps: updates in the whole run, see `make_schedule`.

    Raises:
      ConfigError: see `make_schedule`.
    """
    moments = {
        "adam": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "adam_tf": lambda: scale_by_adam_tf(config.b1, config.b2, config.eps),
        "rmsprop": lambda: optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False),
        "sgd": lambda: optax.trace(config.b1) if config.b1 else optax.identity(),
    }
    chain = [moments[config.name.replace("adamw", "adam")]()]
    if config.moments != "float32":
        chain = [first_moment_in(config.moments, chain[0])]
    if config.clip_norm:
        chain.insert(0, clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(
        *chain, optax.scale_by_learning_rate(make_schedule(config, total_steps))
    )
