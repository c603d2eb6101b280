"""Weights in 8 or 4 bits, for inference and as the frozen base of adapters; a cache of keys and values in int8.

int8   q = round(x / s),                s = max |x| / 127   over the axes that share the scale: |x - s q| <= s / 2
NF4    q = argmin_i |x / s - NF4[i]|,   s = max |x|         over a block of 64 inputs of one output

A quantized kernel stands where the float one stood, as int8 or uint4, with its scales beside it: `kernel` and
`kernel_scale`, and `tokens`, `tokens_scale` of an embedding. The layers know what to do by its dtype; biases and norms
stay as they are. A gradient passes through to what a layer was given, none to the weights, and no backward pass keeps
a kernel at its full width: it is made wide once more.

Sources: absmax quantization, vector-wise (Dettmers et al. 2022, LLM.int8(), section 2.1 and 3.1), of weights alone;
4-bit NormalFloat (Dettmers et al. 2023, QLoRA, section 3 and appendix E), without double quantization: a scale is a
float32, 0.5 bits a weight. Four bits are four on accelerators; XLA keeps a uint4 in a byte on CPUs.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Integer, UInt4

from rlhfjax.errors import ConfigError

Params = dict[str, Any]
SCALE = "_scale"
LARGEST = 127.0
BLOCK = 64  # inputs that share a scale in NF4; their greatest common divisor with the width where that is no multiple
# the quantiles of a standard normal that share its mass equally, scaled to [-1, 1], 0 among them: QLoRA, appendix E
NF4 = (
    *(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
    ),
    *(
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
    ),
    *(
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)


class Quantized(NamedTuple):
    """What values * scale, or NF4[values] * scale, stands for; the scale without the axes that share it."""

    values: Integer[Array, "..."]
    scale: Float[Array, "..."]


def absmax(x: Float[Array, "..."], axes: tuple[int, ...]) -> Quantized:
    """Symmetric int8: q = round(x / s) with s = max |x| / 127 over `axes`; zeros have scale 0 and stay zeros."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axes, keepdims=True) / LARGEST
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantized(values, scale.squeeze(axes))


def nf4(x: Float[Array, "x y"]) -> Quantized:
    """The nearest NF4 value of x / s, s = max |x| of a block of inputs: uint4 [x, y] and scales [x / block, y]."""
    width, outputs = x.shape
    block = math.gcd(width, BLOCK)
    wide = x.astype(jnp.float32).reshape(width // block, block, outputs)
    scale = jnp.abs(wide).max(1)
    middles = (jnp.array(NF4[1:]) + jnp.array(NF4[:-1])) / 2
    values = jnp.searchsorted(middles, wide / jnp.where(scale > 0, scale, 1.0)[:, None])
    return Quantized(values.astype(jnp.uint4).reshape(x.shape), scale)


def weights(params: Params, axes: Params) -> Params:
    """The parameters with int8 in the place of every projection's kernel, the embedding and the output matrix.

    Args:
      params: of a language model, or any tree of such.
      axes: the names of their axes, `Model.axes()`; adapters may be missing from it and stay as they are.
    Raises:
      ConfigError: the weights are quantized already.
    """
    return _quantized(params, axes, "int8")


def base(params: Params, axes: Params, kind: str) -> Params:
    """The parameters with the kernels of the layers' projections in `kind`, "int8" or "nf4".

    Embeddings, norms, biases and the head stay in float32, as in QLoRA.

    Args:
      axes: the names of their axes, `Model.axes()`.
    Raises:
      ConfigError: the weights are quantized already.
    """
    layers = _quantized(params["backbone"]["layers"], axes["backbone"]["layers"], kind)
    return {**params, "backbone": {**params["backbone"], "layers": layers}}


def _quantized(params: Params, axes: Params, kind: str) -> Params:
    out: Params = {}
    for name, value in params.items():
        names = axes.get(name)
        shared = () if isinstance(value, dict) else _inputs(name, names)
        if isinstance(value, dict):
            out[name] = _quantized(value, names or {}, kind)
        elif not shared:
            out[name] = value
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            raise ConfigError(f"quantized: {name} is {value.dtype} already")
        else:
            out[name], out[name + SCALE] = (
                absmax(value, shared) if kind == "int8" else _nf4(value, shared)
            )
    return out


def _inputs(name: str, names: tuple[str, ...] | None) -> tuple[int, ...]:
    """The axes that one scale is shared by: what is summed over; none of what stays as it is."""
    if name not in ("kernel", "tokens") or names is None or len(names) < 2:
        return ()
    if name == "tokens":
        return (1,)  # a scale a row, which is an output of the tied matrix
    first = 1 if names[0] == "layers" else 0
    return (first, first + 1) if names[first] == "heads" else (first,)


def _nf4(kernel: Float[Array, "..."], inputs: tuple[int, ...]) -> Quantized:
    """`nf4` of a kernel [layers?, inputs…, outputs…], the outputs' shape kept."""
    if inputs[0]:  # stacked layers
        return jax.vmap(lambda layer: _nf4(layer, tuple(i - 1 for i in inputs)))(kernel)
    outputs = kernel.shape[len(inputs) :]
    values, scale = nf4(kernel.reshape(-1, math.prod(outputs)))
    return Quantized(values.reshape(kernel.shape), scale.reshape(-1, *outputs))


def wide(params: Params, axes: Params) -> Params:
    """The same parameters in float32 everywhere: what the quantized ones stand for."""
    out: Params = {}
    for name, value in params.items():
        names = axes.get(name)
        if isinstance(value, dict):
            out[name] = wide(value, names or {})
        elif name + SCALE in params:
            out[name] = _wide(value, params[name + SCALE], _inputs(name, names))
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in params):
            out[name] = value
    return out


