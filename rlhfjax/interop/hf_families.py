"""What the config.json of each Hugging Face family says, in our words: data, and two small functions where they end."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhfjax.errors import CheckpointError
from rlhfjax.models import TransformerConfig
from rlhfjax.paths import Path

REQUIRED = object()

# Keys that do not bear on what a model computes: about files, tokens, labels, training and the ways of generating.
_SILENT = """
_attn_implementation_autoset _commit_hash _name_or_path architectures bos_token_id dtype eos_token_id finetuning_task
id2label is_llama_config label2id license model_type num_labels output_attentions output_hidden_states pad_token_id
prefix predict_special_tokens problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype
torchscript transformers.js_config transformers_version unk_token_id use_cache classifier_dropout n_ctx pretraining_tp
reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
SILENT = frozenset(_SILENT.split())
# Other keys change nothing at these values (null never does), in any family.
NEUTRAL: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False, True),  # all of ours are
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    **{
        f"rope_{outer}.{key}": ("default",)
        for outer in ("parameters", "scaling")
        for key in ("rope_type", "type")
    },
    "tie_encoder_decoder": (False,),
    "use_bfloat16": (False,),
}
# Names of activations in `transformers`, the one that we write first. Its OpenAI-GPT calls the tanh form "gelu".
ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast"),
    "gelu_exact": ("gelu",),
}
OPENAI_ACTIVATIONS = {"gelu": ("gelu",)}


class Said:
    """What a config.json says, taken key by key; `finish` refuses what is left."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.left = {key: value for key, value in values.items() if value is not None}

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key, which is then done with; absent or null is the default, or an error without one."""
        value = self.left.pop(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.path}: there is no {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not default and type(value) is not kind:
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}: expected {kind.__name__}"
            )
        return value

    def refuse(self, key: str, value: Any, accepted: str = "") -> CheckpointError:
        accepted = f"; accepted is {accepted}" if accepted else ""
        return CheckpointError(
            f"{self.path}: our Transformer cannot do what {key} = {value!r} says{accepted}"
        )

    def same(self, kind: type, default: Any, *keys: str) -> Any:
        """The one value of several keys that we have one field for."""
        values = [self.take(key, kind, default) for key in keys]
        for key, value in zip(keys, values, strict=True):
            if value != values[0]:
                raise self.refuse(key, value, f"that of {keys[0]}, {values[0]!r}")
        return values[0]

    def activation(
        self, key: str, default: str, accepted: Mapping[str, tuple[str, ...]]
    ) -> str:
        """Our name of an activation."""
        name = self.take(key, str, default)
        for ours, theirs in accepted.items():
            if name in theirs:
                return ours
        raise self.refuse(key, name, " or ".join(map(repr, sum(accepted.values(), ()))))

    def rope(
        self,
        theta: str = "rope_theta",
        fraction: str = "partial_rotary_factor",
        default: float = 1.0,
    ) -> dict:
        """RoPE's base and the share of each head that it turns; any kind but the plain one stays to be refused.

        transformers 5 has them in `rope_parameters`; 4 in keys of their own (GPT-NeoX under two names, of which one is
        given here), with `rope_scaling` beside.
        """
        outer = ("rope_parameters", "rope_scaling")
        for name in outer:
            inner = self.take(name, dict, {})
            self.left |= {
                f"{name}.{key}": value
                for key, value in inner.items()
                if value is not None
            }

        def places(key):
            return (key, *(f"{name}.{key}" for name in outer))

        return {
            "rope_theta": self._agreed(10000.0, theta, *places("rope_theta")),
            "rope_fraction": self._agreed(
                default, fraction, *places("partial_rotary_factor")
            ),
        }

    def _agreed(self, default, *keys):
        """The one number that several keys say, of which some or all may be absent."""
        found = {key: self.take(key, float) for key in keys if key in self.left}
        first = next(iter(found.values()), default)
        for key, value in found.items():
            if value != first:
                raise self.refuse(key, value, f"what it says elsewhere, {first}")
        return first

    def finish(self, neutral: Mapping[str, tuple]) -> None:
        for key, value in self.left.items():
            if key not in SILENT and value not in (neutral | NEUTRAL).get(key, ()):
                raise self.refuse(key, value)


