"""GGUF files of each architecture, written by hand as llama.cpp's converter does, and our exports.

tests/interop/test_llama_cpp.py compares what is computed with llama.cpp itself.
"""

import dataclasses

import gguf
import numpy as np
import pytest

from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import names
from rlhfjax.interop.gguf import describe_gguf, load_gguf, save_gguf
from rlhfjax.interop.gguf_file import open_gguf
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.config import RopeScaling
from tests.data.conftest import tokenizer
from tests.interop.test_gguf import permute, q8_0, write
from tests.models.families import random_params

__all__ = ["tokenizer"]  # a fixture
SIZE = {
    "vocab_size": 335,  # more than the tokenizer has
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 64,
    "max_length": 48,
    "norm_eps": 1e-6,
}
GEMMA = {"mlp": "geglu", "norm_plus_one": True, "scale_embedding": True}
CONFIGS = {
    "llama": TransformerConfig(**SIZE, n_kv_heads=2, d_head=16, bias=True),
    "qwen2": TransformerConfig(**SIZE, n_kv_heads=2, qkv_bias=True, rope_theta=1e6),
    "qwen3": TransformerConfig(
        **SIZE, n_kv_heads=2, d_head=16, qk_norm="head", tie_embeddings=False
    ),
    "qwen3moe": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        d_head=16,
        qk_norm="head",
        n_experts=4,
        experts_per_token=2,
        tie_embeddings=False,
    ),
    "smollm3": TransformerConfig(
        **SIZE | {"n_layers": 5},
        attention_pattern=("full", "full", "full", "full_no_rope"),
    ),
    "olmo2": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        residual="norm_after",
        qk_norm="projection",
        tie_embeddings=False,
    ),
    "phi3": TransformerConfig(
        **SIZE, n_kv_heads=2, rope_fraction=0.5, tie_embeddings=False
    ),
    "gemma": TransformerConfig(**SIZE, n_kv_heads=1, d_head=16, **GEMMA),
    "gemma2": TransformerConfig(
        **SIZE,
        **GEMMA,
        n_kv_heads=2,
        residual="sandwich",
        attention_pattern=("window", "full"),
        window=7,
        attention_softcap=50.0,
        logit_softcap=30.0,
    ),
    "gemma3": TransformerConfig(
        **SIZE | {"n_layers": 7},
        **GEMMA,
        n_kv_heads=2,
        residual="sandwich",
        qk_norm="head",
        attention_pattern=("window",) * 5 + ("full",),
        window=7,
        window_rope_theta=10000.0,
        rope_theta=1e6,
        rope_scaling=RopeScaling("linear", factor=8.0),
    ),
}
# What a file says besides the sizes.
METADATA = {
    "qwen3moe": {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
    },
    "qwen2": {"rope.freq_base": 1e6},
    "phi3": {"rope.dimension_count": 4, "attention.sliding_window": 48},
    "gemma2": {
        "attention.sliding_window": 7,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "attention.sliding_window": 7,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    },
}


def metadata(name, config):
    """Returns what llama.cpp's converter writes of a model."""
    described = {
        "block_count": config.n_layers,
        "context_length": config.max_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
    } | METADATA.get(name, {})
    return {f"{name}.{key}": value for key, value in described.items()}


