"""Hugging Face folders without `transformers`: round trips, errors, memory, placement.

test_hf_against.py compares with `transformers`.
"""

import dataclasses
import json
import os
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhfjax import state
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.interop.hf_config import read, write
from rlhfjax.interop.names import Row
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.config import RopeScaling
from rlhfjax.models.presets import PRESETS, preset
from tests.interop.recent import RECENT
from tests.models import families

FAMILIES = families.FAMILIES | {
    "gpt1": dataclasses.replace(families.FAMILIES["gpt1"], d_ff=4 * 24),
    "neox": dataclasses.replace(families.FAMILIES["neox"], d_head=None, d_model=32),
    "llama-bias": dataclasses.replace(families.FAMILIES["llama"], bias=True),
    "qwen2-untied": dataclasses.replace(
        families.FAMILIES["qwen2"], tie_embeddings=False
    ),
}
ALL = FAMILIES | RECENT
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "llama-gqa": "LlamaForCausalLM",
    "llama-bias": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2-untied": "Qwen2ForCausalLM",
    "gpt1": "OpenAIGPTLMHeadModel",
    "gpt2": "GPT2LMHeadModel",
    "neox": "GPTNeoXForCausalLM",
    "llama3": "LlamaForCausalLM",
    "llama-linear": "LlamaForCausalLM",
    "llama-yarn": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2-window": "Qwen2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
