"""How the config.json of each Hugging Face family spells a TransformerConfig, as data."""

import dataclasses
from typing import Any

# Keys without effect on what a model computes: files, tokens, labels, training, generation.
_SILENT = """
_attn_implementation_autoset _commit_hash _name_or_path architectures bos_token_id dtype
eos_token_id finetuning_task id2label is_llama_config label2id license model_type num_labels
output_attentions output_hidden_states pad_token_id prefix predict_special_tokens problem_type
return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
transformers.js_config transformers_version unk_token_id use_cache classifier_dropout n_ctx
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
    "pruned_heads": ({},),
    "rope_parameters.rope_type": ("default",),
    "rope_parameters.type": ("default",),
    "rope_scaling.rope_type": ("default",),
    "rope_scaling.type": ("default",),
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
}
# Names of `mlp` in `transformers`; an export writes the first.
_GELU = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"),
    "gelu_exact": ("gelu",),
}
_SWIGLU = {"swiglu": ("silu", "swish")}
# The types of fields that are not int.
KINDS = {
    "norm_eps": float,
    "init_std": float,
    "dropout": float,
    "tie_embeddings": bool,
    "bias": bool,
    "mlp": str,
}
ROPE_DEFAULTS = {"rope_theta": 10000.0, "rope_fraction": 1.0}


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
    """rope_theta and perhaps rope_fraction -> its key. Empty: the family has no RoPE."""
    parallel: str = ""
    """Key for parallel attention and MLP, true if absent. Empty: they never are parallel."""
    neutral: dict[str, tuple] = dataclasses.field(default_factory=dict)
    """Further keys with the values, or elements of lists, that change nothing."""
    silent: frozenset[str] = frozenset()
    """Further keys that change nothing, whichever integer they hold."""
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
_QWEN2 = Family(
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    keys=_KEYS
    | {
        "n_kv_heads": "num_key_value_heads",
        "d_head": "head_dim",
        "norm_eps": "rms_norm_eps",
    },
    activations=_SWIGLU,
    defaults={
        "init_std": 0.02,
        "tie_embeddings": False,
        "n_kv_heads": None,
        "d_head": None,
        "norm_eps": 1e-6,
        "mlp": "silu",
    },
    fixed={"positions": "rope", "norm": "rmsnorm", "qkv_bias": True},
    rope={"rope_theta": "rope_theta"},
    neutral={
        "attention_dropout": (0.0,),
        "layer_types": ("full_attention",),
        "use_mrope": (False,),
        "use_sliding_window": (False,),
    },
    # Named in every release, without effect unless use_sliding_window is true.
    silent=frozenset(("sliding_window", "max_window_layers")),
    written={"use_sliding_window": False},
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
# In the order in which an export tries them.
FAMILIES: dict[str, Family] = {
    "llama": dataclasses.replace(
        _QWEN2,
        causal="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        keys=_QWEN2.keys | {"bias": "attention_bias mlp_bias"},
        defaults=_QWEN2.defaults | {"bias": False},
        fixed={"positions": "rope", "norm": "rmsnorm"},
        # Not interleaved: halves are rotated, as ours are.
        neutral={"attention_dropout": (0.0,), "rope_interleaved": (False,)},
        silent=frozenset(),
        written={},
    ),
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
}
