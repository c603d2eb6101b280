"""The modules of Hugging Face's families: name in the file -> path in our parameter tree."""

import dataclasses

from rlhfjax.interop.names import QKV, Table

_NORMS_1_AND_2 = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
}
_NORMS_AFTER = {
    "post_attention_layernorm": "norm_1",
    "post_feedforward_layernorm": "norm_2",
}
_FOUR_NORMS = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "pre_feedforward_layernorm": "norm_3",
    "post_feedforward_layernorm": "norm_4",
}
_PROJECTIONS = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}
_FUSED = {
    "self_attn.qkv_proj": QKV,
    "self_attn.o_proj": "attention/out",
    "mlp.gate_up_proj": "mlp/gate mlp/up",
    "mlp.down_proj": "mlp/down",
}
_QK_NORMS = {
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
}
_LLAMA = Table(
    prefix="model.",
    layers="layers.{i}.",
    trunk={"embed_tokens": "embed/tokens", "norm": "norm"},
    layer=_NORMS_1_AND_2 | _PROJECTIONS | _QK_NORMS,
    output="lm_head.weight",
    buffers=(
        r"(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.((original_)?inv_freq|(cos|sin)_cached)",
    ),
)
_GPT2 = Table(
    prefix="transformer.",
    layers="h.{i}.",
    trunk={"wte": "embed/tokens", "wpe": "embed/positions", "ln_f": "norm"},
    layer={
        "ln_1": "norm_1",
        "attn.c_attn": QKV,
        "attn.c_proj": "attention/out",
        "ln_2": "norm_2",
        "mlp.c_fc": "mlp/up",
        "mlp.c_proj": "mlp/down",
    },
    output="lm_head.weight",
    buffers=(r"h\.\d+\.attn\.(masked_)?bias",),  # the causal mask
    out_first=False,
)
_GPT_NEOX = Table(
    prefix="gpt_neox.",
    layers="layers.{i}.",
    trunk={"embed_in": "embed/tokens", "final_layer_norm": "norm"},
    layer={
        "input_layernorm": "norm_1",
        "attention.query_key_value": QKV,
        "attention.dense": "attention/out",
        "post_attention_layernorm": "norm_2",
        "mlp.dense_h_to_4h": "mlp/up",
        "mlp.dense_4h_to_h": "mlp/down",
    },
    output="embed_out.weight",
    buffers=(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    by_head=True,
)
_QWEN3_MOE = dataclasses.replace(
    _LLAMA,
    layer={**_LLAMA.layer, "mlp.gate": "mlp/router"},
    experts={
        "mlp.experts.{e}.gate_proj": "mlp/gate",
        "mlp.experts.{e}.up_proj": "mlp/up",
        "mlp.experts.{e}.down_proj": "mlp/down",
    },
)
_MIXTRAL = dataclasses.replace(
    _LLAMA,
    layer={**_LLAMA.layer, "block_sparse_moe.gate": "mlp/router"},
    experts={
        "block_sparse_moe.experts.{e}.w1": "mlp/gate",
        "block_sparse_moe.experts.{e}.w3": "mlp/up",
        "block_sparse_moe.experts.{e}.w2": "mlp/down",
    },
)
TABLES: dict[str, Table] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": dataclasses.replace(_LLAMA, layer=_PROJECTIONS | _QK_NORMS | _NORMS_AFTER),
    "phi3": dataclasses.replace(_LLAMA, layer=_NORMS_1_AND_2 | _FUSED),
    "gemma": _LLAMA,
    "gemma2": dataclasses.replace(_LLAMA, layer=_FOUR_NORMS | _PROJECTIONS),
    "gemma3_text": dataclasses.replace(
        _LLAMA, layer=_FOUR_NORMS | _PROJECTIONS | _QK_NORMS
    ),
    "gpt2": _GPT2,
    "openai-gpt": dataclasses.replace(
        _GPT2,
        trunk={"tokens_embed": "embed/tokens", "positions_embed": "embed/positions"},
        buffers=(*_GPT2.buffers, "position_ids"),
    ),
    "gpt_neox": _GPT_NEOX,
    "qwen3_moe": _QWEN3_MOE,
    "mixtral": _MIXTRAL,
}
