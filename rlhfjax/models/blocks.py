"""The linen modules: one Transformer layer, the embedding and the heads, each parameter with its logical axis names.

Nothing outside rlhfjax/models sees them: `rlhfjax.models.transformer.Model` is the face.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rlhfjax.mesh import constrain
from rlhfjax.models import quantized
from rlhfjax.models.attention import dropout, rotate
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.linear import linear
from rlhfjax.models.lora import NAMES, LoraConfig

RESIDUAL = ("batch", "time", "embed")
GELU = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
}


class Named(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter at birth with the logical names of its axes; linen's own boxes would constrain it to mesh axes."""

    value: Any
    names: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        raise NotImplementedError("layers are stacked by Model.init")

    remove_axis = add_axis


def _parameter(module, name, std, shape, axes):
    """A float32 normal(std) parameter, or a constant where `std` is an initializer; `axes` name its dimensions."""
    make = nn.initializers.normal(std) if isinstance(std, float) else std
    return module.param(
        name, lambda *args: Named(make(*args), axes), shape, jnp.float32
    )


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 3), in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        wide = x.astype(jnp.float32)
        scale = _parameter(
            self, "scale", nn.initializers.ones, (x.shape[-1],), ("embed",)
        )
        if self.config.norm == "rmsnorm":
            size = jnp.square(wide).mean(-1, keepdims=True)
            return (wide * jax.lax.rsqrt(size + self.config.norm_eps) * scale).astype(
                x.dtype
            )
        bias = _parameter(
            self, "bias", nn.initializers.zeros, (x.shape[-1],), ("embed",)
        )
        wide = wide - wide.mean(-1, keepdims=True)
        size = jnp.square(wide).mean(-1, keepdims=True)
        return (
            wide * jax.lax.rsqrt(size + self.config.norm_eps) * scale + bias
        ).astype(x.dtype)


def everything(x):
    """All slots of [b, t, ...]."""
    return x


class Project(nn.Module):
    """x . kernel + bias in x's dtype, over the last `inputs` axes of x; plus its adapters' part where it has them."""

    shape: tuple[int, ...]  # of the kernel: input axes, then output axes
    axes: tuple[str, ...]
    std: float
    bias: bool
    inputs: int = 1  # how many of the kernel's axes are contracted
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x):
        n = self.inputs
        out_shape, out_axes = self.shape[n:], self.axes[n:]
        kernel = _parameter(self, "kernel", self.std, self.shape, self.axes)
        flat = kernel.reshape(math.prod(self.shape[:n]), math.prod(out_shape))
        x = x.reshape(*x.shape[:2], flat.shape[0])
        if jnp.issubdtype(kernel.dtype, jnp.integer):
            scale = self.get_variable("params", "kernel" + quantized.SCALE)
            y = quantized.linear(
                x,
                flat,
                scale.reshape(
                    *scale.shape[: scale.ndim - len(out_shape)], flat.shape[1]
                ),
            )
        else:
            y = linear(x, flat.astype(x.dtype))
        if self.lora.rank and (
            self.is_initializing() or self.has_variable("params", NAMES[0])
        ):
            y = y + self._low_rank(x)
        y = y.reshape(*x.shape[:2], *out_shape)
        if not self.bias:
            return y
        return y + _parameter(
            self, "bias", nn.initializers.zeros, out_shape, out_axes
        ).astype(x.dtype)

    def _low_rank(self, x):
        """(alpha / r) (x A) B, x first dropped out; A ~ U(-1/sqrt(in), 1/sqrt(in)) as in loralib, and B = 0."""
        c, n = self.lora, self.inputs
        width = x.shape[-1]
        uniform = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=range(n), out_axis=n
        )
        a = _parameter(
            self, NAMES[0], uniform, (*self.shape[:n], c.rank), (*self.axes[:n], None)
        )
        b = _parameter(
            self,
            NAMES[1],
            nn.initializers.zeros,
            (c.rank, *self.shape[n:]),
            (None, *self.axes[n:]),
        )
        x = dropout(
            x, c.dropout, self.make_rng("lora") if self.has_rng("lora") else None
        )
        inner = linear(x, a.astype(x.dtype).reshape(width, c.rank)) * c.scale
        return linear(inner, b.astype(x.dtype).reshape(c.rank, -1))


class Attention(nn.Module):
    """Multi-head (or grouped-query) attention; `attend(q, k, v)` gives the output and may keep a cache.

    `pick` chooses the slots that ask (all of them by default); every slot can be asked.
    """

    config: TransformerConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x, rope, attend: Callable, pick: Callable = everything):
        c = self.config

        def project(name, x, heads, axis, rope, time=None):
            shape, axes = (c.d_model, heads, c.head_dim), ("embed", axis, "head_dim")
            bias = c.bias or c.qkv_bias
            y = Project(
                shape, axes, float(c.init_std), bias, lora=self.lora, name=name
            )(x).swapaxes(1, 2)
            y = y if rope is None else rotate(y, rope)
            return constrain(y, ("batch", axis, time, "head_dim"))

        # Devices that share a sequence have their own queries and all keys and values: gathered once, here.
        q = project(
            "query", pick(x), c.n_heads, "heads", jax.tree.map(pick, rope), time="time"
        )
        k = project("key", x, c.kv_heads, "kv_heads", rope)
        v = project("value", x, c.kv_heads, "kv_heads", None)
        shape, axes = (c.n_heads, c.head_dim, c.d_model), ("heads", "head_dim", "embed")
        out = Project(
            shape, axes, residual_std(c), c.bias, inputs=2, lora=self.lora, name="out"
        )
        return out(attend(q, k, v).swapaxes(1, 2))


