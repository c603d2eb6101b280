"""Qwen3-MoE and Mixtral folders; test_hf_against.py compares them with `transformers`."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model
from rlhfjax.models.params import stacked
from rlhfjax.models.presets import preset
from tests.interop.test_hf import assert_same, described, random_params
from tests.interop.test_hf_families import values_of
from tests.models.families import CONFIGS

MOE = CONFIGS["moe"]
MIXTRAL_LIKE = dataclasses.replace(MOE, qk_norm="none")
QWEN3_MOE = values_of(
    "Qwen3MoeForCausalLM",
    (32, 4),
    (151936, 48, 2048, 6144, 40960),
    attention_bias=False,
    bos_token_id=151643,
    decoder_sparse_step=1,
    eos_token_id=151645,
    head_dim=128,
    hidden_act="silu",
    max_window_layers=48,
    mlp_only_layers=[],
    model_type="qwen3_moe",
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    output_router_logits=False,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.001,
    sliding_window=None,
    tie_word_embeddings=False,
    transformers_version="4.51.0",
    use_sliding_window=False,
)
MIXTRAL = values_of(
    "MixtralForCausalLM",
    (32, 8),
    (32000, 32, 4096, 14336, 32768),
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    model_type="mixtral",
    num_experts_per_tok=2,
    num_local_experts=8,
    output_router_logits=False,
    rms_norm_eps=1e-05,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
    tie_word_embeddings=False,
    transformers_version="4.36.0.dev0",
)


def test_a_release_is_its_preset(tmp_path):
    assert described(tmp_path, QWEN3_MOE).config == preset("qwen3-30b-a3b")
    assert described(tmp_path, MIXTRAL).config == preset("mixtral-8x7b")


def test_transformers_5_has_another_key_of_the_experts(tmp_path):
    values = {**QWEN3_MOE, "num_local_experts": 128}
    values.pop("num_experts")
    assert described(tmp_path, values).config == preset("qwen3-30b-a3b")
    with pytest.raises(CheckpointError, match="num_local_experts = 64"):
        described(tmp_path, QWEN3_MOE | {"num_local_experts": 64})


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 .* 1"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, "mlp_only_layers = "),
        (QWEN3_MOE, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN3_MOE, {"num_experts_per_tok": 129}, "experts_per_token is num_experts_p"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ],
)
def test_other_mixtures_are_refused_by_name(tmp_path, base, change, message):
    with pytest.raises(CheckpointError, match=message):
        described(tmp_path, base | change)


def test_routing_that_neither_family_has_is_not_exported(tmp_path):
    config = dataclasses.replace(MIXTRAL_LIKE, normalize_routing=False)
    with pytest.raises(ConfigError, match="no architecture"):
        save_hf(tmp_path / "x", Model(config), random_params(Model(config)))


@pytest.mark.parametrize(
    ("config", "gate"),
    [
        (MOE, "model.layers.1.mlp.experts.5.gate_proj.weight"),
        (MIXTRAL_LIKE, "model.layers.1.block_sparse_moe.experts.5.w1.weight"),
    ],
    ids=["qwen3_moe", "mixtral"],
)
def test_every_expert_has_tensors_of_its_own(tmp_path, config, gate):
    """Stacked layers are written too, and read into shards of the experts."""
    model = Model(config)
    params = random_params(model)
    save_hf(tmp_path / "x", model, params)
    tensor = load_file(tmp_path / "x/model.safetensors")[gate]
    kernel = params["backbone"]["layers"]["layer_1"]["mlp"]["gate"]["kernel"]
    np.testing.assert_array_equal(tensor, np.asarray(kernel[5]).T)
    scanned = Model(dataclasses.replace(config, scan_layers=True))
    save_hf(tmp_path / "y", scanned, stacked(params), shard_bytes=4000)
    layout = make_layout(MeshConfig(data=2, expert=2))
    for name, where in (("x", None), ("y", layout)):
        found, loaded = load_hf(tmp_path / name, where)
        assert found.config == dataclasses.replace(config, router_loss=0.01)
        assert_same(loaded, params)
    shards = loaded["backbone"]["layers"]["layer_0"]["mlp"]["up"]["kernel"]
    assert shards.addressable_shards[0].data.shape[0] == config.n_experts // 2


def test_an_expert_that_is_missing_is_named(tmp_path):
    model = Model(MOE)
    save_hf(tmp_path / "x", model, random_params(model))
    file = tmp_path / "x/model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.0.mlp.experts.3.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor .*experts\.3\.up_proj"):
        load_hf(tmp_path / "x")
