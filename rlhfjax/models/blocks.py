"""The linen modules: one Transformer layer, the embedding and the heads.

Each parameter carries the logical names of its axes. Only rlhfjax/models uses these modules; other
code calls `rlhfjax.models.transformer.Model`.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.mesh import constrain
from rlhfjax.models import quantized
from rlhfjax.models.attention import dropout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import Experts
from rlhfjax.models.linear import linear
from rlhfjax.models.lora import NAMES, LoraConfig
from rlhfjax.models.parts import GATES, GELU, parameter, residual_std
from rlhfjax.models.rope import RopeTables, rotate

RESIDUAL = ("batch", "time", "embed")


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 3), in float32.

    The last dimensions, which `axes` names, are normalized together.
    """

    config: TransformerConfig
    axes: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x):
        c, eps = self.config, self.config.norm_eps
        shape, normalized = x.shape[-len(self.axes) :], tuple(range(-len(self.axes), 0))
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        scale = parameter(self, "scale", init, shape, self.axes)
        if c.norm_plus_one:
            scale = 1 + scale
        wide = x.astype(jnp.float32)
        if c.norm == "rmsnorm":
            size = jnp.square(wide).mean(normalized, keepdims=True)
            out = wide * jax.lax.rsqrt(size + eps) * scale
            return out.astype(x.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, self.axes)
        wide = wide - wide.mean(normalized, keepdims=True)
        size = jnp.square(wide).mean(normalized, keepdims=True)
        out = wide * jax.lax.rsqrt(size + eps) * scale + bias
        return out.astype(x.dtype)


def all_positions(x):
    """Returns x [b, t, ...] itself."""
    return x


