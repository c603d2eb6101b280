"""Small models of `transformers`: the class of each config, and its values.

72 tokens are used: windows are shorter, and so are the contexts before rotary scaling. Soft caps
are so small that they bind.
"""

from typing import Any

VOCAB, CONTEXT = 61, 96
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
WINDOW = 7
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "smollm2": (
        "LlamaConfig",
        LLAMA
        | {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_theta": 500.0,
            "rms_norm_eps": 0.01,
        },
    ),
    "llama-bias-wide": (
        "LlamaConfig",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "qwen2": (
        "Qwen2Config",
        LLAMA
        | {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6},
    ),
    "qwen2-untied": ("Qwen2Config", LLAMA | {"num_key_value_heads": 1}),
    "gpt2": ("GPT2Config", GPT),
    "gpt2-untied": (
        "GPT2Config",
        GPT
        | {
            "tie_word_embeddings": False,
            "n_inner": 48,
            "activation_function": "gelu",
            "layer_norm_epsilon": 0.01,
        },
    ),
    "gpt1": ("OpenAIGPTConfig", GPT),
    "pythia": ("GPTNeoXConfig", LLAMA),  # a quarter of each head is rotated
    "neox-sequential": (
        "GPTNeoXConfig",
        LLAMA
        | {
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "rotary_emb_base": 300.0,
            "rotary_pct": 0.5,
        },
    ),
    "llama3.1": (
        "LlamaConfig",
        GROUPED
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 48,
            },
        },
    ),
    "llama-linear-bias": (
        "LlamaConfig",
        LLAMA
        | {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 500.0,
                "factor": 2.5,
            },
        },
    ),
    "llama-yarn": (
        "LlamaConfig",
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "beta_fast": 16.0,
                "original_max_position_embeddings": 48,
            },
        },
    ),
    "mistral": (
        "MistralConfig",
        GROUPED | {"head_dim": 16, "sliding_window": WINDOW},
    ),
    "qwen2-window": (
        "Qwen2Config",
        GROUPED
        | {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (
        "Qwen3Config",
        GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    ),
    "qwen3-untied-window": (
        "Qwen3Config",
        GROUPED
        | {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "gemma": ("GemmaConfig", LLAMA | {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 900.0,
                    "factor": 2.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": (
        "Phi3Config",
        GROUPED
        | {"partial_rotary_factor": 0.5, "sliding_window": WINDOW, "pad_token_id": 0},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        GROUPED
        | {
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3-moe-normalized": (
        "Qwen3MoeConfig",
        GROUPED
        | {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "sliding_window": WINDOW},
    ),
    "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": (
        "SmolLM3Config",
        GROUPED | {"no_rope_layer_interval": 2, "pad_token_id": 0},
    ),
}
