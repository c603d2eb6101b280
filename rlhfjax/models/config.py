"""What a Transformer is: every shape and option of the family; its combinations are checked when it is made."""

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
    """Shape and options of a decoder-only Transformer (GPT-1, 2 and 3, Llama, Qwen2 and GPT-NeoX families).

    `n_kv_heads=None` is multi-head attention, `d_head=None` is `d_model / n_heads`. Parameters are always
    float32; `dtype` is what activations and matrix products are computed in. With A attention, M the MLP and N_1,
    N_2 two norms, a layer of `residual` makes of x
      "pre_norm"  y + M(N_2(y)), y = x + A(N_1(x)); a final norm after the last layer (GPT-2, Llama),
      "post_norm" N_2(y + M(y)), y = N_1(x + A(x)); no final norm (Vaswani et al. 2017, section 3.1; GPT-1),
      "parallel"  x + A(N_1(x)) + M(N_2(x)); a final norm (GPT-NeoX; Black et al. 2022, section 2.1).
    Raises ConfigError, naming the field, for an impossible combination.
    """

    vocab_size: Tokens
    d_model: Size
    n_layers: Depth
    n_heads: Size
    d_ff: Size
    max_length: Tokens
    n_kv_heads: Size | None = None
    d_head: Size | None = None
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: RopeTheta = 10000.0
    rope_fraction: PositiveShare = 1.0  # of each head, its first dimensions: what is rotated; the rest has no positions
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: NormEpsilon = 1e-5
    mlp: Literal["swiglu", "gelu", "gelu_exact"] = (
        "swiglu"  # "gelu" is its tanh form, "gelu_exact" x Phi(x)
    )
    residual: Literal["pre_norm", "post_norm", "parallel"] = "pre_norm"
    bias: bool = False  # of every projection
    qkv_bias: bool = False  # of query, key and value, where `bias` is off
    tie_embeddings: bool = True
    dropout: ShareBelow1 = (
        0.0  # of the embedding, the attention weights and both residual branches
    )
    init_std: Positive = 0.02
    scale_residual_init: bool = (
        False  # GPT-2: residual projections start 1/sqrt(2 n_layers) smaller
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    # what of a layer is made again in the backward pass: nothing; all but products with weights; all; "offload" is
    # "dots" with those products kept in the host's memory
    remat: Literal["none", "dots", "full", "offload"] = "none"
    # without a cache: ours, anywhere; GPUs' or TPUs' kernels (models.kernels)
    attention: Literal["einsum", "cudnn", "splash"] = "einsum"

    def __post_init__(self):
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}: "
                "choose a divisor, or set model.d_head"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.kv_heads} does not divide model.n_heads = {self.n_heads}: choose a divisor"
            )
        if self.positions == "rope" and (self.rope_dim % 2 or not self.rope_dim):
            raise ConfigError(
                f"model.rope_fraction = {self.rope_fraction} of a head of {self.head_dim} is {self.rope_dim}: "
                "model.positions = 'rope' rotates pairs, so it must be even and at least 2"
            )
        if self.attention != "einsum" and self.dropout:
            raise ConfigError(
                f"model.attention = {self.attention!r} has no dropout: model.dropout is {self.dropout}"
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
