"""How the config.json of each Hugging Face family spells a TransformerConfig, as data."""

import dataclasses
from typing import Any, Literal

# Keys without effect on what a model computes: files, tokens, labels, training, generation, and
# which kernels and tools were used.
_SILENT = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
_experts_implementation _flash_attn_2_enabled _name_or_path architectures attn_implementation
bos_token_id cache_implementation dtype eos_token_id finetuning_task gradient_checkpointing
id2label is_llama_config keys_to_ignore_at_inference label2id license
mask_token_id model_max_length model_type num_labels output_attentions output_hidden_states
pad_token_id prefix predict_special_tokens problem_type return_dict sep_token_id
task_specific_params tokenizer_class torch_dtype torchscript transformers.js_config
tf_legacy_loss transformers_version transformers_weights unk_token_id unsloth_fixed unsloth_version
use_cache use_flash_attention use_flash_attn classifier_dropout max_sequence_length n_ctx
pretraining_tp reorder_and_upcast_attn summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj
bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
SILENT = frozenset(_SILENT.split())
# Keys accepted in any family with these values, which change nothing. null never changes anything.
NEUTRAL: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False, True),  # all of ours are decoders
    "is_encoder_decoder": (False,),
    "layer_types": ("full_attention",),
    "pruned_heads": ({},),
    "rope_parameters.rope_type": ("default",),
    "rope_parameters.type": ("default",),
    "rope_scaling.rope_type": ("default",),
    "rope_scaling.type": ("default",),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
    "use_bidirectional_attention": (False,),
}
# Names of `mlp` in `transformers`; an export writes the first.
_GELU = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"),
    "gelu_exact": ("gelu",),
}
_SWIGLU = {"swiglu": ("silu", "swish")}
_GEGLU = {"geglu": ("gelu_pytorch_tanh", *_GELU["gelu"])}
# The types of fields that are not int.
KINDS = {
    "norm_eps": float,
    "init_std": float,
    "dropout": float,
    "tie_embeddings": bool,
    "bias": bool,
    "attention_bias": bool,
    "normalize_routing": bool,
    "router_loss": float,
    "attention_softcap": float,
    "logit_softcap": float,
    "mlp": str,
}
# Fields for which a null key differs from an absent one.
NULLABLE = ("n_kv_heads", "d_head", "attention_softcap", "logit_softcap")
ROPE_DEFAULTS = {"rope_theta": 10000.0, "rope_fraction": 1.0}
Scaling = Literal["linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` spells a TransformerConfig."""

    causal: str
    """Name of the language model's class."""
    classifier: str
    """Name of the sequence classifier's class; with one label it is a reward model."""
    keys: dict[str, str]
    """TransformerConfig field -> its key, or several keys with its value, separated by blanks."""
    activations: dict[str, tuple[str, ...]]
    """TransformerConfig.mlp -> its names."""
    defaults: dict[str, Any]
    """TransformerConfig field -> value of an absent key. Without one, the key is required."""
    fixed: dict[str, Any]
    """Fields that are the same in the whole family."""
    rope: dict[str, str] = dataclasses.field(default_factory=dict)
    """rope_theta and perhaps rope_fraction and window_rope_theta -> its key. Empty: no RoPE."""
    scalings: tuple[Scaling, ...] = ("linear", "llama3", "yarn")
    """Kinds of RopeScaling that the family has."""
    layers: Literal["full", "window", "late_window", "local_global", "no_rope"] = "full"
    """How the kinds of attention of the layers are described; see `hf_layers`."""
    window: int | None = None
    """Value of an absent sliding_window."""
    period: int = 1
    """For "local_global": one in this many layers is global."""
    parallel: str = ""
    """Key for parallel attention and MLP, true if absent. Empty: they never are parallel."""
    query_scalar: str = ""
    """Key of s, the attention scores' factor being 1 / sqrt(s). Empty: the head width."""
    heads_divide: bool = False
    """`transformers` refuses a width that is not a multiple of the number of heads."""
    other_keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Fields -> the key that some versions of `transformers` write instead."""
    neutral: dict[str, tuple] = dataclasses.field(default_factory=dict)
    """Further keys with the values, or elements of lists, that change nothing."""
    silent: frozenset[str] = frozenset()
    """Further keys that change nothing, whatever they hold."""
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys that an export writes besides those above."""


_SHARED = {
    "vocab_size": "vocab_size",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_KEYS = _SHARED | {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_length": "max_position_embeddings",
    "mlp": "hidden_act",
}
_LLAMA_KEYS = _KEYS | {
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "norm_eps": "rms_norm_eps",
}
_LLAMA = Family(
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    keys=_LLAMA_KEYS | {"attention_bias": "attention_bias", "bias": "mlp_bias"},
    activations=_SWIGLU,
    defaults={
        "init_std": 0.02,
        "tie_embeddings": False,
        "n_kv_heads": None,
        "d_head": None,
        "norm_eps": 1e-6,
        "mlp": "silu",
        "attention_bias": False,
        "bias": False,
    },
    fixed={"positions": "rope", "norm": "rmsnorm"},
    rope={"rope_theta": "rope_theta"},
    heads_divide=True,
    # Not interleaved: halves are rotated, as ours are.
    neutral={"attention_dropout": (0.0,), "rope_interleaved": (False,)},
)
_QWEN2 = dataclasses.replace(
    _LLAMA,
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    heads_divide=False,
    keys=_LLAMA_KEYS,
    fixed=_LLAMA.fixed | {"qkv_bias": True},
    layers="late_window",
    window=4096,
    neutral={"attention_dropout": (0.0,), "use_mrope": (False,)},
)
_QWEN3 = dataclasses.replace(
    _QWEN2,
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    keys=_LLAMA_KEYS | {"attention_bias": "attention_bias"},
    defaults=_LLAMA.defaults | {"d_head": 128},
    fixed=_LLAMA.fixed | {"qk_norm": "head"},
)
_MISTRAL = dataclasses.replace(
    _LLAMA,
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    heads_divide=False,
    keys=_LLAMA_KEYS,
    layers="window",
    window=4096,
    neutral={"attention_dropout": (0.0,)},
)
_SMOLLM3 = dataclasses.replace(
    _LLAMA,
    causal="SmolLM3ForCausalLM",
    classifier="SmolLM3ForSequenceClassification",
    heads_divide=False,
    defaults=_LLAMA.defaults | {"tie_embeddings": True, "rope_theta": 2e6},
    layers="no_rope",
    neutral={"attention_dropout": (0.0,), "use_sliding_window": (False,)},
    # Named in the release, without effect unless use_sliding_window is true.
    silent=frozenset(("max_window_layers", "sliding_window")),
)
_OLMO2 = dataclasses.replace(
    _LLAMA,
    causal="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    heads_divide=False,
    keys=_QWEN3.keys,
    defaults=_LLAMA.defaults | {"norm_eps": 1e-5},
    fixed=_LLAMA.fixed | {"qk_norm": "projection", "residual": "norm_after"},
    neutral={"attention_dropout": (0.0,)},
)
_PHI3 = dataclasses.replace(
    _MISTRAL,
    causal="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    defaults=_LLAMA.defaults | {"norm_eps": 1e-5},
    rope={"rope_theta": "rope_theta", "rope_fraction": "partial_rotary_factor"},
    scalings=(),  # `transformers` takes "yarn" for "longrope" here
    window=None,
    neutral={
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "embd_pdrop": (0.0,),
        "resid_pdrop": (0.0,),
    },
    # The code that auto_map names in the releases is that of `transformers`. The other is for
    # "longrope".
    silent=frozenset(("auto_map", "original_max_position_embeddings")),
)
_GEMMA = dataclasses.replace(
    _LLAMA,
    causal="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    heads_divide=False,
    keys=_QWEN3.keys,
    # Released as "gelu", which means the tanh form (GemmaConfig of `transformers` says so).
    activations={"geglu": (*_GEGLU["geglu"], "gelu")},
    defaults=_LLAMA.defaults
    | {"tie_embeddings": True, "d_head": 256, "mlp": "gelu_pytorch_tanh"},
    fixed=_LLAMA.fixed | {"norm_plus_one": True, "scale_embedding": True},
    neutral={
        "attention_dropout": (0.0,),
        "hidden_activation": _GEGLU["geglu"],
    },
)
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    heads_divide=True,
    keys=_QWEN3.keys
    | {
        "mlp": "hidden_activation",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    activations=_GEGLU,
    defaults=_GEMMA.defaults | {"attention_softcap": 50.0, "logit_softcap": 30.0},
    fixed=_GEMMA.fixed | {"residual": "sandwich"},
    layers="local_global",
    window=4096,
    period=2,
    query_scalar="query_pre_attn_scalar",
    neutral={"attention_dropout": (0.0,)},
    silent=frozenset(("hidden_act",)),  # hidden_activation counts
)
_GEMMA3 = dataclasses.replace(
    _GEMMA2,
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    # `transformers` has attn_logit_softcapping here and does nothing with it.
    keys=_QWEN3.keys
    | {"mlp": "hidden_activation", "logit_softcap": "final_logit_softcapping"},
    defaults=_GEMMA.defaults
    | {"logit_softcap": None, "rope_theta": 1e6, "window_rope_theta": 1e4},
    fixed=_GEMMA2.fixed | {"qk_norm": "head"},
    rope={"rope_theta": "rope_theta", "window_rope_theta": "rope_local_base_freq"},
    period=6,
    neutral={
        "attention_dropout": (0.0,),
        "rope_parameters.sliding_attention.rope_type": ("default",),
    },
)
_GPT2 = Family(
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    keys=_SHARED
    | {
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "max_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop embd_pdrop attn_pdrop",
        "mlp": "activation_function",
    },
    activations=_GELU,
    defaults={
        "init_std": 0.02,
        "tie_embeddings": True,
        "norm_eps": 1e-5,
        "dropout": 0.1,
        "d_ff": None,
        "mlp": "gelu_new",
    },
    fixed={
        "positions": "learned",
        "norm": "layernorm",
        "bias": True,
        "scale_residual_init": True,
    },
    neutral={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
)
_ROUTING_KEYS = {
    "experts_per_token": "num_experts_per_tok",
    "router_loss": "router_aux_loss_coef",
}
_QWEN3_MOE = dataclasses.replace(
    _QWEN3,
    causal="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    keys=_QWEN3.keys
    | _ROUTING_KEYS
    | {
        "d_ff": "moe_intermediate_size",
        "n_experts": "num_experts",
        "normalize_routing": "norm_topk_prob",
    },
    other_keys={"n_experts": "num_local_experts"},
    defaults=_LLAMA.defaults | {"normalize_routing": False, "router_loss": 0.001},
    layers="full",
    window=None,
    neutral={
        "attention_dropout": (0.0,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
        "output_router_logits": (False, True),
        "use_sliding_window": (False,),
    },
    # Of dense layers, and without effect unless use_sliding_window is true.
    silent=frozenset(("intermediate_size", "max_window_layers", "sliding_window")),
)
_MIXTRAL = dataclasses.replace(
    _MISTRAL,
    causal="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    keys=_LLAMA_KEYS | _ROUTING_KEYS | {"n_experts": "num_local_experts"},
    defaults=_LLAMA.defaults
    | {"norm_eps": 1e-5, "rope_theta": 1e6, "router_loss": 0.001},
    window=None,
    neutral={
        "attention_dropout": (0.0,),
        "output_router_logits": (False, True),
        "router_jitter_noise": (0.0,),
    },
)
# In the order in which an export tries them.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "gpt2": _GPT2,
    "openai-gpt": dataclasses.replace(
        _GPT2,
        causal="OpenAIGPTLMHeadModel",
        classifier="OpenAIGPTForSequenceClassification",
        keys={name: keys for name, keys in _GPT2.keys.items() if name != "d_ff"}
        | {"mlp": "afn"},
        activations={"gelu": ("gelu",)},  # this class calls the tanh form "gelu"
        defaults=_GPT2.defaults | {"mlp": "gelu"},
        fixed=_GPT2.fixed | {"residual": "post_norm", "scale_residual_init": False},
        neutral={"n_special": (0,)},
    ),
    "gpt_neox": Family(
        causal="GPTNeoXForCausalLM",
        classifier="GPTNeoXForSequenceClassification",
        keys=_KEYS
        | {
            "norm_eps": "layer_norm_eps",
            "dropout": "hidden_dropout attention_dropout",
        },
        activations=_GELU,
        defaults={
            "init_std": 0.02,
            "tie_embeddings": False,
            "norm_eps": 1e-5,
            "dropout": 0.0,
            "mlp": "gelu",
            "rope_fraction": 0.25,
        },
        fixed={"positions": "rope", "norm": "layernorm", "bias": True},
        rope={"rope_theta": "rotary_emb_base", "rope_fraction": "rotary_pct"},
        parallel="use_parallel_residual",
        neutral={"attention_bias": (True,)},
        written={"attention_bias": True},
    ),
    "mistral": _MISTRAL,
    "qwen3": _QWEN3,
    "smollm3": _SMOLLM3,
    "olmo2": _OLMO2,
    "phi3": _PHI3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "qwen3_moe": _QWEN3_MOE,
    "mixtral": _MIXTRAL,
}
