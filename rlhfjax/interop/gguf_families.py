"""The architectures of llama.cpp that our Transformer covers, as data.

Source: llama.cpp's src/models/*.cpp, and the names in gguf-py/gguf/constants.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rlhfjax.interop.names import QKV, Table
from rlhfjax.models.config import Attention

OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""Factors that divide the rotary frequencies, [rope_dim / 2]: how a file has kind "llama3"."""
# TransformerConfig fields and their keys, after the architecture's name and a dot.
KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "d_ff": "feed_forward_length",
    "max_length": "context_length",
    "n_kv_heads": "attention.head_count_kv",
    "d_head": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "rope_fraction": "rope.dimension_count",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "window": "attention.sliding_window",
    "window_rope_theta": "rope.freq_base_swa",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "n_experts": "expert_count",
    "experts_per_token": "expert_used_count",
}
# Keys that are accepted with these values, which change nothing.
NEUTRAL: dict[str, tuple] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.finetuned": (False, True),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    # This names the order of rows that `gguf.half_split` undoes.
    "tensor_data_layout": ("Meta AI original pth",),
}
Scaling = Literal["linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes for one `general.architecture`, beyond the metadata of a file."""

    layer: dict[str, str]
    """Modules of one layer: name in the file -> path in the parameter tree, as in names.Table."""
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """TransformerConfig fields that are the same in the whole architecture."""
    neighbors: bool = False
    """Rotates neighbors, so that a file has the rows of Q and K in another order than ours."""
    biases: bool = False
    """Has the biases that are in the file, and else none."""
    partly_rotated: bool = False
    """Rotates the first rope.dimension_count dimensions of a head; else all."""
    square: bool = False
    """The heads together are as wide as the residual stream."""
    period: int = 1
    """One in this many layers has no window; 1: llama.cpp ignores windows."""
    pattern: tuple[Attention, ...] = ("full",)
    """Attention of the layers where none has a window."""
    window: int | None = None
    """Value of an absent attention.sliding_window."""
    window_rope_theta: float | None = None
    """Value of an absent rope.freq_base_swa; None: layers with a window rotate as the others."""
    softcaps: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """attention_softcap or logit_softcap -> value of an absent key."""
    deepest: int = 0
    """Models with this number of layers divide scores by sqrt(d_model / n_heads)."""
    scalings: tuple[Scaling, ...] = ("linear", "yarn")
    """Kinds of RopeScaling."""
    experts: Literal["none", "some", "all"] = "none"
    """Which models of the architecture are mixtures of experts."""
    expert_width: str = "feed_forward_length"
    """Key of the width of an expert."""

    @property
    def table(self) -> Table:
        """The table of its tensors."""
        return Table(
            prefix="",
            layers="blk.{i}.",
            trunk={"token_embd": "embed/tokens", "output_norm": "norm"},
            layer=self.layer,
            output=OUTPUT,
            stacked={} if self.experts == "none" else _EXPERTS,
        )


_ATTENTION = {
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_output": "attention/out",
}
_MLP = {"ffn_gate": "mlp/gate", "ffn_up": "mlp/up", "ffn_down": "mlp/down"}
_EXPERTS = {
    "ffn_gate_exps": "mlp/gate",
    "ffn_up_exps": "mlp/up",
    "ffn_down_exps": "mlp/down",
}
_ROUTER = {"ffn_gate_inp": "mlp/router"}
_QK_NORMS = {"attn_q_norm": "attention/query_norm", "attn_k_norm": "attention/key_norm"}
_TWO_NORMS = {"attn_norm": "norm_1", "ffn_norm": "norm_2"}
_NORMS_AFTER = {"post_attention_norm": "norm_1", "post_ffw_norm": "norm_2"}
_FOUR_NORMS = {
    "attn_norm": "norm_1",
    "post_attention_norm": "norm_2",
    "ffn_norm": "norm_3",
    "post_ffw_norm": "norm_4",
}
_FUSED = {
    "attn_qkv": QKV,
    "attn_output": "attention/out",
    "ffn_up": "mlp/gate mlp/up",
    "ffn_down": "mlp/down",
}
_PLAIN = _TWO_NORMS | _ATTENTION | _MLP
_LLAMA = Architecture(
    layer=_PLAIN | _ROUTER,
    neighbors=True,
    biases=True,
    scalings=("linear", "llama3", "yarn"),
    experts="some",  # Mixtral
)
_GEMMA = Architecture(
    layer=_PLAIN,
    fixed={
        "norm_plus_one": True,  # a file has 1 + scale
        "scale_embedding": True,
        "mlp": "geglu",
        "tie_embeddings": True,
    },
)
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    layer=_FOUR_NORMS | _ATTENTION | _MLP,
    fixed=_GEMMA.fixed | {"residual": "sandwich"},
    period=2,
    window=4096,
    softcaps={"attention_softcap": 50.0, "logit_softcap": 30.0},
    deepest=46,
)
# In the order in which an export tries them.
ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": Architecture(layer=_PLAIN, fixed={"qkv_bias": True}, square=True),
    "llama": _LLAMA,
    "qwen3": Architecture(layer=_PLAIN | _QK_NORMS, fixed={"qk_norm": "head"}),
    "qwen3moe": Architecture(
        layer=_TWO_NORMS | _ATTENTION | _QK_NORMS | _ROUTER,
        fixed={"qk_norm": "head"},
        experts="all",
        expert_width="expert_feed_forward_length",
    ),
    "smollm3": Architecture(
        layer=_PLAIN,
        neighbors=True,
        pattern=("full", "full", "full", "full_no_rope"),
    ),
    "olmo2": Architecture(
        layer=_ATTENTION | _MLP | _QK_NORMS | _NORMS_AFTER,
        fixed={
            "qk_norm": "projection",
            "residual": "norm_after",
            "tie_embeddings": False,
        },
        square=True,
    ),
    "phi3": Architecture(layer=_TWO_NORMS | _FUSED, partly_rotated=True, square=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": dataclasses.replace(
        _GEMMA2,
        layer=_FOUR_NORMS | _ATTENTION | _MLP | _QK_NORMS,
        fixed={
            field: value
            for field, value in _GEMMA2.fixed.items()
            if field != "tie_embeddings"
        }
        | {"qk_norm": "head"},
        period=6,
        window=None,
        window_rope_theta=10000.0,
        softcaps={"logit_softcap": None},
        deepest=62,
        scalings=("linear",),
    ),
}