def tensors(name, config, params):
    """Returns the tensors that llama.cpp's converter writes of a model."""
    one = 1.0 if config.norm_plus_one else 0.0
    arrays = {path: np.asarray(x) for path, x in names.leaves(params).items()}

    def heads(path, n_heads):
        """A projection to heads, [heads * width, d], or its bias."""
        x = arrays[path]
        x = x.reshape(len(x), -1).T if path.endswith("kernel") else x.ravel()
        return permute(x, n_heads) if name in ("llama", "smollm3") and n_heads else x

    placed = {"ffn_norm": "norm_2", "attn_norm": "norm_1"}
    if name in ("gemma2", "gemma3"):
        placed |= {
            "post_attention_norm": "norm_2",
            "ffn_norm": "norm_3",
            "post_ffw_norm": "norm_4",
        }
    if name == "olmo2":
        placed = {"post_attention_norm": "norm_1", "post_ffw_norm": "norm_2"}
    out = {
        "token_embd.weight": arrays["backbone/embed/tokens"],
        "output_norm.weight": arrays["backbone/norm/scale"] + one,
    }
    if not config.tie_embeddings:
        out["output.weight"] = arrays["head/kernel"].T
    for i in range(config.n_layers):
        at = f"backbone/layers/layer_{i}/"
        layer = {
            f"{norm}.weight": arrays[f"{at}{ours}/scale"] + one
            for norm, ours in placed.items()
        }
        for leaf, end in (("kernel", "weight"), ("bias", "bias")):
            if f"{at}attention/query/{leaf}" in arrays:
                q = heads(f"{at}attention/query/{leaf}", config.n_heads)
                k = heads(f"{at}attention/key/{leaf}", config.kv_heads)
                v = heads(f"{at}attention/value/{leaf}", 0)
                fused = {f"attn_qkv.{end}": np.concatenate([q, k, v])}
                split = {f"attn_q.{end}": q, f"attn_k.{end}": k, f"attn_v.{end}": v}
                layer |= fused if name == "phi3" else split
            if config.n_experts and leaf == "kernel":
                layer["ffn_gate_inp.weight"] = arrays[f"{at}mlp/router/kernel"].T
                for part in ("gate", "up", "down"):
                    experts = [x.T for x in arrays[f"{at}mlp/{part}/kernel"]]
                    layer[f"ffn_{part}_exps.weight"] = np.stack(experts)
            elif f"{at}mlp/up/{leaf}" in arrays:
                gate, up, down = (
                    arrays[f"{at}mlp/{part}/{leaf}"].T
                    for part in ("gate", "up", "down")
                )
                fused = {f"ffn_up.{end}": np.concatenate([gate, up])}
                split = {f"ffn_gate.{end}": gate, f"ffn_up.{end}": up}
                layer |= {f"ffn_down.{end}": down}
                layer |= fused if name == "phi3" else split
        layer["attn_output.weight"] = (
            arrays[f"{at}attention/out/kernel"].reshape(-1, config.d_model).T
        )
        if config.bias:
            layer["attn_output.bias"] = arrays[f"{at}attention/out/bias"]
        if config.qk_norm != "none":
            for norm, ours in (("attn_q_norm", "query"), ("attn_k_norm", "key")):
                scale = arrays[f"{at}attention/{ours}_norm/scale"].ravel()
                layer[f"{norm}.weight"] = scale + one
        out |= {f"blk.{i}.{key}": x for key, x in layer.items()}
    return {key: np.ascontiguousarray(x, np.float32) for key, x in out.items()}


