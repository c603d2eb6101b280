"""Weights in 8 or 4 bits, for inference and as the frozen base of adapters; and int8 caches.

int8   q = round(x / s),               s = max |x| / 127 over the axes that share the scale, so
                                       that |x - s q| <= s / 2
NF4    q = argmin_i |x / s - NF4[i]|,  s = max |x| over a block of 64 inputs of one output

A quantized kernel replaces the float one, as int8 or uint4, with its scales beside it: `kernel` and
`kernel_scale`, or `tokens` and `tokens_scale` of an embedding. The layers recognize it by its
dtype. Biases and norms stay as they are. A layer's input has a gradient, its quantized weights have
none. The backward pass keeps no dequantized kernel; it dequantizes again.

Sources: absmax quantization, vector-wise (Dettmers et al. 2022, LLM.int8(), section 2.1 and 3.1),
of weights only; 4-bit NormalFloat (Dettmers et al. 2023, QLoRA, section 3 and appendix E), without
double quantization: a scale is a float32, 0.5 bits per weight. Accelerators store a uint4 in four
bits; on CPUs XLA stores it in a byte.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt4

from rlhfjax.errors import ConfigError
from rlhfjax.models import few_rows
from rlhfjax.models.lora import Params

SCALE = "_scale"
LARGEST = 127.0
# Inputs that share a scale in NF4. If it does not divide the width: their greatest common divisor.
BLOCK = 64
# Quantiles that split a standard normal into equal masses, scaled to [-1, 1], with 0 among them
# (QLoRA, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Quantized(NamedTuple):
    """An array as values * scale, or NF4[values] * scale."""

    values: Integer[Array, "..."]
    scale: Float[Array, "..."]  # without the axes that share it


def absmax(x: Float[Array, "..."], axes: tuple[int, ...]) -> Quantized:
    """Returns symmetric int8: q = round(x / s) with s = max |x| / 127 over `axes`.

    Zeros have scale 0 and stay zeros.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axes, keepdims=True) / LARGEST
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantized(values, scale.squeeze(axes))


def nf4(x: Float[Array, "x y"]) -> Quantized:
    """Returns the nearest NF4 value of x / s, with s = max |x| over a block of inputs.

    Values are uint4 [x, y], scales [x / block, y].
    """
    width, outputs = x.shape
    block = math.gcd(width, BLOCK)
    wide = x.astype(jnp.float32).reshape(width // block, block, outputs)
    scale = jnp.abs(wide).max(1)
    middles = (jnp.array(NF4[1:]) + jnp.array(NF4[:-1])) / 2
    values = jnp.searchsorted(middles, wide / jnp.where(scale > 0, scale, 1.0)[:, None])
    return Quantized(values.astype(jnp.uint4).reshape(x.shape), scale)


def weights(params: Params, axes: Params) -> Params:
    """Returns the parameters with every projection, embedding and output matrix in int8.

    Args:
      params: of a language model, or any tree that contains such parameters.
      axes: their logical axis names, `Model.axes()`. Adapters are not in it and stay as they are.

    Raises:
      ConfigError: the weights are quantized already, or those of a mixture of experts.
    """
    return _quantized(params, axes, "int8")


def weight_axes(params: Params, axes: Params) -> Params:
    """Returns the logical axis names of parameters that may be those of `weights`.

    A scale has the names of its matrix, without the axes that share it.

    Args:
      axes: the names of the parameters before they were quantized, `Model.axes()`.
    """
    out = dict(axes)
    for name, names in axes.items():
        if isinstance(names, dict):
            out[name] = weight_axes(params[name], names)
        elif name + SCALE in params:
            shared = _inputs(name, names)
            kept = [axis for i, axis in enumerate(names) if i not in shared]
            out[name + SCALE] = tuple(kept)
    return out


def base(params: Params, axes: Params, kind: str) -> Params:
    """Returns the parameters with the kernels of the layers in `kind`, "int8" or "nf4".

    Embeddings, norms, biases and the head stay in float32, as in QLoRA.

    Args:
      axes: their logical axis names, `Model.axes()`.

    Raises:
      ConfigError: the weights are quantized already, or those of a mixture of experts.
    """
    backbone = params["backbone"]
    layers = _quantized(backbone["layers"], axes["backbone"]["layers"], kind)
    return {**params, "backbone": {**backbone, "layers": layers}}


def _quantized(params: Params, axes: Params, kind: str) -> Params:
    out: Params = {}
    for name, value in params.items():
        names = axes.get(name)
        if isinstance(value, dict):
            out[name] = _quantized(value, names or {}, kind)
            continue
        if "expert" in (names or ()):
            raise ConfigError(
                f"{kind} weights: experts have none, only dense models do"
            )
        shared = _inputs(name, names)
        if not shared:
            out[name] = value
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            raise ConfigError(f"quantized: {name} is {value.dtype} already")
        else:
            quantize = absmax if kind == "int8" else _nf4
            out[name], out[name + SCALE] = quantize(value, shared)
    return out


def _inputs(name: str, names: tuple[str, ...] | None) -> tuple[int, ...]:
    """Returns the axes that share a scale, which a product contracts; none if not quantized."""
    if name not in ("kernel", "tokens") or names is None or len(names) < 2:
        return ()
    if name == "tokens":
        return (1,)  # one scale per row, which is an output of the tied matrix
    first = 1 if names[0] == "layers" else 0
    return (first, first + 1) if names[first] == "heads" else (first,)


def _nf4(kernel: Float[Array, "..."], inputs: tuple[int, ...]) -> Quantized:
    """Returns `nf4` of a kernel [layers?, inputs…, outputs…]; scales keep the outputs' shape."""
    if inputs[0]:  # stacked layers
        layer_inputs = tuple(i - 1 for i in inputs)
        return jax.vmap(lambda layer: _nf4(layer, layer_inputs))(kernel)
    outputs = kernel.shape[len(inputs) :]
    values, scale = nf4(kernel.reshape(-1, math.prod(outputs)))
    return Quantized(values.reshape(kernel.shape), scale.reshape(-1, *outputs))


def wide(params: Params, axes: Params) -> Params:
    """Returns the parameters dequantized to float32."""
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
    values: Integer[Array, "..."],
    scale: Float[Array, "..."],
    inputs: tuple[int, ...],
) -> Float[Array, "..."]:
    if values.dtype == jnp.int8:
        return values * jnp.expand_dims(scale, inputs)
    if inputs[0]:  # stacked layers
        layer_inputs = tuple(i - 1 for i in inputs)
        return jax.vmap(lambda v, s: _wide(v, s, layer_inputs))(values, scale)
    outputs = math.prod(values.shape[len(inputs) :])
    kernel = _from_nf4(values.reshape(-1, outputs), scale.reshape(-1, outputs))
    return kernel.reshape(values.shape)