SMOLLM2 = {  # config.json of HuggingFaceTB/SmolLM2-135M-Instruct
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {
        "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}
    },
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
GPT2 = {  # config.json of openai-community/gpt2
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PYTHIA = {  # config.json of EleutherAI/pythia-1b
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
QWEN = {  # config.json of Qwen/Qwen2.5-0.5B
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def random_params(model, seed=0):
    """Returns parameters of normal numbers, made by numpy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes
    )


def stacked(params):
    layers = params["backbone"]["layers"].values()
    return params | {
        "backbone": params["backbone"]
        | {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}
    }


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def described(tmp_path, values):
    """Returns the model that we read in a config.json."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return read(path)[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns the folder, model and parameters of a grouped, tied Llama."""
    model = Model(FAMILIES["llama-gqa"])
    params = random_params(model)
    folder = tmp_path_factory.mktemp("hf") / "small"
    save_hf(folder, model, params)
    return folder, model, params


def altered(folder, tmp_path, config=None, **tensors):
    """Returns a copy of a folder with other config values and tensors; None removes one."""
    new = tmp_path / "altered"
    new.mkdir()
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    (new / "config.json").write_text(json.dumps(values))
    found = load_file(folder / "model.safetensors") | tensors
    save_file(
        {k: v for k, v in found.items() if v is not None},
        new / "model.safetensors",
        metadata={"format": "pt"},
    )
    return new


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_read_bit_for_bit(tmp_path, name):
    """Layers stacked or not, one file or several: the same tensors, and the same after reading."""
    model = Model(ALL[name])
    params = random_params(model)
    save_hf(tmp_path / "one", model, params)
    again, found = load_hf(tmp_path / "one", None)
    assert_same(params, found)
    trained = {
        "init_std": again.config.init_std,
        "scale_residual_init": again.config.scale_residual_init,
    }
    assert again == Model(dataclasses.replace(model.config, **trained))
    assert json.loads((tmp_path / "one/config.json").read_text())["architectures"] == [
        ARCHITECTURES[name]
    ]

    scanned = Model(dataclasses.replace(model.config, scan_layers=True))
    save_hf(
        tmp_path / "parts",
        scanned,
        jax.tree.map(jax.numpy.asarray, stacked(params)),
        shard_bytes=8000,
    )
    assert_same(params, load_hf(tmp_path / "parts", None)[1])
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        4 * x.size for x in jax.tree.leaves(params)
    )
    whole = load_file(tmp_path / "one/model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "parts" / file)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 8000
        for tensor, x in tensors.items():
            assert index["weight_map"][tensor] == file
            np.testing.assert_array_equal(x, whole[tensor])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one",
        "parts",
    ]  # nothing temporary is left


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(tmp_path, dtype):
    model = Model(FAMILIES["gpt2"])
    params = random_params(model)
    save_hf(tmp_path / "x", model, params, dtype)
    assert json.loads((tmp_path / "x/config.json").read_text())["torch_dtype"] == dtype
    with safe_open(tmp_path / "x/model.safetensors", framework="numpy") as file:
        assert file.get_tensor("transformer.wte.weight").dtype == dtype
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
    assert_same(rounded, load_hf(tmp_path / "x", None)[1])


def test_rows_by_hand():
    """Two heads of two, width 3.

    GPT-2 has columns q, k, v, each head after head; NeoX has rows q, k, v of each head.
    """
    q = np.arange(12.0).reshape(3, 2, 2)
    k, v = q + 100, q + 200
    paths, shapes = ("q", "k", "v"), [(3, 2, 2)] * 3
    conv = Row("c_attn", paths, out_first=False)
    assert conv.shape(shapes) == (3, 12)
    np.testing.assert_array_equal(
        conv.join([q, k, v])[1], [4, 5, 6, 7, 104, 105, 106, 107, 204, 205, 206, 207]
    )
    neox = Row("query_key_value", paths, by_head=True)
    assert neox.shape(shapes) == (12, 3)
    np.testing.assert_array_equal(
        neox.join([q, k, v])[:, 1], [4, 5, 104, 105, 204, 205, 6, 7, 106, 107, 206, 207]
    )
    for row in (conv, neox):
        for ours, again in zip(
            (q, k, v), row.split(row.join([q, k, v]), shapes), strict=True
        ):
            np.testing.assert_array_equal(ours, again)
    out = Row("dense", ("out",), inputs=2)  # [h, k, d]
    kernel = np.arange(12.0).reshape(2, 2, 3)
    assert out.shape([kernel.shape]) == (3, 4)
    np.testing.assert_array_equal(
        out.join([kernel]), [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    )
    fused = Row("qkv_proj", paths)  # grouped keys and values: one head of two
    parts = [q, k[:, :1], v[:, :1]]
    shapes = [part.shape for part in parts]
    assert fused.shape(shapes) == (8, 3)
    np.testing.assert_array_equal(
        fused.join(parts)[:, 1], [4, 5, 6, 7, 104, 105, 204, 205]
    )
    for ours, again in zip(parts, fused.split(fused.join(parts), shapes), strict=True):
        np.testing.assert_array_equal(ours, again)
    bias = Row("bias", paths, inputs=0, by_head=True)
    np.testing.assert_array_equal(
        bias.join([q[0], k[0], v[0]]), neox.join([q, k, v])[:, 0]
    )


# ------------------------------------------------------------------ config.json


def test_configs_of_releases(tmp_path):
    releases = {
        "smollm2-135m": SMOLLM2,
        "gpt2-124m": GPT2,
        "pythia-1b": PYTHIA,
        "qwen2.5-0.5b": QWEN,
    }
    for name, values in releases.items():
        config = described(tmp_path, values).config
        began = {
            "init_std": config.init_std,
            "scale_residual_init": config.scale_residual_init,
        }
        assert config == preset(name, **began), name


def test_every_preset_is_of_a_family(tmp_path):
    for name in PRESETS:
        config = preset(name, dropout=0.0)
        values = write(Model(config), "float32", {})[1]
        began = {
            "init_std": config.init_std,
            "scale_residual_init": config.scale_residual_init,
        }
        found = described(tmp_path, values).config
        assert found.head_dim == config.head_dim, name  # None is d_model / n_heads
        began["d_head"] = config.d_head
        assert dataclasses.replace(found, **began) == config, name


def test_transformers_5_has_ropes_parameters_in_one_place(tmp_path):
    new = {k: v for k, v in PYTHIA.items() if not k.startswith("rotary")}
    new |= {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
        }
    }
    config = described(tmp_path, new).config
    assert (config.rope_theta, config.rope_fraction) == (500.0, 0.5)
    assert (
        config
        == described(
            tmp_path, PYTHIA | {"rotary_emb_base": 500, "rotary_pct": 0.5}
        ).config
    )
    both = {
        "rotary_pct": 0.5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 500.0,
        "rotary_emb_base": 500,
    }  # 4.57
    assert config == described(tmp_path, PYTHIA | both).config
    silent = described(
        tmp_path, {k: v for k, v in PYTHIA.items() if not k.startswith("rotary")}
    ).config
    assert (silent.rope_theta, silent.rope_fraction) == (10000.0, 0.25)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            SMOLLM2,
            {"architectures": ["BloomForCausalLM"]},
            r"architectures = \['BloomForCausalLM'\].*Qwen2ForCau",
        ),
        (SMOLLM2, {"architectures": None}, r"architectures = \[\]"),
        (
            SMOLLM2,
            {"model_type": "mistral"},
            "model_type = 'mistral' says; accepted is 'llama'",
        ),
        (
            SMOLLM2,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "there is no rope_scaling.low_freq_factor",
        ),
        (
            SMOLLM2,
            {"rope_scaling": {"type": "linear"}},
            "there is no rope_scaling.factor",
        ),
        (
            SMOLLM2,
            {"rope_parameters": {"rope_type": "yarn"}},
            "there is no rope_parameters.factor",
        ),
        (
            SMOLLM2,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "rope_scaling.mscale = 0.7",
        ),
        (
            SMOLLM2,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_type = 'dynamic' .*'default' or 'linear' or 'llama3' or 'yarn'",
        ),
        (SMOLLM2, {"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor = 2.0"),
        (
            SMOLLM2,
            {"rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters.rope_theta = 5.0 .* elsewhere, 100000.0",
        ),
        (SMOLLM2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            SMOLLM2,
            {"mlp_bias": True},
            "mlp_bias = True .* true with attention_bias true",
        ),
        (SMOLLM2, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (SMOLLM2, {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        (
            SMOLLM2,
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config.quant_method = 'gptq' says; take the model",
        ),
        (
            SMOLLM2,
            {"rope_scaling": {"factor": 4.0, "type": "yarn", "rope_type": "linear"}},
            "rope_scaling.type = 'yarn' .* elsewhere, linear",
        ),
        (
            SMOLLM2,
            {"rope_scaling": {"short_factor": [1.0], "rope_type": "longrope"}},
            "rope_scaling.rope_type = 'longrope'",
        ),
        (SMOLLM2, {"rope_scaling": "yarn"}, "rope_scaling is 'yarn': expected dict"),
        (GPT2, {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.type = 'dynamic'"),
        (
            SMOLLM2,
            {"quantization_config": {"bits": 4, "quant_method": "awq"}},
            "quantization_config.quant_method = 'awq'",
        ),
        (SMOLLM2, {"architectures": [["x"]]}, "architectures = .* accepted is one of"),
        (SMOLLM2, {"attention_dropout": False}, "attention_dropout = False"),
        (QWEN, {"use_sliding_window": 0}, "use_sliding_window is 0: expected bool"),
        (
            SMOLLM2,
            {"tie_word_embeddings": 1},
            "tie_word_embeddings is 1: expected bool",
        ),
        (SMOLLM2, {"hidden_size": True}, "hidden_size is True: expected int"),
        (SMOLLM2, {"hidden_size": 0.5}, "hidden_size is 0.5: expected int"),
        (SMOLLM2, {"hidden_size": 10**30}, r"model.d_model=10+: .*is hidden_size\)"),
        (SMOLLM2, {"num_hidden_layers": 0}, r"=0: .*n_layers is num_hidden_layers\)"),
        (SMOLLM2, {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        (SMOLLM2, {"vocab_size": -1}, "model.vocab_size=-1: expected int >= 1"),
        (SMOLLM2, {"rope_theta": 0}, "model.rope_theta=0.0: .*is rope_theta"),
        (SMOLLM2, {"rms_norm_eps": 10**300}, "model.norm_eps=1e.300: .*rms_norm_eps"),
        (SMOLLM2, {"x\ny": 1}, r"do what 'x\\ny' = 1 says"),
        (SMOLLM2, {"auto_map": {"AutoModelForCausalLM": "x.py"}}, "auto_map = "),
        (SMOLLM2, {"sliding_window": 4096}, "sliding_window = 4096"),
        (SMOLLM2, {"hidden_size": None}, "there is no hidden_size"),
        (SMOLLM2, {"hidden_size": "576"}, "hidden_size is '576': expected int"),
        (
            SMOLLM2,
            {"num_key_value_heads": 2},
            "model.n_kv_heads = 2 does not divide model.n_heads = 9",
        ),
        (
            SMOLLM2,
            {"architectures": ["LlamaForSequenceClassification"]},
            "id2label = '2 labels' .* one",
        ),
        (
            QWEN,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = .* a list of 24",
        ),
        (
            QWEN,
            {"layer_types": ["sliding_attention"] * 24},
            "layer_types = .* none that slides without a window",
        ),
        (
            QWEN,
            {"layer_types": ["chunked_attention"] * 24},
            "layer_types = 'chunked_attention' .* sliding_attention or full_attention",
        ),
        (
            GPT2,
            {"activation_function": "relu"},
            "activation_function = 'relu' .*'gelu_new'",
        ),
        (
            GPT2,
            {"attn_pdrop": 0.0},
            "attn_pdrop = 0.0 says; accepted is that of resid_pdrop, 0.1",
        ),
        (
            GPT2,
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True",
        ),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True"),
        (PYTHIA, {"attention_bias": False}, "attention_bias = False"),
        (
            PYTHIA,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5 .* elsewhere, 0.25",
        ),
        (
            PYTHIA,
            {"rotary_pct": 0.012},
            "model.rope_fraction = 0.012 of a head of 256 is 3",
        ),
    ],
)
def test_configs_that_our_transformer_cannot_express_are_refused(
    tmp_path, base, change, message
):
    with pytest.raises(
        CheckpointError, match=rf"^\S*config\.json: .*{message}"
    ) as caught:
        described(tmp_path, base | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"qkv_bias": True, "mlp": "gelu", "n_kv_heads": 1}),
        ("llama", {"rope_fraction": 0.5, "d_head": 8, "bias": True}),
        ("phi3", {"rope_scaling": RopeScaling("linear", factor=2.0)}),
        ("mistral", {"attention_softcap": 2.0}),
        ("gemma3", {"attention_softcap": 2.0}),
        ("gemma2", {"attention_scale": 0.3}),
        ("gemma2", {"n_heads": 10, "d_head": 8}),
        ("qwen2-window", {"attention_pattern": ("window", "full_no_rope")}),
        ("llama", {"norm": "layernorm"}),
        ("gpt2", {"n_kv_heads": 2}),
        ("gpt2", {"d_head": 8}),
        ("gpt2", {"bias": False}),
        ("gpt1", {"d_ff": 40}),
        ("neox", {"d_head": 16}),
        ("neox", {"mlp": "swiglu"}),
    ],
)
def test_models_of_no_family_are_not_written(tmp_path, name, change):
    config = dataclasses.replace(ALL[name], **change)
    with pytest.raises(
        ConfigError,
        match=r"no architecture in llama, qwen2, gpt2, .*mixtral has model\.\S+ = ",
    ):
        save_hf(tmp_path / "x", Model(config), {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, "there is no tensor model.norm.weight"),
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "there is no tensor model.layers.1.mlp.up_proj.weight",
        ),
        (
            {"model.layers.2.x": np.zeros(2, np.float32)},
            "has no place for the tensor model.layers.2.x",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)},
            "no place for the tensor .*q_proj.bias",
        ),
        (
            {"score.weight": np.zeros((1, 24), np.float32)},
            "no place for the tensor score.weight",
        ),
        (
            {"model.layers.0.self_attn.k_proj.weight": np.zeros((24, 16), np.float32)},
            r"k_proj.weight is \[24, 16\], and by config.json \[16, 24\]",
        ),
        (
            {"model.norm.weight": np.zeros(24, np.int8)},
            "model.norm.weight is of type I8: accepted are F32, F16, BF16",
        ),
        (
            {"lm_head.weight": np.zeros((61, 24), np.float32)},
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
        (
            {"lm_head.weight": np.zeros((60, 24), np.float32)},
            r"lm_head.weight is \[60, 24\], and by config.json \[61, 24\]",
        ),
    ],
)
def test_tensors_other_than_the_expected_are_refused(small, tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=rf"^\S*altered\S*: .*{message}"):
        load_hf(altered(small[0], tmp_path, **tensors), None)


def test_what_old_files_hold_beside_parameters_is_passed_over(small, tmp_path):
    folder, model, params = small
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    more = {
        "lm_head.weight": embedding,  # tied, and there once more
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    found = load_hf(altered(folder, tmp_path, **more), None)
    assert found[0].config.tie_embeddings == model.config.tie_embeddings
    assert_same(params, found[1])


def test_gpt2_as_it_was_released_has_bare_names_and_masks(tmp_path):
    model = Model(FAMILIES["gpt2"])
    params = random_params(model)
    save_hf(tmp_path / "x", model, params)
    file = tmp_path / "x/model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    tensors |= {
        f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 32, 32), np.float32))
        for i in range(2)
    }
    save_file(tensors, file)
    assert_same(params, load_hf(tmp_path / "x", None)[1])