def assert_same(params, expected, atol=0.0):
    params, expected = names.leaves(params), names.leaves(expected)
    assert params.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_allclose(params[path], x, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_each_architecture_is_read(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(Model(config))
    path = tmp_path / "x.gguf"
    write(
        path, metadata(name, config), tensors(name, config, params), architecture=name
    )
    assert describe_gguf(path) == config
    # 1 + scale is rounded to float32.
    assert_same(load_gguf(path)[1], params, 1e-6 if config.norm_plus_one else 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_has_the_tensors_of_the_converter(name, tmp_path, tokenizer):
    config = CONFIGS[name]
    params = random_params(Model(config))
    save_gguf(tmp_path / "x.gguf", Model(config), params, tokenizer, "float32")
    found, stored = open_gguf(tmp_path / "x.gguf")
    expected = tensors(name, config, params)
    assert stored.keys() == expected.keys()
    for key, x in expected.items():
        array = gguf.dequantize(stored[key].data, stored[key].kind)
        np.testing.assert_array_equal(array.reshape(x.shape), x, err_msg=key)
    assert found["general.architecture"] == name
    for key, value in metadata(name, config).items():
        if key != "phi3.attention.sliding_window":  # wider than the context
            assert found[key] == pytest.approx(value), key
    assert len(found["tokenizer.ggml.tokens"]) == config.vocab_size
    again, loaded = load_gguf(tmp_path / "x.gguf")
    assert again == config
    assert_same(loaded, params, 1e-6 if config.norm_plus_one else 0.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_an_export_is_read_back_within_its_rounding(dtype, tmp_path, tokenizer):
    """Vectors stay float32, and a matrix whose rows are no multiple of 32 becomes float16."""
    config = dataclasses.replace(CONFIGS["llama"], d_ff=40)
    params = random_params(Model(config))
    save_gguf(tmp_path / "x.gguf", Model(config), params, tokenizer, dtype)
    _, stored = open_gguf(tmp_path / "x.gguf")
    for name, x in tensors("llama", config, params).items():
        rounded = x
        if x.ndim == 2 and dtype == "bfloat16":  # to nearest even, of the upper 16 bits
            bits = x.view(np.uint32)
            bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
            rounded = bits.view(np.float32)
        elif x.ndim == 2 and (dtype == "float16" or x.shape[1] % 32):
            rounded = x.astype(np.float16).astype(np.float32)
        elif x.ndim == 2:
            rounded = q8_0(x)
        array = gguf.dequantize(stored[name].data, stored[name].kind)
        np.testing.assert_array_equal(array.reshape(x.shape), rounded, err_msg=name)
        assert x.ndim < 2 or np.any(rounded != x)
    assert load_gguf(tmp_path / "x.gguf")[0] == config


LLAMA3 = RopeScaling("llama3", factor=8.0, original_length=8192)


def test_llama_3_has_its_factors_in_a_tensor(tmp_path, tokenizer):
    """By hand, with a head of 8 and base 5e5: the frequencies 1, 0.0376, 0.00141 and 5.32e-5 turn
    1304, 49, 1.84 and 0.069 times within 8,192 tokens; between 1 and 4 turns, m = 0.28.
    """
    config = dataclasses.replace(
        CONFIGS["llama"], d_head=None, rope_theta=5e5, rope_scaling=LLAMA3
    )
    params = random_params(Model(config))
    save_gguf(tmp_path / "x.gguf", Model(config), params, tokenizer)
    _, stored = open_gguf(tmp_path / "x.gguf")
    factors = stored["rope_freqs.weight"].data.view(np.float32).ravel()
    turns = 8192 * 5e5 ** (-2 / 4) / (2 * np.pi)
    middle = 1 / ((1 - (turns - 1) / 3) / 8 + (turns - 1) / 3)
    np.testing.assert_allclose(factors, [1, 1, middle, 8], rtol=1e-6)
    assert describe_gguf(tmp_path / "x.gguf") == config


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", factor=4.0),
        RopeScaling("yarn", factor=4.0, original_length=12),
        RopeScaling("yarn", factor=4.0, original_length=12, attention_factor=1.3),
        RopeScaling("llama3", factor=32.0, original_length=4096),
    ],
)
def test_a_scaled_rope_comes_back(scaling, tmp_path, tokenizer):
    config = dataclasses.replace(CONFIGS["llama"], rope_theta=1e5, rope_scaling=scaling)
    model = Model(config)
    save_gguf(tmp_path / "x.gguf", model, random_params(model), tokenizer)
    found = describe_gguf(tmp_path / "x.gguf")
    factor = found.rope_scaling.attention_factor
    assert factor == (scaling.attention_factor and pytest.approx(1.3, rel=1e-6))
    same = dataclasses.replace(found.rope_scaling, attention_factor=None)
    assert same == dataclasses.replace(scaling, attention_factor=None)
    assert dataclasses.replace(found, rope_scaling=scaling) == config


READ = {  # architecture, metadata beside those above, what the config has then
    "a window is the model's own": (
        "llama",
        {"attention.sliding_window": 9},
        {"attention_pattern": ("window",), "window": 9},
    ),
    "a window as wide as the context": ("phi3", {"attention.sliding_window": 48}, {}),
    "no window": ("gemma3", {"attention.sliding_window": 0}, None),
    "every third layer": (
        "gemma2",
        {"attention.sliding_window_pattern": 3, "block_count": 2},
        {"attention_pattern": ("window",)},
    ),
    "a list": (
        "gemma2",
        {"attention.sliding_window_pattern": [False, True]},
        {"attention_pattern": ("full", "window")},
    ),
    "the old key of linear scaling": (
        "qwen2",
        {"rope.scale_linear": 2.0},
        {"rope_scaling": RopeScaling("linear", factor=2.0)},
    ),
    "a base of its own for windows": (
        "gemma3",
        {"rope.freq_base_swa": 500.0},
        {"window_rope_theta": 500.0},
    ),
    "betas of yarn": (
        "qwen3",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 2.0,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.finetuned": 1,
        },
        {
            "rope_scaling": RopeScaling(
                "yarn", factor=2.0, original_length=48, beta_fast=16.0
            )
        },
    ),
}


@pytest.mark.parametrize("case", READ)
def test_further_metadata_are_read(case, tmp_path):
    name, more, fields = READ[case]
    config = CONFIGS[name]
    given = metadata(name, config) | {f"{name}.{key}": x for key, x in more.items()}
    path = write(
        tmp_path / "x.gguf",
        given,
        tensors(name, config, random_params(Model(config))),
        architecture=name,
    )
    if fields is None:
        fields = {
            "attention_pattern": ("full",),
            "window": None,
            "window_rope_theta": None,
        }
    assert describe_gguf(path) == dataclasses.replace(config, **fields)


MIXTRAL = dataclasses.replace(
    CONFIGS["llama"], bias=False, n_experts=4, experts_per_token=2
)


def test_mixtral_is_a_llama_with_experts(tmp_path, tokenizer):
    params = random_params(Model(MIXTRAL))
    save_gguf(tmp_path / "x.gguf", Model(MIXTRAL), params, tokenizer, "float32")
    found, stored = open_gguf(tmp_path / "x.gguf")
    assert found["general.architecture"] == "llama"
    assert found["llama.expert_count"] == 4
    gate = names.leaves(params)["backbone/layers/layer_1/mlp/gate/kernel"]
    experts = stored["blk.1.ffn_gate_exps.weight"]
    array = gguf.dequantize(experts.data, experts.kind).reshape(4, 64, 32)
    np.testing.assert_array_equal(array, np.swapaxes(gate, 1, 2))
    again, loaded = load_gguf(tmp_path / "x.gguf")
    assert again == MIXTRAL
    assert_same(loaded, params)


def test_a_router_that_does_not_normalize_is_refused(tmp_path, tokenizer):
    model = Model(dataclasses.replace(CONFIGS["qwen3moe"], normalize_routing=False))
    with pytest.raises(ConfigError, match="normalize_routing"):
        save_gguf(tmp_path / "x.gguf", model, random_params(model), tokenizer)


def test_the_27b_of_gemma_divide_scores_by_the_model_width(tmp_path):
    """46 layers are Gemma 2 27B, which llama.cpp recognizes by that: 1 / sqrt(4608 / 32)."""
    config = dataclasses.replace(CONFIGS["gemma2"], n_layers=46, d_head=16)
    path = write(
        tmp_path / "x.gguf",
        metadata("gemma2", config),
        {"token_embd.weight": np.zeros((335, 32), np.float32)},
        architecture="gemma2",
    )
    assert describe_gguf(path).attention_scale == 8**-0.5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"attention_pattern": ("window",), "window": 9}, "window = 9"),
        ("gemma2", {"logit_softcap": None}, "cannot express"),
        ("qwen2", {"d_head": 16}, None),  # as a Llama
        ("olmo2", {"d_head": 16}, "model.d_head = 16"),
        ("llama", {"mlp": "geglu"}, "model.mlp = 'geglu'"),
        ("llama", {"norm": "layernorm"}, "model.norm = 'layernorm'"),
        ("qwen3", {"rope_scaling": LLAMA3}, "kind='llama3'"),
        ("llama", {"attention_scale": 0.3}, "model.attention_scale = 0.3"),
        (
            "qwen3",
            {
                "rope_scaling": RopeScaling(
                    "yarn", factor=2.0, original_length=9, beta_fast=8.0
                )
            },
            "beta_fast=8.0",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    name, changes, message, tmp_path, tokenizer
):
    model = Model(dataclasses.replace(CONFIGS[name], **changes))
    params = random_params(model)
    path = tmp_path / "x.gguf"
    if message is None:
        save_gguf(path, model, params, tokenizer)
        assert open_gguf(path)[0]["general.architecture"] == "llama"
        return
    with pytest.raises(ConfigError, match=message):
        save_gguf(path, model, params, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("gemma2", {"attention.sliding_window_pattern": [True]}, "a list of 2"),
        ("gemma2", {"attention.sliding_window_pattern": 0}, "a list of 2"),
        ("gemma2", {"rope.scaling.type": "longrope"}, "longrope"),
        ("gemma3", {"rope.scaling.type": "yarn"}, "accepted is 'none' or 'linear'"),
        ("phi3", {"rope.dimension_count": 3}, "must be even"),
        ("qwen3", {"expert_count": 4}, "qwen3.expert_count = 4"),
        ("llama", {"expert_used_count": 2}, "accepted is 0 without experts"),
        ("llama", {"expert_count": 4, "expert_used_count": 5}, "from 1 to"),
        ("qwen3moe", {"expert_count": 0}, "accepted is a number of experts"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func = 2"),
        ("qwen3", {"attention.value_length": 8}, "the keys' width, 16"),
    ],
)
def test_metadata_of_other_models_are_refused(name, more, message, tmp_path):
    config = CONFIGS[name]
    given = metadata(name, config) | {f"{name}.{key}": x for key, x in more.items()}
    path = write(tmp_path / "x.gguf", given, {}, architecture=name)
    with pytest.raises(CheckpointError, match=rf"^\S*x\.gguf: .*{message}"):
        load_gguf(path)


def test_factors_of_phi_3_are_refused_by_name(tmp_path):
    config = CONFIGS["phi3"]
    held = tensors("phi3", config, random_params(Model(config)))
    held["rope_factors_long.weight"] = np.ones(2, np.float32)
    path = write(
        tmp_path / "x.gguf", metadata("phi3", config), held, architecture="phi3"
    )
    with pytest.raises(CheckpointError, match="no place for the tensor rope_factors_l"):
        load_gguf(path)
