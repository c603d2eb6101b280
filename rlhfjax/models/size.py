"""What a model takes, by arithmetic: parameters, activations, a cache of keys and values."""

from rlhfjax.models.config import TransformerConfig

Number = int | float


def parameters(c: TransformerConfig, head: str = "lm") -> int:
    """How many numbers a model has, by hand.

    A layer: d H + 2 d G + H d of attention (H = heads x head_dim, G = kv_heads x head_dim), 3 d f (SwiGLU) or 2 d f of
    the MLP, two norms of d (LayerNorm: 2 d), and biases. Outside of the layers: v d embedding, learned positions, a
    final norm, and a head of d v where the output is not tied, or of d + 1 where it is a scalar.
    """
    d, f, v = c.d_model, c.d_ff, c.vocab_size
    q, kv = c.n_heads * c.head_dim, c.kv_heads * c.head_dim
    norm = d if c.norm == "rmsnorm" else 2 * d
    attention = 2 * d * q + 2 * d * kv
    attention += (q + 2 * kv) * (c.bias or c.qkv_bias) + d * c.bias
    grown = 2 if c.mlp == "swiglu" else 1
    mlp = (grown + 1) * d * f + (grown * f + d) * c.bias
    outside = (
        v * d
        + (c.max_length * d if c.positions == "learned" else 0)
        + norm * c.final_norm
    )
    outside += d + 1 if head == "scalar" else 0 if c.tie_embeddings else d * v
    return c.n_layers * (attention + mlp + 2 * norm) + outside


def layer_activations(
    c: TransformerConfig, batch: int, time: int, size: Number = 2.0
) -> dict[str, Number]:
    """Bytes of what the backward pass of one layer reads, by part, where nothing is computed again.

    For GPT's shape with dropout it is eq. 1 of Korthikanti et al. 2022, s b h (34 + 5 a s / h) with s time, b batch, h
    width, a heads, counted as their section 4.1 counts it: every input of a product, both factors of the scores, the
    softmax and its dropped-out copy, one byte a dropout mask. Other shapes are counted in the same way: grouped keys
    have fewer heads; SwiGLU keeps gate, up, silu(gate) and their product; without dropout there is neither mask nor
    copy. It is the arithmetic of plain attention: a kernel in the manner of FlashAttention keeps no `scores`.

    Args:
      size: bytes of a number, 2 for bf16 and fp16.
    """
    tokens, drop = batch * time, c.dropout > 0
    q, kv, scores = (
        c.n_heads * c.head_dim,
        c.kv_heads * c.head_dim,
        batch * c.n_heads * time * time,
    )
    # input; query; key; value; input of the output projection; mask of its dropout
    attention = tokens * (size * (c.d_model + 2 * q + 2 * kv) + drop * c.d_model)
    hidden = 4 if c.mlp == "swiglu" else 2
    return {
        "attention": attention,
        "scores": scores * (size + drop * (size + 1)),
        "mlp": tokens * (size * (c.d_model + hidden * c.d_ff) + drop * c.d_model),
        "norms": tokens * size * 2 * c.d_model,
    }


def activations(
    c: TransformerConfig, batch: int, time: int, size: Number = 2.0
) -> Number:
    """`layer_activations` of all layers, as the config's remat keeps them: all, each layer's input ("full").

    "dots" is none of both: what it keeps is for the compiler to say, and this is the upper bound.
    """
    if c.remat == "full":
        return c.n_layers * size * batch * time * c.d_model
    return c.n_layers * sum(layer_activations(c, batch, time, size).values())


def kv_cache_bytes(
    c: TransformerConfig, batch: int, length: int, size: Number = 2.0
) -> Number:
    """2 (keys and values) x layers x kv_heads x head_dim x length x batch numbers."""
    return 2 * c.n_layers * c.kv_heads * c.head_dim * length * batch * size