class Project(nn.Module):
    """Computes x . kernel + bias in x's dtype, plus the output of its adapters if it has them.

    The product contracts the last `inputs` axes of x with the first `inputs` axes of the kernel.
    """

    shape: tuple[int, ...]  # of the kernel: input axes, then output axes
    axes: tuple[str, ...]
    std: float
    bias: bool
    inputs: int = 1
    lora: LoraConfig = LoraConfig()
    dtype: str | None = None  # of the inputs of the product; None: that of x

    @nn.compact
    def __call__(self, x):
        n = self.inputs
        out_shape, out_axes = self.shape[n:], self.axes[n:]
        kernel = parameter(self, "kernel", self.std, self.shape, self.axes)
        flat = kernel.reshape(math.prod(self.shape[:n]), math.prod(out_shape))
        x = x.reshape(*x.shape[:2], flat.shape[0])
        if jnp.issubdtype(kernel.dtype, jnp.integer):
            scale = self.get_variable("params", "kernel" + quantized.SCALE)
            input_shape = scale.shape[: scale.ndim - len(out_shape)]
            scale = scale.reshape(*input_shape, flat.shape[1])
            y = quantized.linear(x, flat, scale, self.dtype)
        else:
            y = linear(x, flat, self.dtype)
        if self._has_adapters():
            y = y + self._low_rank(x)
        y = y.reshape(*x.shape[:2], *out_shape)
        if not self.bias:
            return y
        bias = parameter(self, "bias", nn.initializers.zeros, out_shape, out_axes)
        return y + bias.astype(x.dtype)

    def _has_adapters(self):
        if not self.lora.rank:
            return False
        return self.is_initializing() or self.has_variable("params", NAMES[0])

    def _low_rank(self, x):
        """Returns (alpha / r) (x A) B, with dropout on x.

        A ~ U(-1/sqrt(in), 1/sqrt(in)) as in loralib, and B = 0.
        """
        config, n = self.lora, self.inputs
        width, rank = x.shape[-1], self.lora.rank
        uniform = nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=range(n), out_axis=n
        )
        shape, axes = (*self.shape[:n], rank), (*self.axes[:n], None)
        a = parameter(self, NAMES[0], uniform, shape, axes)
        shape, axes = (rank, *self.shape[n:]), (None, *self.axes[n:])
        b = parameter(self, NAMES[1], nn.initializers.zeros, shape, axes)
        key = self.make_rng("lora") if self.has_rng("lora") else None
        x = dropout(x, config.dropout, key)
        inner = linear(x, a.reshape(width, rank), self.dtype) * config.scale
        return linear(inner, b.reshape(rank, -1), self.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query attention.

    `attend(q, k, v)` computes the attention output; it may write keys and values to a cache.
    `pick` selects the positions that are queried, by default all; keys and values are of all.
    """

    config: TransformerConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        rope: RopeTables | None,
        attend: Callable,
        pick: Callable = all_positions,
    ):
        c = self.config

        def project(name, x, heads, axis, rope, time=None, normed=True):
            module = Project(
                shape=(c.d_model, heads, c.head_dim),
                axes=("embed", axis, "head_dim"),
                std=float(c.init_std),
                bias=c.bias or c.attention_bias or c.qkv_bias,
                lora=self.lora,
                dtype=c.product_dtype,
                name=name,
            )
            y = module(x)
            if normed and c.qk_norm != "none":
                axes = ("head_dim",) if c.qk_norm == "head" else (axis, "head_dim")
                y = Norm(c, axes, name=f"{name}_norm")(y)
            y = y.swapaxes(1, 2)
            y = y if rope is None else rotate(y, rope)
            return constrain(y, ("batch", axis, time, "head_dim"))

        # Devices that share a sequence have their own queries, and gather all keys and values here.
        queried, query_rope = pick(x), jax.tree.map(pick, rope)
        q = project("query", queried, c.n_heads, "heads", query_rope, time="time")
        k = project("key", x, c.kv_heads, "kv_heads", rope)
        v = project("value", x, c.kv_heads, "kv_heads", None, normed=False)
        out = Project(
            shape=(c.n_heads, c.head_dim, c.d_model),
            axes=("heads", "head_dim", "embed"),
            std=residual_std(c),
            bias=c.bias or c.attention_bias,
            inputs=2,
            lora=self.lora,
            dtype=c.product_dtype,
            name="out",
        )
        return out(attend(q, k, v).swapaxes(1, 2))


class MLP(nn.Module):
    """SwiGLU, (silu(x W_gate) * x W_up) W_down, GEGLU with gelu for silu, or gelu(x W_up) W_down.

    Source: Shazeer 2020, eqs. 5 and 6. gelu(x) = x Phi(x), or its tanh form (Hendrycks & Gimpel
    2016, section 2).
    """

    config: TransformerConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x):
        c = self.config

        def project(name, x, std, inputs, outputs):
            widths = {"embed": c.d_model, "mlp": c.d_ff}
            shape, axes = (widths[inputs], widths[outputs]), (inputs, outputs)
            module = Project(
                shape=shape,
                axes=axes,
                std=std,
                bias=c.bias,
                lora=self.lora,
                dtype=c.product_dtype,
                name=name,
            )
            return module(x)

        def expand(name):
            return project(name, x, float(c.init_std), "embed", "mlp")

        if c.mlp in GATES:
            y = GATES[c.mlp](expand("gate")) * expand("up")
        else:
            y = GELU[c.mlp](expand("up"))
        y = constrain(y, ("batch", "time", "mlp"))
        return project("down", y, residual_std(c), "mlp", "embed")


class Block(nn.Module):
    """One layer; TransformerConfig has the equations of its forms.

    The output is at the positions that `pick` selects.
    """

    config: TransformerConfig
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        rope: RopeTables | None,
        attend: Callable,
        key: jax.Array | None = None,
        pick: Callable = all_positions,
    ):
        c = self.config
        keys = (None, None) if key is None else jax.random.split(key)
        norm_1, norm_2, norm_3, norm_4 = (
            Norm(c, name=f"norm_{i}") for i in (1, 2, 3, 4)
        )

        def attention(x):
            y = Attention(c, self.lora, name="attention")(x, rope, attend, pick)
            return dropout(y, c.dropout, keys[0])

        def mlp(x):
            part = (
                Experts(c, name="mlp") if c.n_experts else MLP(c, self.lora, name="mlp")
            )
            return dropout(part(x), c.dropout, keys[1])

        if c.residual == "parallel":
            x = pick(x) + attention(norm_1(x)) + mlp(norm_2(pick(x)))
            return constrain(x, RESIDUAL)
        if c.residual == "post_norm":
            x = constrain(norm_1(pick(x) + attention(x)), RESIDUAL)
            return constrain(norm_2(x + mlp(x)), RESIDUAL)
        if c.residual == "norm_after":
            x = constrain(pick(x) + norm_1(attention(x)), RESIDUAL)
            return constrain(x + norm_2(mlp(x)), RESIDUAL)
        if c.residual == "sandwich":
            x = constrain(pick(x) + norm_2(attention(norm_1(x))), RESIDUAL)
            return constrain(x + norm_4(mlp(norm_3(x))), RESIDUAL)
        x = constrain(pick(x) + attention(norm_1(x)), RESIDUAL)
        return constrain(x + mlp(norm_2(x)), RESIDUAL)


class Embed(nn.Module):
    """The token embedding, plus a learned position embedding if the config asks for one."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
    ):
        c = self.config
        std = float(c.init_std)
        shape, axes = (c.vocab_size, c.d_model), ("vocab", "embed")
        table = parameter(self, "tokens", std, shape, axes)
        if table.dtype == jnp.int8:
            scale = parameter(
                self,
                "tokens" + quantized.SCALE,
                nn.initializers.ones,
                (c.vocab_size,),
                ("vocab",),
            )
            scale = scale[:, None]
            values = _look_up(table, tokens)
            scales = _look_up(scale, tokens)
            x = (values.astype(jnp.float32) * scales).astype(c.activation_dtype)
        else:
            # Each device looks up whole rows of its tokens. Without this constraint the partitioner
            # makes every device look up its columns for the whole batch.
            table = constrain(table.astype(c.activation_dtype), ("vocab", None))
            x = _look_up(table, tokens)
        if c.scale_embedding:
            x = x * jnp.asarray(c.d_model**0.5, x.dtype)
        if c.positions == "learned":
            shape, axes = (c.max_length, c.d_model), ("positions", "embed")
            table = parameter(self, "positions", std, shape, axes)
            table = constrain(table.astype(c.activation_dtype), (None, None))
            x = x + _look_up(table, positions)
        return x


def _look_up(table, ids):
    return jnp.take(table, ids, axis=0, mode="clip")


class Unembed(nn.Module):
    """The untied output matrix [d, v]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self):
        c = self.config
        shape, axes = (c.d_model, c.vocab_size), ("embed", "vocab")
        return parameter(self, "kernel", float(c.init_std), shape, axes)


class ScalarHead(nn.Module):
    """The parameters of hidden . kernel + bias, with kernel ~ N(0, 1/sqrt(d + 1)).

    Source: Ziegler et al. 2019; Stiennon et al. 2020, appendix B.1.
    """

    width: int

    @nn.compact
    def __call__(self):
        std = (self.width + 1) ** -0.5
        kernel = parameter(self, "kernel", std, (self.width,), ("embed",))
        bias = parameter(self, "bias", nn.initializers.zeros, (), ())
        return kernel, bias
