"""Attention by kernels that others keep: cuDNN's through jax.nn on GPUs, Pallas's splash attention on TPUs.

Both never write the scores [t, t] to memory. Layout and meaning are those of `attention.causal_attention`, but for the
slots of padding (segment 0), whose output is of no use to anyone, and without dropout.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float, Int

from rlhfjax.mesh import per_device
from rlhfjax.models.attention import allowed

LANES = 128  # a splash block is a multiple of this; sequences are padded to one
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
    segments: Int[Array, "b t"] | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "b h t k"]:
    """Causal attention within segments by `jax.nn.dot_product_attention`; cuDNN computes in bfloat16 alone."""
    t = q.shape[2]
    rows = (x.swapaxes(1, 2) for x in (q, k, v))
    mask = None if segments is None else allowed(segments, 0, t)[:, None]
    out = jax.nn.dot_product_attention(
        *rows, mask=mask, is_causal=True, implementation=implementation
    )
    return out.swapaxes(1, 2)


def splash_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segments: Int[Array, "b t"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b h t k"]:
    """Causal attention within segments by the Pallas kernel, each device on its own rows and heads.

    Args:
      interpret: run the kernel's program step by step on any device, for tests.
    """
    b, _, t, d = q.shape
    segments = jnp.ones((b, t), jnp.int32) if segments is None else segments
    more = -t % LANES

    def own(q, k, v, segments):
        kernel = _kernel(q.shape[1], t + more, interpret)
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q * d**-0.5, k, v)
        )
        ids = jnp.pad(segments, ((0, 0), (0, more)))
        out = jax.vmap(kernel)(q, k, v, splash_attention_kernel.SegmentIds(ids, ids))
        return out[:, :, :t].astype(q.dtype)

    heads, kv_heads = (
        ("batch", "heads", None, "head_dim"),
        ("batch", "kv_heads", None, "head_dim"),
    )
    return per_device(own, (heads, kv_heads, kv_heads, ("batch", None)), heads)(
        q, k, v, segments
    )


def _kernel(heads: int, time: int, interpret: bool):
    block = next(size for size in BLOCKS if time % size == 0)
    names = (
        "q",
        "kv",
        "kv_compute",
        "q_dkv",
        "kv_dkv",
        "kv_dkv_compute",
        "q_dq",
        "kv_dq",
    )
    sizes = splash_attention_kernel.BlockSizes(
        **{f"block_{name}": block for name in names}
    )
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((time, time))] * heads
    )
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
