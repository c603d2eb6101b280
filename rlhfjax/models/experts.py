"""A mixture of experts in place of the MLP: routing, the products, and what is measured of it.

The router gives each token its k = experts_per_token most probable experts, of equal ones those of
the lower index. No token is dropped: pairs of token and expert are sorted by expert, and
jax.lax.ragged_dot multiplies each group by its own matrix.

Over a mesh axis `expert` every device has some of the experts and computes their pairs for all
tokens of its share of the batch; the outputs are summed over the axis. No expert's weights are sent
along it.

Sources: Shazeer et al. 2017 (sparsely gated experts); Fedus et al. 2022 (the balancing loss).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.mesh import disjoint, per_device
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.parts import GATES, parameter, residual_std
from rlhfjax.types import Loss, Metrics

ROUTING = "routing"  # the linen collection that `Experts` writes its routing to


class Routing(NamedTuple):
    """How the tokens of a batch were routed, in each of l layers; padding does not count."""

    load: Float[
        Array, "*l e"
    ]  # f: share of the tokens that chose the expert; the sum is k
    probability: Float[Array, "*l e"]  # P: mean probability of the expert; the sum is 1


class Kernel(nn.Module):
    """The kernel of a projection, alone."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float

    @nn.compact
    def __call__(self):
        return parameter(self, "kernel", self.std, self.shape, self.axes)


