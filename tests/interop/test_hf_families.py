"""config.json of the families' releases, in both styles, and what people's folders hold besides."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.errors import CheckpointError
from rlhfjax.interop.gguf_families import ARCHITECTURES
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.interop.hf_config import read, write
from rlhfjax.interop.hf_families import FAMILIES
from rlhfjax.interop.hf_layers import shortest
from rlhfjax.interop.others import missing
from rlhfjax.models import Model
from rlhfjax.models.config import RopeScaling
from rlhfjax.models.presets import preset
from tests.interop.recent import RECENT
from tests.interop.test_hf import QWEN, SMOLLM2, assert_same, described, random_params


def values_of(kind, heads, sizes, **more):
    """Returns a config.json: sizes are the vocabulary, layers, width, MLP width and context."""
    vocab, layers, width, mlp, context = sizes
    return {
        "architectures": [kind],
        "attention_dropout": 0.0,
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": context,
        "num_attention_heads": heads[0],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads[1],
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
    } | more


LLAMA32 = values_of(
    "LlamaForCausalLM",
    (32, 8),
    (128256, 16, 2048, 8192, 131072),
    attention_bias=False,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    head_dim=64,
    hidden_act="silu",
    mlp_bias=False,
    model_type="llama",
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling={
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=500000.0,
    tie_word_embeddings=True,
    transformers_version="4.45.0.dev0",
)
QWEN3 = values_of(
    "Qwen3ForCausalLM",
    (16, 8),
    (151936, 28, 1024, 3072, 40960),
    attention_bias=False,
    bos_token_id=151643,
    eos_token_id=151645,
    head_dim=128,
    hidden_act="silu",
    max_window_layers=28,
    model_type="qwen3",
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    transformers_version="4.51.0",
    use_sliding_window=False,
)
MISTRAL = values_of(
    "MistralForCausalLM",
    (32, 8),
    (32000, 32, 4096, 14336, 32768),
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    model_type="mistral",
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    transformers_version="4.34.0.dev0",
)
GEMMA = values_of(
    "GemmaForCausalLM",
    (8, 1),
    (256000, 18, 2048, 16384, 8192),
    attention_bias=False,
    bos_token_id=2,
    eos_token_id=1,
    head_dim=256,
    hidden_act="gelu",
    hidden_activation="gelu_pytorch_tanh",
    model_type="gemma",
    pad_token_id=0,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=10000.0,
)
GEMMA2 = values_of(
    "Gemma2ForCausalLM",
    (8, 4),
    (256000, 26, 2304, 9216, 8192),
    attention_bias=False,
    attn_logit_softcapping=50.0,
    cache_implementation="hybrid",
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    model_type="gemma2",
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_theta=10000.0,
    sliding_window=4096,
)
GEMMA3 = values_of(
    "Gemma3ForCausalLM",
    (4, 1),
    (262144, 26, 1152, 6912, 32768),
    attention_bias=False,
    attn_logit_softcapping=None,
    bos_token_id=2,
    cache_implementation="hybrid",
    eos_token_id=[1, 106],
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    model_type="gemma3_text",
    pad_token_id=0,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
)
PHI3 = values_of(
    "Phi3ForCausalLM",
    (32, 32),
    (32064, 32, 3072, 8192, 4096),
    attention_bias=False,
    auto_map={
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    embd_pdrop=0.0,
    hidden_act="silu",
    model_type="phi3",
    original_max_position_embeddings=4096,
    resid_pdrop=0.0,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=10000.0,
    sliding_window=2047,
    tie_word_embeddings=False,
)
OLMO2 = values_of(
    "Olmo2ForCausalLM",
    (32, 32),
    (100352, 32, 4096, 11008, 4096),
    attention_bias=False,
    eos_token_id=100257,
    hidden_act="silu",
    model_type="olmo2",
    pad_token_id=100277,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=500000,
    tie_word_embeddings=False,
)
SMOLLM3 = values_of(
    "SmolLM3ForCausalLM",
    (16, 4),
    (128256, 36, 2048, 11008, 65536),
    attention_bias=False,
    hidden_act="silu",
    layer_types=["full_attention"] * 36,
    max_window_layers=28,
    mlp_bias=False,
    model_type="smollm3",
    no_rope_layer_interval=4,
    no_rope_layers=[1, 1, 1, 0] * 9,
    pretraining_tp=2,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=5000000.0,
    sliding_window=None,
    use_sliding_window=False,
)
RELEASES = {
    "llama3.2-1b": LLAMA32,
    "qwen3-0.6b": QWEN3,
    "mistral-7b": MISTRAL,
    "gemma-2b": GEMMA,
    "gemma2-2b": GEMMA2,
    "gemma3-1b": GEMMA3,
    "phi3-mini": PHI3,
    "olmo2-7b": OLMO2,
    "smollm3-3b": SMOLLM3,
}
# Changes that say the same in the style of transformers 5; None removes a key.
NEWER = {
    "llama3.2-1b": {
        "rope_parameters": LLAMA32["rope_scaling"] | {"rope_theta": 500000.0},
        "rope_scaling": None,
        "rope_theta": None,
    },
    "qwen3-0.6b": {
        "layer_types": ["full_attention"] * 28,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "rope_theta": None,
    },
    "gemma2-2b": {"layer_types": ["sliding_attention", "full_attention"] * 13},
    "gemma3-1b": {
        "_sliding_window_pattern": 6,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4
        + ["sliding_attention"] * 2,
        "rope_local_base_freq": None,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
        },
        "rope_theta": None,
        "sliding_window_pattern": None,
        "use_bidirectional_attention": False,
    },
    "phi3-mini": {
        "rope_parameters": {
            "partial_rotary_factor": 1.0,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "rope_theta": None,
    },
    "smollm3-3b": {"no_rope_layers": None, "layer_types": None},
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_its_preset_in_either_style(tmp_path, name):
    values = RELEASES[name]
    assert described(tmp_path, values).config == preset(name)
    newer = {**values, **NEWER.get(name, {})}
    newer = {key: value for key, value in newer.items() if value is not None}
    assert described(tmp_path, newer).config == preset(name)


@pytest.mark.parametrize("name", RECENT)
def test_what_is_written_means_the_same_when_it_is_read(tmp_path, name):
    config = RECENT[name]
    values = write(Model(config), "float32", {})[1]
    found = described(tmp_path, values).config
    for field in ("attention_pattern", "window", "attention_scale", "rope_scaling"):
        assert getattr(found, field) == getattr(config, field), field


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("mistral-7b", {"sliding_window": None}, {"window": None}),
        ("mistral-7b", {"head_dim": 64}, {"d_head": 64}),
        ("gemma2-2b", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
        ("gemma2-2b", {"query_pre_attn_scalar": 144}, {"attention_scale": 1 / 12}),
        ("gemma3-1b", {"final_logit_softcapping": 20}, {"logit_softcap": 20.0}),
        (
            "gemma3-1b",
            {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
            {"rope_scaling": RopeScaling("linear", factor=8.0)},
        ),
        (
            "qwen3-0.6b",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 26,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            {
                "attention_pattern": ("full",) * 26 + ("window",) * 2,
                "window": 9,
                "rope_scaling": RopeScaling("yarn", factor=4.0, original_length=32768),
            },
        ),
        (
            "smollm3-3b",
            {"no_rope_layers": None, "no_rope_layer_interval": 2},
            {"attention_pattern": ("full", "full_no_rope")},
        ),
        ("smollm3-3b", {"attention_bias": True}, {"attention_bias": True}),
        ("smollm3-3b", {"attention_bias": True, "mlp_bias": True}, {"bias": True}),
        ("llama3.2-1b", {"head_dim": None}, {"d_head": None}),
        (
            "phi3-mini",
            {"partial_rotary_factor": 0.75, "sliding_window": None},
            {"rope_fraction": 0.75, "attention_pattern": ("full",)},
        ),
    ],
)
def test_values_that_folders_have(tmp_path, name, change, expected):
    config = described(tmp_path, RELEASES[name] | change).config
    for field, value in expected.items():
        found = getattr(config, field)
        assert (
            found == pytest.approx(value)
            if field == "attention_scale"
            else (found == value)
        ), field


def test_an_absent_key_is_not_null(tmp_path):
    """Absent keys have the defaults of `transformers`: a window of 4096, soft caps."""
    without = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert described(tmp_path, without).config.window == 4096
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    without = {key: value for key, value in GEMMA2.items() if key not in caps}
    config = described(tmp_path, without).config
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)


def test_keys_of_peoples_folders_pass(tmp_path):
    added = {
        "_attn_implementation": "flash_attention_2",
        "_name_or_path": "someone/else",
        "dtype": "bfloat16",
        "model_max_length": 4096,
        "unsloth_fixed": True,
        "unsloth_version": "2025.9.1",
        "use_cache": False,
    }
    assert described(tmp_path, QWEN3 | added).config == preset("qwen3-0.6b")


IMAGES = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (IMAGES, {}, "a decoder of text alone .*docs/models.md.* one of Llama"),
        (
            QWEN3,
            {"logits_scaling": 8.0},
            r"logits_scaling = 8.0 says; accepted is a config\.json without it",
        ),
        (
            PHI3,
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
            "rope_scaling.type = 'longrope' says; accepted is 'default'$",
        ),
        (PHI3, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type = 'yarn'"),
        (
            LLAMA32,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type = 'dynamic' .*'llama3' or 'yarn'",
        ),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA3, {"use_bidirectional_attention": True}, "= True .* False"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "sliding_attention.rope_type = 'linear' .* 'default'",
        ),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        (GEMMA2, {"hidden_activation": "silu"}, "hidden_activation = 'silu' .* 'gelu"),
        (SMOLLM3, {"use_sliding_window": True}, "use_sliding_window = True"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers = .* a list of 36"),
        (SMOLLM3, {"no_rope_layers": [True] * 36}, "no_rope_layers = .* 0 or 1"),
        (SMOLLM3, {"no_rope_layers": ["0"] * 36}, "no_rope_layers = .* 0 or 1"),
        (QWEN, {"layer_types": [["full_attention"]]}, "layer_types = .* full_atten"),
        (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "interval"),
        (
            MISTRAL,
            {"layer_types": ["full_attention"] * 32},
            "layer_types = .* 32 times sliding_attention",
        ),
        (QWEN, {"num_hidden_layers": -1}, "model.n_layers=-1: .*num_hidden"),
        (QWEN, {"num_hidden_layers": 10**9}, "model.n_layers=10+: .*num_hidden"),
        (QWEN, {"sliding_window": "wide"}, "sliding_window is 'wide': expected int"),
        (SMOLLM2, {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map = "),
        (OLMO2, {"quantization": {"bits": 4}}, "quantization = "),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, base, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        described(tmp_path, base | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("BloomForCausalLM", "ALiBi positions"),
        ("DeepseekV3ForCausalLM", "latent attention and experts that every token shar"),
        ("FalconForCausalLM", "one norm for attention and MLP, or fused groups of he"),
        ("FalconMambaForCausalLM", "state-space layers"),
        ("Gemma3nForConditionalGeneration", "embeddings of each layer and residuals "),
        ("GptOssForCausalLM", "attention sinks and biases of experts"),
        ("Llama4ForConditionalGeneration", "attention in chunks and experts that "),
        ("MPTForCausalLM", "ALiBi positions"),
        ("MambaForCausalLM", "state-space layers"),
        ("Qwen3NextForCausalLM", "linear attention"),
        ("T5ForConditionalGeneration", "an encoder"),
    ],
)
def test_what_other_families_have_is_the_reason(tmp_path, kind, part):
    with pytest.raises(CheckpointError) as caught:
        described(tmp_path, QWEN3 | {"architectures": [kind], "model_type": "x"})
    message = str(caught.value)
    assert f"architectures = ['{kind}'] says (it has {part}" in message
    assert "accepted is " in message and "LlamaForCausalLM" in message
    assert "\n" not in message


def test_no_family_that_is_read_has_a_reason_not_to_be():
    classes = [(family.causal, family.classifier) for family in FAMILIES.values()]
    known = [*sum(classes, ()), *FAMILIES, *ARCHITECTURES]
    assert [name for name in known if missing(name)] == []


def test_the_shortest_pattern():
    assert shortest(["full"] * 5) == ("full",)
    assert shortest(["window", "full"] * 2 + ["window"]) == ("window", "full")
    assert shortest(["full", "full", "window"]) == ("full", "full", "window")
    assert shortest([]) == ("full",)


def test_buffers_and_a_tied_output_are_passed_over(tmp_path):
    """What transformers 4.30 to 4.50 stored with the weights; the output differs: an error."""
    model = Model(RECENT["gemma3"])
    params = random_params(model)
    save_hf(tmp_path / "x", model, params)
    file = tmp_path / "x/model.safetensors"
    tensors = load_file(file)
    frequencies = np.ones(4, np.float32)
    embedding = tensors["model.embed_tokens.weight"]
    more = {
        "lm_head.weight": embedding,
        "model.rotary_emb.inv_freq": frequencies,
        "model.rotary_emb_local.original_inv_freq": frequencies,
        "model.layers.1.self_attn.rotary_emb.cos_cached": frequencies,
    }
    save_file(tensors | more, file)
    assert_same(params, load_hf(tmp_path / "x")[1])
    save_file(tensors | {"lm_head.weight": embedding + 1}, file)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from \S+tokens"):
        load_hf(tmp_path / "x")


def test_several_ends_are_written_as_a_list(tmp_path):
    model = Model(RECENT["qwen3"])
    ids = {"pad": 0, "bos": None, "eos": (2, 7)}
    values = write(model, "float32", ids)[1]
    assert json.loads(json.dumps(values))["eos_token_id"] == [2, 7]
    assert read_back(tmp_path, values) == "qwen3"


def read_back(tmp_path, values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return read(path)[0]