def _wide(
    values: Integer[Array, "..."], scale: Float[Array, "..."], inputs: tuple[int, ...]
) -> Float[Array, "..."]:
    if values.dtype == jnp.int8:
        return values * jnp.expand_dims(scale, inputs)
    if inputs[0]:
        return jax.vmap(lambda v, s: _wide(v, s, tuple(i - 1 for i in inputs)))(
            values, scale
        )
    outputs = math.prod(values.shape[len(inputs) :])
    return _from_nf4(values.reshape(-1, outputs), scale.reshape(-1, outputs)).reshape(
        values.shape
    )


def _from_nf4(
    values: UInt4[Array, "x y"], scale: Float[Array, "n y"]
) -> Float[Array, "x y"]:
    blocks = jnp.array(NF4)[values.astype(jnp.int32)].reshape(
        scale.shape[0], -1, scale.shape[1]
    )
    return (blocks * scale[:, None]).reshape(values.shape)


# ------------------------------------------------------------------ products


def linear(
    x: Float[Array, "b t x"], kernel: Integer[Array, "x y"], scale: Float[Array, "..."]
) -> Float[Array, "b t y"]:
    """x . kernel in x's dtype, of a kernel in int8 (scale [y]) or NF4 (scale [x / block, y])."""
    return (
        linear_int8(x, kernel, scale)
        if kernel.dtype == jnp.int8
        else linear_nf4(x, kernel, scale)
    )


def linear_int8(
    x: Float[Array, "b t x"], kernel: Int8[Array, "x y"], scale: Float[Array, " y"]
) -> Float[Array, "b t y"]:
    """(x . kernel) * scale in x's dtype."""
    return _frozen(_int8_product, x, kernel, scale)


def linear_nf4(
    x: Float[Array, "b t x"], kernel: UInt4[Array, "x y"], scale: Float[Array, "n y"]
) -> Float[Array, "b t y"]:
    """x . (NF4[kernel] * scale) in x's dtype."""
    return _frozen(_nf4_product, x, kernel, scale)


def _int8_product(x, kernel, scale):
    return (
        jnp.einsum("btx,xy->bty", x, kernel.astype(x.dtype)).astype(jnp.float32) * scale
    ).astype(x.dtype)


def _nf4_product(x, kernel, scale):
    return jnp.einsum("btx,xy->bty", x, _from_nf4(kernel, scale).astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(product, x, kernel, scale):
    """product(x, kernel, scale), linear in x, of a kernel that no gradient is asked for: it is kept as it is given."""
    # Tied to x, the kernel is not made wide outside of a decoding loop, where it would be read at its full width.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return product(x, kernel, scale)


def _forward(product, x, kernel, scale):
    return _frozen(product, x, kernel, scale), (kernel, scale)


def _backward(product, saved, dy):
    kernel, scale = saved
    dy, kernel = jax.lax.optimization_barrier((dy, kernel))
    x = jax.ShapeDtypeStruct((*dy.shape[:-1], kernel.shape[0]), dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: product(x, kernel, scale), x)(dy)
    return dx, None, None


_frozen.defvjp(_forward, _backward)