class Experts(nn.Module):
    """sum_i p_i E_i(x) over the k experts i of highest p = softmax(x W_router), in float32.

    E_i is a gated MLP of width d_ff without biases; with normalize_routing the k chosen
    probabilities are divided by their sum.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config
        e, d, f = c.n_experts, c.d_model, c.d_ff
        std = float(c.init_std)
        router = Kernel((d, e), ("embed", "router"), std, name="router")()
        logits = jnp.einsum(
            "btd,de->bte", x.astype(jnp.float32), router, precision="highest"
        )
        probability = jax.nn.softmax(logits)
        chosen = most_probable(jax.lax.stop_gradient(probability), c.experts_per_token)
        is_chosen = jax.nn.one_hot(chosen, e)
        self.sow(ROUTING, "probability", probability)
        self.sow(ROUTING, "is_chosen", is_chosen)
        weights = jnp.einsum("bte,btke->btk", probability, is_chosen)
        if c.normalize_routing:
            weights = weights / weights.sum(-1, keepdims=True)
        inputs = {"shape": (e, d, f), "axes": ("expert", "embed", "mlp"), "std": std}
        outputs = {"shape": (e, f, d), "axes": ("expert", "mlp", "embed")}
        kernels = (
            Kernel(**inputs, name="gate")(),
            Kernel(**inputs, name="up")(),
            Kernel(**outputs, std=residual_std(c), name="down")(),
        )
        return mixture(c, x, weights, chosen, kernels)


def most_probable(probability: Float[Array, "b t e"], k: int) -> Int[Array, "b t k"]:
    """Returns the k most probable experts of each token, of equal ones those of lower index.

    Each device sorts its own tokens; XLA would gather them first.
    """
    rows = _rows(probability)
    choose = per_device(lambda p: jax.lax.top_k(p, k)[1], (rows,), rows)
    return choose(probability)


def _rows(x: Float[Array, "b t _"]) -> tuple[str | None, ...]:
    """Returns the axis names of an array of tokens, as `mesh.constrain` would shard it."""
    batch, time, _ = x.shape
    return ("batch" if batch > 1 else None, "time" if time > 1 else None, None)


def mixture(
    c: TransformerConfig,
    x: Float[Array, "b t d"],
    weights: Float[Array, "b t k"],
    chosen: Int[Array, "b t k"],
    kernels: Sequence[Float[Array, "e _ _"]],
) -> Float[Array, "b t d"]:
    """Returns the sum of the chosen experts' outputs, times their weights.

    Args:
      kernels: gate and up [e, d, f], down [e, f, d].
    """
    rules = disjoint("batch", "time", "expert", "mlp")
    summed = rules["expert"] + rules["mlp"]

    def compute(x, weights, chosen, *kernels):
        if rules["expert"]:
            first = jax.lax.axis_index(rules["expert"]) * kernels[0].shape[0]
            chosen = (chosen - first) % c.n_experts  # this device's experts come first
        tokens = (-1, x.shape[-1]), (-1, chosen.shape[-1])
        y = _of_tokens(
            c,
            x.reshape(tokens[0]),
            weights.reshape(tokens[1]),
            chosen.reshape(tokens[1]),
            kernels,
        )
        y = y.reshape(x.shape)
        return jax.lax.psum(y, summed) if summed else y

    rows = _rows(x)
    inputs, outputs = ("expert", None, "mlp"), ("expert", "mlp", None)
    arguments = (rows, rows, rows, inputs, inputs, outputs)
    kernels = [kernel.astype(x.dtype) for kernel in kernels]
    return per_device(compute, arguments, rows, rules)(x, weights, chosen, *kernels)


def _of_tokens(
    c: TransformerConfig,
    x: Float[Array, "n d"],
    weights: Float[Array, "n k"],
    chosen: Int[Array, "n k"],
    kernels: Sequence[Float[Array, "e _ _"]],
) -> Float[Array, "n d"]:
    """Returns the weighted sum over those chosen experts that the kernels are of, the first e."""
    gate, up, down = kernels
    k = chosen.shape[1]
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert)  # stable
    is_group = expert[:, None] == jnp.arange(gate.shape[0])
    sizes = is_group.sum(0, dtype=jnp.int32)
    # Rows after the last group belong to other devices' experts; kernels may leave them undefined.
    own = (jnp.arange(expert.size) < sizes.sum())[:, None]
    rows = jnp.where(own, x[order // k], 0)
    hidden = GATES[c.mlp](jax.lax.ragged_dot(rows, gate, sizes))
    hidden = hidden * jax.lax.ragged_dot(rows, up, sizes)
    y = jnp.where(own, jax.lax.ragged_dot(hidden, down, sizes), 0)
    y = y[jnp.argsort(order)].reshape(-1, k, x.shape[1])
    return jnp.einsum("nkd,nk->nd", y.astype(jnp.float32), weights).astype(x.dtype)


# ------------------------------------------------------------------ routing


def routing_of(sown: Any, mask: Int[Array, "b t"]) -> Routing:
    """Returns how the real tokens were routed in one layer.

    Args:
      sown: what `Experts` wrote to the collection ROUTING.
      mask: above 0 on real tokens.
    """
    (probability,), (is_chosen,) = sown["probability"], sown["is_chosen"]
    real = (mask > 0).astype(jnp.float32)
    weight = real / jnp.maximum(real.sum(), 1.0)
    return Routing(
        load=jnp.einsum("bt,btke->e", weight, is_chosen),
        probability=jnp.einsum("bt,bte->e", weight, probability),
    )


def balance(routing: Routing) -> Float[Array, ""]:
    """Returns the load-balancing loss e sum_i f_i P_i, the mean over layers.

    f_i is the share of the tokens that chose expert i, which has no gradient, and P_i its mean
    probability. Even routing has the value k = experts_per_token; if all tokens choose the same
    expert with probability 1, it is the number of experts e.

    Source: Fedus et al. 2022, eqs. 4 to 6, for k = 1. For k > 1 f counts every chosen expert, as
    in transformers' load_balancing_loss_func, which takes f and P over all layers together.
    """
    e = routing.load.shape[-1]
    return e * (routing.load * routing.probability).sum(-1).mean()


def routing_metrics(routing: Routing) -> Metrics:
    """Returns metrics of the routing, each the mean over layers.

    router_balance: `balance`, k if the routing is even.
    router_most_loaded: how many times its even share of the pairs the most loaded expert has.
    router_entropy: entropy of the mean probabilities, nats; ln(e) if they are even.
    """
    e = routing.load.shape[-1]
    share = routing.load / jnp.maximum(routing.load.sum(-1, keepdims=True), 1e-9)
    values = {
        "router_balance": balance(routing),
        "router_most_loaded": e * share.max(-1).mean(),
        "router_entropy": jax.scipy.special.entr(routing.probability).sum(-1).mean(),
    }
    one = jnp.ones(())
    return {name: (value, one) for name, value in values.items()}


def add_balance(
    c: TransformerConfig, loss: Loss, routing: Routing | None, prefix: str = ""
) -> Loss:
    """Returns a loss plus router_loss x `balance`, and its metrics with those of the routing.

    Without experts (no routing) it is the loss itself.

    Args:
      prefix: of the names of the routing's metrics.
    """
    if routing is None:
        return loss
    scalar, metrics = loss
    added = c.router_loss * balance(routing)
    total, weight = metrics["loss"]
    stopped = jax.tree.map(jax.lax.stop_gradient, routing_metrics(routing))
    named = {prefix + name: metric for name, metric in stopped.items()}
    return scalar + added, {
        **metrics,
        "loss": (total + added * weight, weight),
        **named,
    }