class MLP(nn.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down (Shazeer 2020, eq. 6), or gelu(x W_up) W_down.

    gelu(x) = x Phi(x), or its tanh form (Hendrycks & Gimpel 2016, section 2).
    """

    config: TransformerConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x):
        c = self.config

        def project(name, shape, axes, std):
            return Project(shape, axes, std, c.bias, lora=self.lora, name=name)

        def grow(name):
            return project(
                name, (c.d_model, c.d_ff), ("embed", "mlp"), float(c.init_std)
            )(x)

        y = (
            nn.silu(grow("gate")) * grow("up")
            if c.mlp == "swiglu"
            else GELU[c.mlp](grow("up"))
        )
        y = constrain(y, ("batch", "time", "mlp"))
        return project("down", (c.d_ff, c.d_model), ("mlp", "embed"), residual_std(c))(
            y
        )


class Block(nn.Module):
    """One layer at the slots that `pick` chooses; TransformerConfig has the equations of its three forms."""

    config: TransformerConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self, x, rope, attend: Callable, key=None, pick: Callable = everything
    ):
        c = self.config
        keys = (None, None) if key is None else jax.random.split(key)
        norm_1, norm_2 = Norm(c, name="norm_1"), Norm(c, name="norm_2")

        def attention(x):
            return dropout(
                Attention(c, self.lora, name="attention")(x, rope, attend, pick),
                c.dropout,
                keys[0],
            )

        def mlp(x):
            return dropout(MLP(c, self.lora, name="mlp")(x), c.dropout, keys[1])

        if c.residual == "parallel":
            return constrain(
                pick(x) + attention(norm_1(x)) + mlp(norm_2(pick(x))), RESIDUAL
            )
        if c.residual == "post_norm":
            x = constrain(norm_1(pick(x) + attention(x)), RESIDUAL)
            return constrain(norm_2(x + mlp(x)), RESIDUAL)
        x = constrain(pick(x) + attention(norm_1(x)), RESIDUAL)
        return constrain(x + mlp(norm_2(x)), RESIDUAL)


class Embed(nn.Module):
    """Token embedding, plus a learned position embedding where the config asks for one."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, tokens, positions):
        c = self.config
        std = float(c.init_std)
        table = _parameter(
            self, "tokens", std, (c.vocab_size, c.d_model), ("vocab", "embed")
        )
        # Rows are looked up in a table whose width is whole: left to itself the partitioner makes every device look up
        # its columns of the whole batch.
        rows = ("vocab", None)
        if table.dtype == jnp.int8:
            scale = _parameter(
                self,
                "tokens" + quantized.SCALE,
                nn.initializers.ones,
                (c.vocab_size,),
                ("vocab",),
            )
            rows = [
                jnp.take(x, tokens, axis=0, mode="clip")
                for x in (table, scale[:, None])
            ]
            x = (rows[0].astype(jnp.float32) * rows[1]).astype(c.dtype)
        else:
            x = jnp.take(
                constrain(table.astype(c.dtype), rows), tokens, axis=0, mode="clip"
            )
        if c.positions == "learned":
            places = _parameter(
                self,
                "positions",
                std,
                (c.max_length, c.d_model),
                ("positions", "embed"),
            )
            x = x + jnp.take(
                constrain(places.astype(c.dtype), (None, None)),
                positions,
                axis=0,
                mode="clip",
            )
        return x


class Unembed(nn.Module):
    """The untied output matrix [d, v]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self):
        c = self.config
        return _parameter(
            self,
            "kernel",
            float(c.init_std),
            (c.d_model, c.vocab_size),
            ("embed", "vocab"),
        )


class ScalarHead(nn.Module):
    """hidden . kernel + bias; kernel ~ N(0, 1/sqrt(d + 1)) (Ziegler et al. 2019; Stiennon et al. 2020, App. B.1)."""

    width: int

    @nn.compact
    def __call__(self):
        kernel = _parameter(
            self, "kernel", (self.width + 1) ** -0.5, (self.width,), ("embed",)
        )
        return kernel, _parameter(self, "bias", nn.initializers.zeros, (), ())


def residual_std(config: TransformerConfig) -> float:
    """Init std of the projections that write into the residual stream (GPT-2: / sqrt(number of such layers))."""
    scale = (2 * config.n_layers) ** -0.5 if config.scale_residual_init else 1.0
    return float(config.init_std * scale)