def test_directories_that_are_not_whole_are_refused(small, tmp_path):
    model, params = small[1:]
    folder = tmp_path / "x"
    with pytest.raises(CheckpointError, match=r"x/config.json: there is no such file"):
        load_hf(folder, None)
    save_hf(folder, model, params, shard_bytes=8000)
    with pytest.raises(CheckpointError, match=r"x exists already"):
        save_hf(folder, model, params)
    index = folder / "model.safetensors.index.json"
    part = folder / json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    whole, listed = part.read_bytes(), index.read_text()
    part.write_bytes(whole[:-20])
    with pytest.raises(
        CheckpointError, match=rf"{part.name}: not a whole safetensors file: ."
    ) as caught:
        load_hf(folder, None)
    assert "\n" not in str(caught.value)
    part.unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"{part.name}: there is no such file, which {index.name} names",
    ):
        load_hf(folder, None)
    part.write_bytes(whole)
    for text in (
        "[]",
        "{}",
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/secret.safetensors"}}',
        '{"weight_map": {"a": "secret\\u0000.safetensors"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {}}',
        '{"weight_map": 3}',
    ):
        index.write_text(text)
        with pytest.raises(
            CheckpointError, match=r"index.json: expected a JSON object with weight_map"
        ):
            load_hf(folder, None)
    index.write_text(listed.replace("model.norm.weight", "model.nor.weight"))
    with pytest.raises(
        CheckpointError, match=r"index.json: model.nor\S*.weight is not in both"
    ):
        load_hf(folder, None)
    index.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"x: there is no model.safetensors and no model.safetensors.index.json",
    ):
        load_hf(folder, None)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON: ."):
        load_hf(folder, None)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object"):
        load_hf(folder, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: "),
        (b"null", "expected a JSON object, got None"),
        (b'{"vocab_size": NaN}', "not JSON: "),
        (
            b'{"vocab_size": ' + b"9" * 400 + b"}",
            "not JSON: vocab_size is beyond the range",
        ),
        (b'{"vocab_size": 1e999}', "not JSON: vocab_size is beyond the range"),
        (b"[" * 200_000, "not JSON: recursion limit exceeded"),
        (b'{"model_type": "\\ud800"}', "not JSON: "),
        (b"\xff", "not JSON: "),
        ("{}".encode("utf-16"), "not JSON: it is UTF-16.*expected UTF-8"),
        (b"\x1f\x8b\x08", "not JSON: it is compressed by gzip"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_one_line(tmp_path, name, content, message):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / name).write_bytes(content)
    if name != "config.json" and content == b"null":
        message = "expected a JSON object with weight_map"
    with pytest.raises(CheckpointError, match=f"{name}: {message}") as caught:
        load_hf(tmp_path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def shard(header, data=b"", size=None) -> bytes:
    """Returns a safetensors file with a header of any content."""
    size = len(header) if size is None else size
    return size.to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file: "),
        (shard(b"{}", size=2**63), "not a whole safetensors file: .*too large"),
        (shard(b"{}", size=10**7), "not a whole safetensors file: .*header length"),
        (shard(b"{}", bytes(10**7), size=9 * 10**6), "its header has 9000000 bytes"),
        (shard(b"{"), "not a whole safetensors file: "),
        (shard(b"[" * 100_000), "not a whole safetensors file: "),
        (shard(b"\xff\xff"), "not a whole safetensors file: "),
        (
            shard(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
            "not a whole safetensors file: ",
        ),
        (
            shard(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', bytes(4)),
            "not a whole safetensors file: ",
        ),
        (
            shard(
                b'{"a\\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
            ),
            "there is no tensor layers.29.input_layernorm.weight",
        ),
        (None, "is a folder; expected a file"),
        ("pipe", "is a device or a pipe; expected a file"),
    ],
)
def test_damaged_safetensors_are_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    file = tmp_path / "model.safetensors"
    if content is None:
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hf(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards_and_layers_that_are_not_there(small, tmp_path):
    model, params = small[1:]
    folder = tmp_path / "x"
    save_hf(folder, model, params, shard_bytes=8000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    save_file(tensors | load_file(first), second)
    with pytest.raises(
        CheckpointError, match=rf"{second.name}: \S+ is in {first.name} too"
    ):
        load_hf(folder)
    save_file(tensors, second)
    index = folder / "model.safetensors.index.json"
    listed = index.read_text()
    name = next(iter(tensors))
    swapped = json.loads(listed)
    swapped["weight_map"][name] = first.name
    index.write_text(json.dumps(swapped))
    with pytest.raises(
        CheckpointError, match=f"{name} is in {second.name}, not in {first.name}"
    ):
        load_hf(folder)
    index.write_text(listed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 1024})
    )
    # The shapes of 1024 layers take a minute; this is an error before.
    with pytest.raises(CheckpointError, match=r"no tensor \S*layers.1023.input_layern"):
        load_hf(folder)


def test_what_cannot_be_written_leaves_nothing(small, tmp_path):
    _, model, params = small

    def save(change=None, *args, **more):
        save_hf(
            tmp_path / "x",
            model,
            jax.tree.map(lambda x: x, params) if change is None else change,
            *args,
            **more,
        )

    big = jax.tree.map(lambda x: x * 1e6, params)
    with pytest.raises(CheckpointError, match=r"not all numbers are finite in float16"):
        save(big, "float16", shard_bytes=8000)
    with pytest.raises(
        ConfigError, match=r"dtype is 'int8': accepted are float32, float16, bfloat16"
    ):
        save(None, "int8")
    with pytest.raises(
        CheckpointError,
        match=r"not this model's: head/kernel is \[24\], and in the model absent",
    ):
        save(params | {"head": {"kernel": np.zeros(24)}})
    with pytest.raises(
        ConfigError, match=r"special_ids\['pad'\] is 61: the vocabulary has 61 ids"
    ):
        save(special_ids={"pad": 61})
    with pytest.raises(
        ConfigError, match=r"special_ids\['mask'\]: accepted are pad, bos, eos"
    ):
        save(special_ids={"mask": 1})
    assert not list(tmp_path.iterdir())


def test_ids_are_those_given_and_no_others(small, tmp_path):
    _, model, params = small
    save_hf(
        tmp_path / "x", model, params, special_ids={"pad": 0, "bos": None, "eos": 2}
    )
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert {k: v for k, v in config.items() if k.endswith("token_id")} == {
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }


# ------------------------------------------------------------------ rewards


def test_a_rewards_constant_is_dropped_by_name_only_and_comes_back(tmp_path):
    model = Model(FAMILIES["llama-gqa"], "scalar")
    params = random_params(model)
    constant = float(params["head"]["bias"])
    ids = {"pad": 0}
    with pytest.raises(
        ConfigError,
        match=rf"the reward's constant, {constant:.6g}, .* --drop_bias",
    ):
        save_hf(tmp_path / "x", model, params, special_ids=ids)
    with pytest.raises(ConfigError, match=r"special_ids\['pad'\] is missing"):
        save_hf(tmp_path / "x", model, params, drop_bias=True)
    with pytest.raises(ConfigError, match=r"special_ids\['pad'\] is 2, bos or eos too"):
        save_hf(
            tmp_path / "x",
            model,
            params,
            special_ids={"pad": 2, "eos": 2},
            drop_bias=True,
        )
    save_hf(tmp_path / "x", model, params, special_ids=ids, drop_bias=True)
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForSequenceClassification"]
        and len(config["id2label"]) == 1
    )
    np.testing.assert_array_equal(
        load_file(tmp_path / "x/model.safetensors")["score.weight"],
        params["head"]["kernel"][None],
    )
    again, found = load_hf(tmp_path / "x", None)
    assert again.head == "scalar"
    assert_same(params, found)


def test_a_rewards_constant_goes_into_a_final_layernorm(tmp_path):
    model = Model(FAMILIES["gpt2"], "scalar")
    params = random_params(model)
    save_hf(tmp_path / "x", model, params, special_ids={"pad": 0})
    found = load_hf(tmp_path / "x", None)[1]
    assert found["head"]["bias"] == 0
    kernel = params["head"]["kernel"].astype(np.float64)
    np.testing.assert_array_equal(kernel, found["head"]["kernel"])
    y = np.random.default_rng(1).normal(size=(5, 24))
    theirs = (y + found["backbone"]["norm"]["bias"]) @ kernel
    np.testing.assert_allclose(
        theirs,
        (y + params["backbone"]["norm"]["bias"]) @ kernel + params["head"]["bias"],
        atol=1e-6,
    )


# ------------------------------------------------------------------ memory and placement


def test_each_array_is_born_in_its_shards(tmp_path):
    model = Model(dataclasses.replace(FAMILIES["llama-gqa"], vocab_size=64))
    params, folder = random_params(model), tmp_path / "x"
    save_hf(folder, model, params, "bfloat16")
    params = jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), params)
    layout = make_layout(MeshConfig(data=1, fsdp=-1, tensor=2))
    found = load_hf(folder, layout)[1]
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, found) == state.shardings(
        abstract, model.axes(), layout
    )
    assert_same(params, jax.device_get(found))
    kernel = found["backbone"]["layers"]["layer_0"]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {
        (24 // layout.mesh.shape["fsdp"], 2, 8)
    }


def test_the_host_holds_about_one_tensor(tmp_path):
    """Thirty tensors of one size: reading holds a few at a time, writing those of one shard."""
    config = TransformerConfig(
        512, 256, 4, 4, 512, 32, d_head=128
    )  # matrices of 256 x 512 numbers
    model = Model(config)
    params = random_params(model)
    tensor, whole = 256 * 512 * 4, sum(x.nbytes for x in jax.tree.leaves(params))
    assert whole > 28 * tensor

    def peak(run):
        tracemalloc.start()
        try:
            kept = run()
            now, most = tracemalloc.get_traced_memory()
            return most, most - now, kept
        finally:
            tracemalloc.stop()

    most = peak(lambda: save_hf(tmp_path / "x", model, params, shard_bytes=4 * tensor))[
        0
    ]
    assert most < 8 * tensor  # a shard, and what its last tensor is made of
    for layout in (None, make_layout(MeshConfig(data=1, fsdp=-1))):
        beside, found = peak(lambda layout=layout: load_hf(tmp_path / "x", layout))[1:]
        assert (
            beside < 2.5 * tensor
        )  # what there was for a time and is not in the result
        assert_same(params, jax.device_get(found[1]))
