"""Attention kernels: cuDNN's through jax.nn on GPUs, Pallas's splash attention on TPUs.

Neither writes the scores [t, t] to memory. Layout and result are those of
`attention.causal_attention`, except at padding (segment id 0), where the output is unused. The
kernels have no dropout.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.mesh import per_device
from rlhfjax.models.attention import PLAIN, Scoring, allowed

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
    *,
    window: int | None = None,
    scoring: Scoring = PLAIN,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b h t k"]:
    """Returns causal attention within documents by `jax.nn.dot_product_attention`.

    cuDNN computes only in bfloat16, and has no soft cap (TransformerConfig refuses it).
    """
    t = q.shape[2]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mask = None if segment_ids is None else allowed(segment_ids, 0, t)[:, None]
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out.swapaxes(1, 2)


def splash_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    window: int | None = None,
    scoring: Scoring = PLAIN,
    interpret: bool = False,
) -> Float[Array, "b h t k"]:
    """Returns causal attention within documents by the Pallas kernel.

    Each device computes its own rows and heads.

    Args:
      interpret: run the kernel's program step by step on any device, for tests.
    """
    # Pallas is imported late: it takes long, and few runs use it.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    b, _, t, _ = q.shape
    if segment_ids is None:
        segment_ids = jnp.ones((b, t), jnp.int32)
    padding = -t % LANES

    def attend(q, k, v, segment_ids):
        kernel = _kernel(q.shape[1], t + padding, window, scoring.softcap, interpret)
        q = scoring.scaled(q)
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v)
        )
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        out: Any = jax.vmap(kernel)(q, k, v, SegmentIds(ids, ids))
        return out[:, :, :t].astype(q.dtype)

    heads = ("batch", "heads", None, "head_dim")
    kv_heads = ("batch", "kv_heads", None, "head_dim")
    inputs = (heads, kv_heads, kv_heads, ("batch", None))
    return per_device(attend, inputs, heads)(q, k, v, segment_ids)


def _kernel(
    heads: int, time: int, window: int | None, softcap: float | None, interpret: bool
):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

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
    shape = (time, time)
    head_mask: Any = splash_attention_mask.CausalMask(shape)
    if window is not None:
        head_mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), offset=0)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([head_mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
