"""The config of a Transformer: every shape and option of the model family."""

import dataclasses
from typing import Literal

from rlhfjax.errors import ConfigError
from rlhfjax.ranges import (
    Depth,
    NormEpsilon,
    Positive,
    PositiveShare,
    RopeTheta,
    ShareBelow1,
    Size,
    Tokens,
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and options of a decoder-only Transformer: the GPT, Llama, Qwen2 and GPT-NeoX families.

    Parameters are always float32. With attention A, MLP M and two norms N_1 and N_2, a layer of
    `residual` maps x to
      "pre_norm"  y + M(N_2(y)), y = x + A(N_1(x)); a final norm after the last layer (GPT-2,
                  Llama),
      "post_norm" N_2(y + M(y)), y = N_1(x + A(x)); no final norm (Vaswani et al. 2017, section 3.1;
                  GPT-1),
      "parallel"  x + A(N_1(x)) + M(N_2(x)); a final norm (Black et al. 2022, section 2.1;
                  GPT-NeoX).

    Raises:
      ConfigError: an impossible combination; the message names the field.
    """

    vocab_size: Tokens
    """Number of token embeddings, at least the tokenizer's vocabulary."""
    d_model: Size
    """Width of the residual stream."""
    n_layers: Depth
    """Number of layers."""
    n_heads: Size
    """Number of query heads."""
    d_ff: Size
    """Width of the MLP."""
    max_length: Tokens
    """Longest sequence, tokens."""
    n_kv_heads: Size | None = None
    """Number of key and value heads; None: n_heads, multi-head attention."""
    d_head: Size | None = None
    """Width of a head; None: d_model / n_heads."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary or learned positions."""
    rope_theta: RopeTheta = 10000.0
    """Base of the rotary wavelengths."""
    rope_fraction: PositiveShare = 1.0
    """Fraction of each head, its first dimensions, that is rotated; the rest has no positions."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the norms."""
    norm_eps: NormEpsilon = 1e-5
    """Epsilon of the norms."""
    mlp: Literal["swiglu", "gelu", "gelu_exact"] = "swiglu"
    """Kind of the MLP; gelu is the tanh form, gelu_exact is x Phi(x)."""
    residual: Literal["pre_norm", "post_norm", "parallel"] = "pre_norm"
    """Where a layer has its norms and sums; see the class."""
    bias: bool = False
    """Every projection has a bias."""
    qkv_bias: bool = False
    """Query, key and value have biases even without `bias`."""
    tie_embeddings: bool = True
    """The output projection is the transposed token embedding."""
    dropout: ShareBelow1 = 0.0
    """Dropout rate of the embedding, the attention weights and both residual branches."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = False
    """Residual projections start 1 / sqrt(2 n_layers) smaller, as in GPT-2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    scan_layers: bool = False
    """Layers are stacked and run by one loop: faster to compile."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """Activations that the backward pass recomputes: none, all except matmul outputs, or all;
    offload is dots with the matmul outputs kept in host memory."""
    attention: Literal["einsum", "cudnn", "splash"] = "einsum"
    """Kernel of attention without a cache: ours, which runs anywhere, or a GPU's or TPU's."""

    def __post_init__(self):
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}: "
                "choose a divisor, or set model.d_head"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.kv_heads} does not divide "
                f"model.n_heads = {self.n_heads}: choose a divisor"
            )
        if self.positions == "rope" and (self.rope_dim % 2 or not self.rope_dim):
            raise ConfigError(
                f"model.rope_fraction = {self.rope_fraction} of a head of {self.head_dim} "
                f"is {self.rope_dim}: must be even and at least 2 with positions='rope'"
            )
        if self.attention != "einsum" and self.dropout:
            raise ConfigError(
                f"model.attention = {self.attention!r} has no dropout: "
                f"model.dropout is {self.dropout}"
            )
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ConfigError(
                f"model.attention = 'cudnn' is for model.dtype = 'bfloat16', not {self.dtype!r}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def rope_dim(self) -> int:
        """How many dimensions of a head are rotated: the whole part of head_dim * rope_fraction."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows the last layer; a post-norm layer ends with its own."""
        return self.residual != "post_norm"
