"""What a Transformer is: every shape and option of the family, checked when it is made."""

import dataclasses

from rlhfjax.errors import ConfigError

CHOICES = {
    "positions": ("rope", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "mlp": ("swiglu", "gelu", "gelu_exact"),
    "residual": ("pre_norm", "post_norm", "parallel"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full", "offload"),
    "attention": ("einsum", "cudnn", "splash"),
}
SIZES = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_length", "n_kv_heads", "d_head")


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

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_length: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # of each head, its first dimensions: what is rotated; the rest has no positions
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: str = "swiglu"  # "gelu" is its tanh form, "gelu_exact" x Phi(x)
    residual: str = "pre_norm"
    bias: bool = False  # of every projection
    qkv_bias: bool = False  # of query, key and value, where `bias` is off
    tie_embeddings: bool = True
    dropout: float = 0.0  # of the embedding, the attention weights and both residual branches
    init_std: float = 0.02
    scale_residual_init: bool = False  # GPT-2: residual projections start 1/sqrt(2 n_layers) smaller
    dtype: str = "float32"
    scan_layers: bool = False
    # what of a layer is made again in the backward pass: nothing; all but products with weights; all; "offload" is
    # "dots" with those products kept in the host's memory
    remat: str = "none"
    # without a cache: ours, anywhere; GPUs' or TPUs' kernels (models.kernels)
    attention: str = "einsum"

    def __post_init__(self):
        self._check_values()
        self._check_shapes()

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

    def _check_values(self):
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name} is {value}: it must be at least 1")
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}: accepted are {', '.join(accepted)}")

    def _check_shapes(self):
        if self.d_head is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}: "
                "choose a divisor, or set model.d_head"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"model.n_kv_heads = {self.kv_heads} does not divide model.n_heads = {self.n_heads}: choose a divisor"
            )
        if not 0 < self.rope_fraction <= 1:
            raise ConfigError(f"model.rope_fraction is {self.rope_fraction}: it must be above 0 and at most 1")
        if self.positions == "rope" and (self.rope_dim % 2 or not self.rope_dim):
            raise ConfigError(
                f"model.rope_fraction = {self.rope_fraction} of a head of {self.head_dim} is {self.rope_dim}: "
                "model.positions = 'rope' rotates pairs, so it must be even and at least 2"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.attention != "einsum" and self.dropout:
            raise ConfigError(f"model.attention = {self.attention!r} has no dropout: model.dropout is {self.dropout}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ConfigError(f"model.attention = 'cudnn' is for model.dtype = 'bfloat16', not {self.dtype!r}")
        if not (self.init_std > 0 and self.norm_eps > 0 and self.rope_theta > 0):
            raise ConfigError("model.init_std, model.norm_eps and model.rope_theta must be above 0")
