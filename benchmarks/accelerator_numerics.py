"""Numerics of `benchmarks.accelerator`: the device beside float32, its kernel beside einsum."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import batches
from benchmarks.accelerator_parts import (
    KERNELS,
    Result,
    Sizes,
    median_seconds,
    model_config,
    norm,
)
from rlhfjax.language import language_loss
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import attention, kernels
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model


def numerics(sizes: Sizes) -> Result:
    """Compares loss and gradient in bf16 on the device with float32 on the CPU.

    Rows are packed with two documents. loss_difference is in nats per token; gradient_error is the
    norm of the difference over the norm of the CPU's gradient.
    """
    config = model_config(sizes.small, sizes)
    exact = dataclasses.replace(config, dtype="float32", attention="einsum")
    length = min(sizes.length, 256)
    rng = np.random.default_rng(0)
    batch = packed_in_two(
        batches.packed({"batch": 2, "seq": length}, config.vocab_size)(rng)
    )
    cpu = jax.devices("cpu")[:1]
    with jax.default_device(cpu[0]):
        params = jax.device_get(jax.jit(Model(exact).init)(jax.random.key(0)))
    reference, slopes = loss_and_gradient(exact, params, batch, cpu)
    loss, device_slopes = loss_and_gradient(config, params, batch, jax.devices()[:1])
    difference = norm(jax.tree.map(np.subtract, device_slopes, slopes))
    return {
        "cpu_float32_loss": reference,
        "device_bf16_loss": loss,
        "loss_difference": loss - reference,
        "gradient_error": difference / norm(slopes),
    }


def loss_and_gradient(
    config: TransformerConfig, params: Any, batch: Any, devices: Any
) -> tuple[float, Any]:
    """Returns the mean loss of a batch and its gradient, as NumPy arrays."""
    layout = make_layout(MeshConfig(), devices)
    loss = language_loss(Model(config))

    def mean(params: Any, batch: Any) -> jax.Array:
        return loss(params, batch, None)[0]

    with layout.use():
        placed = jax.device_put((params, batch), layout.replicated)
        value, gradient = jax.jit(jax.value_and_grad(mean))(*placed)
    return float(value), jax.device_get(gradient)


def packed_in_two(batch: Any) -> Any:
    """Returns a batch whose rows are two documents of different lengths."""
    length = batch.tokens.shape[1]
    cut = length // 3
    index = np.arange(length, dtype=np.int32)
    positions = np.where(index < cut, index, index - cut)
    shape = batch.tokens.shape
    return dataclasses.replace(
        batch,
        segment_ids=np.broadcast_to(1 + (index >= cut).astype(np.int32), shape),
        positions=np.broadcast_to(positions, shape),
    )


def attention_kernel(sizes: Sizes) -> Result:
    """Compares the device's attention kernel in bf16 with einsum in float32, on packed rows.

    Errors are the largest differences over the largest value, of the output and of the gradient.
    On a CPU the kernel is XLA's attention, behind the same function as cuDNN's.
    """
    rows, heads, width = sizes.large_rows, 8, 64
    shape = (rows, heads, sizes.large_length, width)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, shape) for key in keys)
    index = jnp.arange(sizes.large_length)
    ids = 1 + (index >= sizes.large_length // 3).astype(jnp.int32)
    ids = jnp.broadcast_to(ids, (rows, sizes.large_length))
    name = KERNELS.get(jax.default_backend(), "xla")

    def kernel(q: Any, k: Any, v: Any) -> Any:
        if name == "splash":
            return kernels.splash_attention(q, k, v, ids)
        implementation: Any = name
        return kernels.cudnn_attention(q, k, v, ids, implementation=implementation)

    def einsum(q: Any, k: Any, v: Any) -> Any:
        return attention.causal_attention(q, k, v, ids)

    def of(function: Any) -> Any:
        def loss(*inputs: Any) -> Any:
            out = function(*inputs).astype(jnp.float32)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    exact_of, kernel_of = of(einsum), of(kernel)
    with make_layout(MeshConfig(devices="0:1")).use():
        (_, exact), exact_slopes = exact_of(q, k, v)
        (_, out), slopes = kernel_of(*half)
        seconds = median_seconds(lambda: kernel_of(*half))
        einsum_seconds = median_seconds(lambda: exact_of(*half))
    errors = [relative(x, y) for x, y in zip(slopes, exact_slopes, strict=True)]
    return {
        "kernel": name,
        "output_error": relative(out, exact),
        "gradient_error": max(errors),
        "seconds": seconds,
        "einsum_seconds": einsum_seconds,
    }


def relative(x: jax.Array, exact: jax.Array) -> float:
    exact = exact.astype(jnp.float32)
    return float(jnp.abs(x.astype(jnp.float32) - exact).max() / jnp.abs(exact).max())
