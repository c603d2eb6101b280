"""Attention kernels: cuDNN's through jax.nn on GPUs, Pallas's splash attention on TPUs.

Neither writes the scores [t, t] to memory. Layout and result are those of
`attention.causal_attention`, except at padding (segment id 0), where the output is unused. The
kernels have no dropout.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float, Int

from rlhfjax.mesh import per_device
from rlhfjax.models.attention import allowed

LANES = 128  # sequences are padded to a multiple of this; so is a splash block
BLOCKS = (512, 256, 128)
PLATFORMS = {
    "einsum": ("cpu", "gpu", "cuda", "rocm", "tpu"),
    "cudnn": ("gpu", "cuda"),
    "splash": ("tpu",),
}


def cudnn_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segment_ids: Int[Array, "b t"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b h t k"]:
    """Returns causal attention within documents by `jax.nn.dot_product_attention`.

    cuDNN computes only in bfloat16.
    """
    t = q.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mask = None if segment_ids is None else allowed(segment_ids, 0, t)[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation=implementation
    )
    return out.swapaxes(1, 2)


def splash_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b h t k"]:
    """Returns causal attention within documents by the Pallas kernel.

    Each device computes its own rows and heads.

    Args:
      interpret: run the kernel's program step by step on any device, for tests.
    """
    b, _, t, d = q.shape
    if segment_ids is None:
        segment_ids = jnp.ones((b, t), jnp.int32)
    padding = -t % LANES

    def attend(q, k, v, segment_ids):
        kernel = _kernel(q.shape[1], t + padding, interpret)
        q = q * d**-0.5
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v)
        )
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        out: Any = jax.vmap(kernel)(
            q, k, v, splash_attention_kernel.SegmentIds(ids, ids)
        )
        return out[:, :, :t].astype(q.dtype)

    heads = ("batch", "heads", None, "head_dim")
    kv_heads = ("batch", "kv_heads", None, "head_dim")
    inputs = (heads, kv_heads, kv_heads, ("batch", None))
    return per_device(attend, inputs, heads)(q, k, v, segment_ids)


def _kernel(heads: int, time: int, interpret: bool):
    block = next(size for size in BLOCKS if time % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    head_mask = splash_attention_mask.CausalMask((time, time))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([head_mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
