"""Sizes of a model by arithmetic: parameters, FLOPs, activations, the key/value cache."""

from rlhfjax.models.config import GATED, TransformerConfig

Number = int | float


def parameters(config: TransformerConfig, head: str = "lm") -> int:
    """Returns the number of parameters of a model.

    With d the width, f the width of the MLP, H = n_heads x head_dim, G = kv_heads x head_dim and
    v the vocabulary, a layer has
      attention  d H + 2 d G + H d, and if queries and keys are normalized 2 head_dim or H + G
      MLP        3 d f (SwiGLU, GEGLU) or 2 d f
      experts    in its place, with e of them, a router: e (3 d f + d)
      norms      2 d (RMSNorm) or 4 d (LayerNorm), twice as much with sandwich norms
    and biases where the config has them. Outside of the layers there are the embedding (v d),
    learned positions, the final norm, and the head: d v of an untied output, d + 1 of a scalar.
    """
    d, f = config.d_model, config.d_ff
    q = config.n_heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    norm = d if config.norm == "rmsnorm" else 2 * d
    attention = 2 * d * (q + kv)
    if config.bias or config.attention_bias or config.qkv_bias:
        attention += q + 2 * kv
    if config.bias or config.attention_bias:
        attention += d
    attention += {"none": 0, "head": 2 * config.head_dim, "projection": q + kv}[
        config.qk_norm
    ]
    inputs = 2 if config.mlp in GATED else 1  # matrices [d, f]
    mlp = (inputs + 1) * d * f
    if config.bias:
        mlp += inputs * f + d
    if config.n_experts:
        mlp = config.n_experts * (mlp + d)
    norms = 4 if config.residual == "sandwich" else 2
    total = config.n_layers * (attention + mlp + norms * norm)

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


def expert_parameters(config: TransformerConfig) -> int:
    """Returns the number of parameters of all experts, without routers; 0 of a dense model."""
    one = 3 * config.d_model * config.d_ff
    return config.n_layers * config.n_experts * one


def active_parameters(config: TransformerConfig, head: str = "lm") -> int:
    """Returns how many parameters a token is computed with: experts_per_token of the experts."""
    total = parameters(config, head)
    if not config.n_experts:
        return total
    idle = config.n_experts - config.experts_per_token
    return total - idle * expert_parameters(config) // config.n_experts


def token_flops(parameters: Number, c: TransformerConfig, time: int) -> Number:
    """Returns PaLM's FLOPs of training one token: 6 N + 12 L H Q T.

    N are the parameters that the token is computed with (`active_parameters`), Q is the width of a
    head and T the sequence length, in a window layer at most the window. Recomputation does not
    count, so that the utilization predicted from it is MFU, not hardware utilization.

    Source: Chowdhery et al. 2022, appendix B.
    """
    seen = sum(_visible(c, i, time) for i in range(c.n_layers))
    return 6 * parameters + 12 * seen * c.n_heads * c.head_dim


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
    fewer heads; SwiGLU and GEGLU keep gate, up, activated gate and their product; without dropout
    there is neither mask nor copy; a mixture has an MLP's numbers per chosen expert. Attention is
    the plain one, without a window. The kernels `splash` and `cudnn` keep no scores but one float32
    per query and head, their log-sum-exp.

    Args:
      size: bytes per number, 2 for bf16 and fp16.
    """
    tokens = batch * time
    drop = int(config.dropout > 0)
    q = config.n_heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    scores = tokens * config.n_heads * time * (size + drop * (size + 1))
    if config.attention != "einsum":
        scores = tokens * config.n_heads * 4.0
    hidden = 4 if config.mlp in GATED else 2
    # Input; query; key; value; input of the output projection. A byte per element of the mask.
    attention = size * (config.d_model + 2 * q + 2 * kv) + drop * config.d_model
    mlp = size * (config.d_model + hidden * config.d_ff) + drop * config.d_model
    if config.n_experts:
        # Each pair of token and expert has its own input and output; the router is float32.
        pair = size * (2 * config.d_model + hidden * config.d_ff)
        mlp = size * config.d_model + config.experts_per_token * pair
        mlp += 4 * config.n_experts + drop * config.d_model
    return {
        "attention": tokens * attention,
        "scores": scores,
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
    """Returns the bytes of the keys and values of `batch` rows of `length` tokens.

    A window layer keeps the last `window` of them.
    """
    kept = sum(_visible(config, i, length) for i in range(config.n_layers))
    return 2 * config.kv_heads * config.head_dim * kept * batch * size


def _visible(config: TransformerConfig, layer: int, length: int) -> int:
    """Returns how many of `length` tokens the last one sees in a layer."""
    if config.kind(layer) != "window":
        return length
    assert config.window is not None
    return min(length, config.window)


def number_bytes(c: TransformerConfig) -> float:
    """Returns the bytes of an activation."""
    return 2.0 if c.activation_dtype == "bfloat16" else 4.0