def _from_nf4(
    values: UInt4[Array, "x y"],
    scale: Float[Array, "n y"],
) -> Float[Array, "x y"]:
    blocks = jnp.array(NF4)[values.astype(jnp.int32)]
    blocks = blocks.reshape(scale.shape[0], -1, scale.shape[1])
    return (blocks * scale[:, None]).reshape(values.shape)


# ------------------------------------------------------------------ products


def linear(
    x: Float[Array, "b t x"],
    kernel: Integer[Array, "x y"],
    scale: Float[Array, "..."],
    dtype: str | None = None,
) -> Float[Array, "b t y"]:
    """Returns x . (dequantized kernel) in x's dtype.

    The kernel is int8 with a scale [y], or NF4 (uint4) with a scale [x / block, y].

    Args:
      dtype: of the inputs of an int8 product in a decode step, see `few_rows`.
    """
    if kernel.dtype != jnp.int8:
        return _frozen(_nf4_product, x, kernel, scale)
    if x.shape[1] > 1:
        return _frozen(_int8_product, x, kernel, scale)
    return _frozen(functools.partial(_decoding_product, dtype), x, kernel, scale)


def _int8_product(x, kernel, scale):
    y = jnp.einsum("btx,xy->bty", x, kernel.astype(x.dtype))
    return (y.astype(jnp.float32) * scale).astype(x.dtype)


def _decoding_product(dtype, x, kernel, scale):
    y = few_rows.product(x[:, 0], kernel, dtype=dtype) * scale
    return y[:, None].astype(x.dtype)


def _nf4_product(x, kernel, scale):
    return jnp.einsum("btx,xy->bty", x, _from_nf4(kernel, scale).astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen(product, x, kernel, scale):
    """Returns product(x, kernel, scale), linear in x, without a gradient of the kernel.

    The barrier ties the kernel to x. Otherwise XLA dequantizes it outside of a decoding loop, which
    then reads it at full width in every step.
    """
    return _forward(product, x, kernel, scale)[0]


def _forward(product, x, kernel, scale):
    # Not by `_frozen`, as in models.linear.
    tied_x, tied_kernel = jax.lax.optimization_barrier((x, kernel))
    return product(tied_x, tied_kernel, scale), (kernel, scale)


def _backward(product, saved, dy):
    kernel, scale = saved
    dy, kernel = jax.lax.optimization_barrier((dy, kernel))
    if product is not _nf4_product:
        product = _int8_product
    x = jax.ShapeDtypeStruct((*dy.shape[:-1], kernel.shape[0]), dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: product(x, kernel, scale), x)(dy)
    return dx, None, None


_frozen.defvjp(_forward, _backward)