@dataclasses.dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` says what ours does.

    keys: of theirs by our fields, where the two say the same; `defaults` where theirs may be absent.
    fixed: fields of ours that are the same in all of the family.
    neutral: keys of the family beyond NEUTRAL, with the values at which they change nothing.
    read, write: what more there is, from theirs (with the fields read so far) and to theirs.
    """

    causal: str
    classifier: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    neutral: Mapping[str, tuple]
    read: Callable[[Said, dict], dict]
    write: Callable[[TransformerConfig], dict]


def _read_llama(said, _):
    return {
        "bias": said.same(bool, False, "attention_bias", "mlp_bias"),
        **_whole_rope(said),
    }


def _whole_rope(said):
    rope = said.rope()
    if rope["rope_fraction"] != 1:
        raise said.refuse("partial_rotary_factor", rope["rope_fraction"], "1")
    return rope


def _write_llama(c):
    return {
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
    }


def _read_qwen2(said, _):
    if (kinds := set(said.take("layer_types", list, []))) - {"full_attention"}:
        raise said.refuse("layer_types", sorted(kinds), "'full_attention'")
    if said.take("use_sliding_window", bool, False):
        raise said.refuse("use_sliding_window", True, "false")
    said.take(
        "sliding_window", int, None
    )  # of no effect without it, and named in every release
    said.take("max_window_layers", int, None)
    return _whole_rope(said)


def _write_qwen2(c):
    return {
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "use_sliding_window": False,
    }


def _read_gpt2(said, fields):
    return {
        "dropout": said.same(float, 0.1, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "mlp": said.activation("activation_function", "gelu_new", ACTIVATIONS),
        "d_ff": said.take("n_inner", int, 4 * fields["d_model"]),
    }


def _write_gpt2(c):
    return _gpt_dropout(c) | {
        "activation_function": ACTIVATIONS.get(c.mlp, ("",))[0],
        "n_inner": c.d_ff,
    }


def _read_openai(said, fields):
    return {
        "dropout": said.same(float, 0.1, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "mlp": said.activation("afn", "gelu", OPENAI_ACTIVATIONS),
        "d_ff": 4 * fields["d_model"],
    }


def _write_openai(c):
    return _gpt_dropout(c) | {"afn": "gelu"}


def _gpt_dropout(c):
    return {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}


def _read_neox(said, _):
    return {
        "dropout": said.same(float, 0.0, "hidden_dropout", "attention_dropout"),
        "mlp": said.activation("hidden_act", "gelu", ACTIVATIONS),
        "residual": "parallel"
        if said.take("use_parallel_residual", bool, True)
        else "pre_norm",
        **said.rope("rotary_emb_base", "rotary_pct", 0.25),
    }


def _write_neox(c):
    return {
        "hidden_dropout": c.dropout,
        "attention_dropout": c.dropout,
        "hidden_act": ACTIVATIONS.get(c.mlp, ("",))[0],
        "use_parallel_residual": c.residual == "parallel",
        "rotary_emb_base": c.rope_theta,
        "rotary_pct": c.rope_fraction,
        "attention_bias": True,
    }


_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_KEYS = _KEYS | {
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "norm_eps": "rms_norm_eps",
}
_GPT_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "max_length": "n_positions",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}
_LLAMA_DEFAULTS = {
    "init_std": 0.02,
    "tie_embeddings": False,
    "n_kv_heads": None,
    "d_head": None,
    "norm_eps": 1e-6,
}
_GPT_DEFAULTS = {"init_std": 0.02, "tie_embeddings": True, "norm_eps": 1e-5}
_LLAMA_FIXED = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
_GPT_FIXED = {
    "positions": "learned",
    "norm": "layernorm",
    "bias": True,
    "scale_residual_init": True,
}
_LLAMA_NEUTRAL = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0,)}

# In the order in which an export tries them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        causal="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS,
        fixed=_LLAMA_FIXED,
        neutral=_LLAMA_NEUTRAL
        | {"rope_interleaved": (False,)},  # false: halves are rotated, as ours are
        read=_read_llama,
        write=_write_llama,
    ),
    "qwen2": Family(
        causal="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS,
        fixed=_LLAMA_FIXED | {"qkv_bias": True},
        neutral=_LLAMA_NEUTRAL | {"use_mrope": (False,)},
        read=_read_qwen2,
        write=_write_qwen2,
    ),
    "gpt2": Family(
        causal="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        keys=_GPT_KEYS,
        defaults=_GPT_DEFAULTS,
        fixed=_GPT_FIXED,
        neutral={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        read=_read_gpt2,
        write=_write_gpt2,
    ),
    "openai-gpt": Family(
        causal="OpenAIGPTLMHeadModel",
        classifier="OpenAIGPTForSequenceClassification",
        keys=_GPT_KEYS,
        defaults=_GPT_DEFAULTS,
        fixed=_GPT_FIXED | {"residual": "post_norm", "scale_residual_init": False},
        neutral={"n_special": (0,)},
        read=_read_openai,
        write=_write_openai,
    ),
    "gpt_neox": Family(
        causal="GPTNeoXForCausalLM",
        classifier="GPTNeoXForSequenceClassification",
        keys=_KEYS | {"norm_eps": "layer_norm_eps"},
        defaults={"init_std": 0.02, "tie_embeddings": False, "norm_eps": 1e-5},
        fixed={"positions": "rope", "norm": "layernorm", "bias": True},
        neutral={"attention_bias": (True,)},
        read=_read_neox,
        write=_write_neox,
    ),
}
