"""The config of a Transformer: every shape and option of the model family."""

import dataclasses
from typing import Literal

from rlhfjax.errors import ConfigError
from rlhfjax.ranges import (
    Count,
    Depth,
    NonNegative,
    NormEpsilon,
    Positive,
    PositiveShare,
    RopeFactor,
    RopeTheta,
    ShareBelow1,
    Size,
    Tokens,
)

Attention = Literal["full", "window", "full_no_rope"]
Dtype = Literal["auto", "float32", "bfloat16", "bfloat16_products"]
GATED = ("swiglu", "geglu")  # kinds of an MLP with a gate


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for a context longer than the one trained on.

    With f a frequency of the plain RoPE (radians per token), L = original_length and s = factor:
      "linear" f / s (Chen et al. 2023, section 3.2),
      "llama3" f / s for wavelengths 2 pi / f above L / low_frequency, f below L / high_frequency,
               between them (1 - m) f / s + m f with m linear in L f / 2 pi (Grattafiori et al.
               2024, section 3.4.3; the released code),
      "yarn"   (1 - m) f / s + m f with m linear in the index of f, 1 where f turns beta_fast times
               within L and 0 where it turns beta_slow times; cos and sin are multiplied by
               attention_factor, so scores by its square (Peng et al. 2023, section 3.4).

    Raises:
      ConfigError: an impossible combination; the message names the field.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Which frequencies are lowered; see the class."""
    factor: RopeFactor = 1.0
    """How many times longer the context becomes."""
    original_length: Tokens | None = None
    """Context before the scaling, tokens; llama3 and yarn need it."""
    low_frequency: Positive = 1.0
    """llama3: frequencies with fewer turns than this within original_length are divided by
    factor."""
    high_frequency: Positive = 4.0
    """llama3: frequencies with more turns than this within original_length stay as they are."""
    beta_fast: Positive = 32.0
    """yarn: frequencies with more turns than this within original_length stay as they are."""
    beta_slow: Positive = 1.0
    """yarn: frequencies with fewer turns than this within original_length are divided by factor."""
    attention_factor: Positive | None = None
    """yarn: factor of cos and sin; None: 0.1 ln(factor) + 1."""

    def __post_init__(self):
        where = "model.rope_scaling"
        if self.kind in ("llama3", "yarn") and self.original_length is None:
            raise ConfigError(
                f"{where}.original_length is None: {where}.kind = {self.kind!r} needs the "
                "number of tokens that the model was trained on"
            )
        if self.low_frequency >= self.high_frequency:
            raise ConfigError(
                f"{where}.low_frequency = {self.low_frequency}: "
                f"must be below {where}.high_frequency = {self.high_frequency}"
            )
        if self.beta_slow >= self.beta_fast:
            raise ConfigError(
                f"{where}.beta_slow = {self.beta_slow}: "
                f"must be below {where}.beta_fast = {self.beta_fast}"
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and options of a decoder-only Transformer; docs/models.md has the families it covers.

    Parameters are always float32. With attention A, MLP M and two norms N_1 and N_2, a layer of
    `residual` maps x to
      "pre_norm"  y + M(N_2(y)), y = x + A(N_1(x)); a final norm after the last layer (GPT-2,
                  Llama),
      "post_norm" N_2(y + M(y)), y = N_1(x + A(x)); no final norm (Vaswani et al. 2017, section 3.1;
                  GPT-1),
      "parallel"  x + A(N_1(x)) + M(N_2(x)); a final norm (Black et al. 2022, section 2.1;
                  GPT-NeoX),
      "norm_after" y + N_2(M(y)), y = x + N_1(A(x)); a final norm (OLMo 2),
      "sandwich"  y + N_4(M(N_3(y))), y = x + N_2(A(N_1(x))); a final norm (Gemma 2 and 3).

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
    """Width of the MLP, of a mixture that of one expert."""
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
    rope_scaling: RopeScaling = RopeScaling()
    """Lower rotary frequencies, for a longer context."""
    attention_pattern: tuple[Attention, ...] = ("full",)
    """Attention of the layers, repeated over the depth: to all earlier tokens, to the last `window`
    tokens, or to all without rotary positions."""
    window: Tokens | None = None
    """Tokens that a "window" layer attends to, its own included."""
    window_rope_theta: RopeTheta | None = None
    """Base of the rotary wavelengths of "window" layers, which then have no rope_scaling; None:
    that of all layers."""
    attention_scale: Positive | None = None
    """Factor of the attention scores; None: 1 / sqrt(head width)."""
    attention_softcap: Positive | None = None
    """Attention scores s become c tanh(s / c) with this c; None: they stay as they are."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Queries and keys are normalized before the rotation: each head, or all heads together."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the norms."""
    norm_eps: NormEpsilon = 1e-5
    """Epsilon of the norms."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + scale, and scale starts at 0."""
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    """Kind of the MLP; gelu, also in geglu, is the tanh form, gelu_exact is x Phi(x)."""
    n_experts: Count = 0
    """Number of experts in every layer, in place of the MLP; 0: a dense model."""
    experts_per_token: Count = 0
    """Number of experts that a token is routed to."""
    normalize_routing: bool = True
    """The probabilities of a token's experts are divided by their sum."""
    router_loss: NonNegative = 0.0
    """Coefficient of the load-balancing loss in training; see models.experts.balance."""
    residual: Literal["pre_norm", "post_norm", "parallel", "norm_after", "sandwich"] = (
        "pre_norm"
    )
    """Where a layer has its norms and sums; see the class."""
    bias: bool = False
    """Every projection has a bias."""
    qkv_bias: bool = False
    """Query, key and value have biases even without `bias`."""
    attention_bias: bool = False
    """All projections of attention have biases even without `bias`."""
    scale_embedding: bool = False
    """Token embeddings are multiplied by sqrt(d_model)."""
    logit_softcap: Positive | None = None
    """Logits l become c tanh(l / c) with this c; None: they stay as they are."""
    tie_embeddings: bool = True
    """The output projection is the transposed token embedding."""
    dropout: ShareBelow1 = 0.0
    """Dropout rate of the embedding, the attention weights and both residual branches."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = False
    """Residual projections start 1 / sqrt(2 n_layers) smaller, as in GPT-2."""
    dtype: Dtype = "float32"
    """Dtype of activations and of the inputs of matrix products. bfloat16_products: float32
    activations, and products of bfloat16 inputs with float32 outputs. auto: when a stage begins,
    it becomes the one that its devices compute fastest."""
    scan_layers: bool = False
    """Layers are stacked and run by one loop: faster to compile."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """Activations that the backward pass recomputes: none, all except the outputs of products with
    weights (dots; those of experts are recomputed), or all; offload is dots with these outputs kept
    in host memory."""
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
        self._validate_attention()
        self._validate_experts()

    def _validate_attention(self):
        pattern = self.attention_pattern
        if not pattern:
            raise ConfigError(
                "model.attention_pattern is empty: it names the attention of at least one layer"
            )
        if ("window" in pattern) != (self.window is not None):
            raise ConfigError(
                f"model.window = {self.window} with model.attention_pattern = {pattern}: "
                'a width is needed if, and only if, a layer is "window"'
            )
        rotary = {
            "a full_no_rope layer": "full_no_rope" in pattern,
            "model.rope_scaling": self.rope_scaling.kind != "none",
            "model.window_rope_theta": self.window_rope_theta is not None,
        }
        for name, is_set in rotary.items():
            if is_set and self.positions != "rope":
                raise ConfigError(f"{name}: model.positions is {self.positions!r}")
        if self.window_rope_theta is not None and self.window is None:
            raise ConfigError(
                f"model.window_rope_theta = {self.window_rope_theta}: no layer is a window"
            )
        if self.attention == "cudnn" and self.attention_softcap is not None:
            raise ConfigError(
                f"model.attention_softcap = {self.attention_softcap}: "
                "model.attention = 'cudnn' cannot cap scores; einsum and splash can"
            )
        if self.attention != "einsum" and self.dropout:
            raise ConfigError(
                f"model.attention = {self.attention!r} has no dropout: "
                f"model.dropout is {self.dropout}"
            )
        if self.attention == "cudnn" and self.dtype not in ("auto", "bfloat16"):
            raise ConfigError(
                f"model.attention = 'cudnn' is for model.dtype = 'bfloat16', not {self.dtype!r}"
            )

    def _validate_experts(self):
        if not self.n_experts:
            if self.experts_per_token or self.router_loss:
                raise ConfigError(
                    f"model.experts_per_token = {self.experts_per_token} and "
                    f"model.router_loss = {self.router_loss}: model.n_experts is 0"
                )
            return
        if not 1 <= self.experts_per_token <= self.n_experts:
            raise ConfigError(
                f"model.experts_per_token = {self.experts_per_token}: must be from 1 to "
                f"model.n_experts = {self.n_experts}"
            )
        if self.mlp not in GATED or self.bias:
            raise ConfigError(
                f"model.n_experts = {self.n_experts} with model.mlp = {self.mlp!r} and "
                f"model.bias = {self.bias}: experts are swiglu or geglu, without biases"
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
    def activation_dtype(self) -> Literal["float32", "bfloat16"]:
        """Dtype of activations. Raises ConfigError if the dtype is "auto" still."""
        return "bfloat16" if self._resolved_dtype == "bfloat16" else "float32"

    @property
    def product_dtype(self) -> Literal["float32", "bfloat16"]:
        """Dtype of the inputs of products. Raises ConfigError if the dtype is "auto" still."""
        return "float32" if self._resolved_dtype == "float32" else "bfloat16"

    @property
    def _resolved_dtype(self) -> Dtype:
        if self.dtype == "auto":
            raise ConfigError(
                "model.dtype='auto': a stage resolves it when it begins; to compute without one, "
                "set float32, bfloat16 or bfloat16_products"
            )
        return self.dtype

    @property
    def kinds(self) -> tuple[Attention, ...]:
        """The different kinds of attention, in the order of the first layer of each."""
        return tuple(dict.fromkeys(self.attention_pattern[: self.n_layers]))

    def kind(self, layer: int) -> Attention:
        """The kind of attention of a layer, counted from 0."""
        return self.attention_pattern[layer % len(self.attention_pattern)]

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows the last layer; a post-norm layer ends with its own."""
        return self.residual != "post_norm"
