"""Sizes of a model by arithmetic: parameters, FLOPs, activations, the key/value cache."""

from rlhfjax.models.config import TransformerConfig

Number = int | float


def parameters(config: TransformerConfig, head: str = "lm") -> int:
    """Returns the number of parameters of a model.

    With d the width, f the width of the MLP, H = n_heads x head_dim, G = kv_heads x head_dim and
    v the vocabulary, a layer has
      attention  d H + 2 d G + H d
      MLP        3 d f (SwiGLU) or 2 d f
      norms      2 d (RMSNorm) or 4 d (LayerNorm)
    and biases where the config has them. Outside of the layers there are the embedding (v d),
    learned positions, the final norm, and the head: d v of an untied output, d + 1 of a scalar.
    """
    d, f = config.d_model, config.d_ff
    q = config.n_heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    norm = d if config.norm == "rmsnorm" else 2 * d
    attention = 2 * d * (q + kv)
    if config.bias or config.qkv_bias:
        attention += q + 2 * kv
    inputs = 2 if config.mlp == "swiglu" else 1  # matrices [d, f]
    mlp = (inputs + 1) * d * f
    if config.bias:
        attention += d
        mlp += inputs * f + d
    total = config.n_layers * (attention + mlp + 2 * norm)

    embedding = config.vocab_size * d
    total += embedding
    if config.positions == "learned":
        total += config.max_length * d
    if config.final_norm:
        total += norm
    if head == "scalar":
        total += d + 1
    elif not config.tie_embeddings:
        total += embedding
    return total


def token_flops(parameters: Number, c: TransformerConfig, time: int) -> Number:
    """Returns PaLM's FLOPs of training one token: 6 N + 12 L H Q T.

    Q is the width of a head and T the sequence length. Recomputation does not count, so that the
    utilization predicted from it is MFU, not hardware utilization.

    Source: Chowdhery et al. 2022, appendix B.
    """
    return 6 * parameters + 12 * c.n_layers * c.n_heads * c.head_dim * time


def layer_activations(
    config: TransformerConfig,
    batch: int,
    time: int,
    size: Number = 2.0,
) -> dict[str, Number]:
    """Returns the bytes that the backward pass of one layer reads, by part, without remat.

    For a GPT layer with dropout this is eq. 1 of Korthikanti et al. 2022, s b h (34 + 5 a s / h),
    with s time, b batch, h width and a heads. As in their section 4.1, it counts the input of
    every product, both factors of the scores, the softmax and its dropped-out copy, and one byte
    per element of a dropout mask. Other layers are counted in the same way: grouped keys have
    fewer heads; SwiGLU keeps gate, up, silu(gate) and their product; without dropout there is
    neither mask nor copy. Attention is the plain one: FlashAttention kernels keep no `scores`.

    Args:
      size: bytes per number, 2 for bf16 and fp16.
    """
    tokens = batch * time
    drop = int(config.dropout > 0)
    q = config.n_heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    scores = batch * config.n_heads * time * time
    hidden = 4 if config.mlp == "swiglu" else 2
    # Input; query; key; value; input of the output projection. A byte per element of the mask.
    attention = size * (config.d_model + 2 * q + 2 * kv) + drop * config.d_model
    mlp = size * (config.d_model + hidden * config.d_ff) + drop * config.d_model
    return {
        "attention": tokens * attention,
        "scores": scores * (size + drop * (size + 1)),
        "mlp": tokens * mlp,
        "norms": tokens * size * 2 * config.d_model,
    }


def activations(
    config: TransformerConfig,
    batch: int,
    time: int,
    size: Number = 2.0,
) -> Number:
    """Returns the bytes of activations that all layers keep for the backward pass.

    With remat "none" each layer keeps `layer_activations`, with "full" only its input. What "dots"
    and "offload" keep is the compiler's choice; the result is then an upper bound.
    """
    if config.remat == "full":
        return config.n_layers * size * batch * time * config.d_model
    parts = layer_activations(config, batch, time, size)
    return config.n_layers * sum(parts.values())


def kv_cache_bytes(
    config: TransformerConfig,
    batch: int,
    length: int,
    size: Number = 2.0,
) -> Number:
    """Returns the bytes of the keys and values of `batch` rows of `length` tokens."""
    numbers_per_token = 2 * config.n_layers * config.kv_heads * config.head_dim
    return numbers_per_token * length * batch * size
