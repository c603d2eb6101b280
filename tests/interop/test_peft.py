"""PEFT folders: round trips and errors; against `peft`, equal logits (pytest -m transformers)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.interop.peft import CONFIG, WEIGHTS, load_peft, save_peft
from rlhfjax.models import Model
from rlhfjax.models.lora import LoraConfig
from rlhfjax.state import merge_params
from tests.interop.test_hf import FAMILIES, random_params
from tests.needs import needs

NAMES = ("llama-gqa", "gpt2", "neox", "qwen2")
ALL = LoraConfig(rank=3, alpha=6.0, targets="attention|mlp", dropout=0.1)
SOME = LoraConfig(
    rank=2, alpha=5.0
)  # query and value: two thirds of a fused projection
ONE_LAYER = LoraConfig(rank=2, alpha=5.0, targets="layer_1/(attention/key|mlp/down)")


def random_adapters(model, seed=3):
    """Returns adapters, and a scalar head if any, of numbers that are not 0."""
    leaves, tree = jax.tree.flatten(
        jax.eval_shape(model.init_trained, jax.random.key(0))
    )
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
    )


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize("scan", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_is_loaded(name, scan, tmp_path):
    """Bit for bit, also where projections share a tensor; with a reward's head and its constant."""
    config = dataclasses.replace(FAMILIES[name], scan_layers=scan)
    for i, (adapted, head) in enumerate(
        ((ALL, "lm"), (SOME, "scalar"), (ONE_LAYER, "lm"))
    ):
        if scan and adapted is ONE_LAYER:
            continue
        model = Model(config, head, adapted)
        adapters = random_adapters(model)
        save_peft(tmp_path / str(i), model, adapters)
        again, loaded = load_peft(tmp_path / str(i), Model(config, head))
        assert dataclasses.replace(again.lora, targets="") == dataclasses.replace(
            adapted, targets=""
        )
        assert jax.eval_shape(again.init_trained, jax.random.key(0)) == jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapters
        )
        loaded, expected = paths(loaded), paths(adapters)
        assert loaded.keys() == expected.keys()
        for path, x in expected.items():
            np.testing.assert_array_equal(loaded[path], x, err_msg=path)


def test_names_and_shapes_are_pefts(tmp_path):
    model = Model(FAMILIES["llama-gqa"], lora=SOME)
    save_peft(
        tmp_path, model, random_adapters(model), base="HuggingFaceTB/SmolLM2-135M"
    )
    start = "base_model.model.model.layers.1.self_attn"
    tensors, c = load_file(tmp_path / WEIGHTS), FAMILIES["llama-gqa"]
    assert tensors[f"{start}.q_proj.lora_A.weight"].shape == (2, c.d_model)
    assert tensors[f"{start}.v_proj.lora_B.weight"].shape == (
        c.kv_heads * c.head_dim,
        2,
    )
    assert len(tensors) == 8
    said = json.loads((tmp_path / CONFIG).read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (
        2,
        5.0,
        ["q_proj", "v_proj"],
    )
    assert (
        said["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M"
        and not said["fan_in_fan_out"]
    )


def test_a_fused_projection_has_the_product_of_its_parts(tmp_path):
    """B A of GPT-2's c_attn is [delta q | 0 | delta v] of ours, and its rank is twice ours."""
    model = Model(FAMILIES["gpt2"], lora=SOME)
    adapters = random_adapters(model)
    save_peft(tmp_path, model, adapters)
    tensors, said = (
        load_file(tmp_path / WEIGHTS),
        json.loads((tmp_path / CONFIG).read_text()),
    )
    start = "base_model.model.transformer.h.0.attn.c_attn"
    a, b = (tensors[f"{start}.lora_{letter}.weight"] for letter in "AB")
    assert (
        said["rank_pattern"]["transformer.h.0.attn.c_attn"] == a.shape[0] == 4
        and said["fan_in_fan_out"]
    )
    assert said["alpha_pattern"]["transformer.h.0.attn.c_attn"] == 10.0
    layer = adapters["backbone"]["layers"]["layer_0"]["attention"]
    delta = {
        n: np.tensordot(x["lora_a"], x["lora_b"], 1).reshape(24, 24)
        for n, x in layer.items()
    }
    expected = np.concatenate(
        [delta["query"], np.zeros((24, 24)), delta["value"]], axis=1
    )
    np.testing.assert_allclose((b @ a).T, expected, atol=1e-6)


def test_what_ours_cannot_be_is_one_line(tmp_path):
    model = Model(FAMILIES["gpt2"], lora=SOME)
    save_peft(tmp_path, model, random_adapters(model))
    said, tensors = (
        json.loads((tmp_path / CONFIG).read_text()),
        load_file(tmp_path / WEIGHTS),
    )

    def refused(message, changes={}, more={}, plain=model):  # noqa: B006
        (tmp_path / CONFIG).write_text(json.dumps(said | changes))
        save_file(tensors | more, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            load_peft(tmp_path, plain)

    refused("use_dora is True: accepted is False", {"use_dora": True})
    refused("c_attn has its own scale, 5.0", {"use_rslora": True})  # 10 / sqrt(4)
    refused(
        r"transformer.h.0.attn.c_attn has its own scale, 4.0",
        {"alpha_pattern": {"c_attn": 16.0}},
    )
    fused = "base_model.model.transformer.h.1.attn.c_attn.lora_"
    mixed = {f"{fused}B.weight": np.ones_like(tensors[f"{fused}B.weight"])}
    refused(
        "h.1.attn.c_attn: an adapter of rank 4 is not one of rank 2 per part",
        more=mixed,
    )
    refused(
        "has no place for base_model.model.lm_head",
        more={"base_model.model.lm_head.lora_A.weight": np.ones((2, 4))},
    )
    refused("has no place for base_model", plain=Model(FAMILIES["llama"]))
    (tmp_path / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="no whole PEFT adapter"):
        load_peft(tmp_path, model)
    odd = Model(dataclasses.replace(FAMILIES["gpt2"], norm="rmsnorm"), lora=SOME)
    with pytest.raises(ConfigError, match="no architecture"):
        save_peft(tmp_path / "odd", odd, random_adapters(odd))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Returns a model, and the config and the tensors of its adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    model = Model(FAMILIES["gpt2"], lora=SOME)
    save_peft(folder, model, random_adapters(model))
    return (
        model,
        json.loads((folder / CONFIG).read_text()),
        load_file(folder / WEIGHTS),
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 0, "r: input should be greater than or equal to 1, got 0"),
        ("r", -1, "r: input should be greater"),
        ("r", 2.0, "r: input should be a valid integer, got 2.0"),
        ("r", True, "r: input should be a valid integer, got True"),
        ("r", None, "r: input should be a valid integer, got None"),
        ("r", 10**30, "r: input should be less"),
        ("r", 3, "h.0.attn.c_attn has its own scale"),
        ("lora_alpha", 0, "lora_alpha: input should be greater"),
        ("lora_alpha", "5", "lora_alpha: input should be a valid number, got '5'"),
        ("lora_dropout", 1, "lora_dropout: input should be less than 1"),
        ("rank_pattern", [1], "rank_pattern: input should be a valid dictionary"),
        (
            "rank_pattern",
            {"c_attn": 0},
            "rank_pattern: c_attn: input should be greater",
        ),
        (
            "alpha_pattern",
            {"c_attn": None},
            "alpha_pattern: c_attn: input should be a v",
        ),
        ("modules_to_save", "score", "modules_to_save: input should be a valid list"),
        ("bias", "all", "bias is 'all': accepted is 'none'"),
        ("use_dora", 0, "use_dora is 0: accepted is False"),
        ("use_rslora", "no", "use_rslora: input should be a valid boolean, got 'no'"),
        ("peft_type", "IA3", "peft_type is 'IA3': accepted is 'LORA'"),
        ("lora_bias", True, "lora_bias is True: accepted is None"),
        ("layer_replication", [[0, 2]], "layer_replication is .*: accepted is None"),
    ],
)
def test_options_of_other_adapters_are_one_line(adapter, tmp_path, key, value, message):
    model, config, tensors = adapter
    (tmp_path / CONFIG).write_text(json.dumps(config | {key: value}))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_peft(tmp_path, model)


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({A: (4, 48)}, rf"{A} is \[4, 48\], and by the model \[4, 24\]"),
        ({A: (5, 24)}, rf"{B} is \[72, 4\], and by the model \[72, 5\]"),
        (
            {A: (5, 24), B: (72, 5)},
            "c_attn has rank 5, and by adapter_config.json 4",
        ),
        ({A: (), B: (72,)}, rf"{A} is \[\]"),
        ({A: (0, 24), B: (72, 0)}, rf"{A} is \[0, 24\]"),
        ({B: (24, 4)}, rf"{B} is \[24, 4\], and by the model \[72, 4\]"),
        ({B: None}, f"has no place for {A}"),
        (
            {"base_model.model.lm_head.weight": (2,)},
            "because modules_to_save has 'lm_h",
        ),
        ({"score": (2,)}, "has no place for score"),
    ],
)
def test_adapters_of_another_base_are_one_line(adapter, tmp_path, changes, message):
    model, config, tensors = adapter
    tensors = dict(tensors)
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.ones(shape, np.float32)
    config = config | {"modules_to_save": ["lm_head"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"^\S*{WEIGHTS}: .*{message}"):
        load_peft(tmp_path, model)


def test_adapters_that_are_not_whole_are_one_line(adapter, tmp_path):
    model, config, tensors = adapter

    def error():
        with pytest.raises(CheckpointError) as caught:
            load_peft(tmp_path, model)
        return str(caught.value)

    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert f"there is no {WEIGHTS}" in error()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin: pickles are not read; in Python with peft" in error()
    save_file(
        {name: x.astype(np.int8) for name, x in tensors.items()}, tmp_path / WEIGHTS
    )
    assert "is of type I8: accepted are F32, F16, BF16, F64" in error()
    for constant in ("nan", "x", "1e39"):
        save_file(tensors, tmp_path / WEIGHTS, {"rlhfjax_reward_bias": constant})
        assert f"rlhfjax_reward_bias is '{constant}': expected a float32" in error()
    (tmp_path / WEIGHTS).write_bytes(b"{}")
    assert f"{WEIGHTS}: not a whole safetensors file" in error()
    (tmp_path / CONFIG).write_text("[]")
    assert f"{CONFIG}: expected a JSON object, got []" in error()


# ------------------------------------------------------------------ against PEFT


needs_peft = needs("torch", "transformers", "peft", extra="transformers")


@pytest.fixture(scope="module")
def peft():
    import peft

    return peft


def logits(model, params, x):
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(
        model.logits(params, model.hidden(params, jnp.asarray(x, jnp.int32)))
    )


def their_logits(model, x):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(x)).logits.numpy()


@needs_peft
@pytest.mark.transformers
@pytest.mark.parametrize(
    "lora", (ALL, SOME, ONE_LAYER), ids=("all", "some", "one-layer")
)
@pytest.mark.parametrize("name", NAMES)
def test_pefts_logits_with_our_adapters_are_ours(peft, name, lora, tmp_path):
    import transformers

    model = Model(FAMILIES[name], lora=lora)
    base, adapters = random_params(model), random_adapters(model)
    save_hf(tmp_path / "base", Model(model.config), base)
    save_peft(tmp_path / "adapter", model, adapters)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    x = np.random.default_rng(0).integers(1, 61, (2, 12))
    without = their_logits(plain, x)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    expected = logits(model, merge_params(base, adapters), x)
    assert np.abs(expected - without).max() > 0.1
    np.testing.assert_allclose(their_logits(adapted, x), expected, atol=1e-4)
    np.testing.assert_allclose(
        their_logits(adapted.merge_and_unload(), x), expected, atol=1e-4
    )


@needs_peft
@pytest.mark.transformers
@pytest.mark.parametrize("name", NAMES)
def test_our_logits_with_pefts_adapters_are_theirs(peft, name, tmp_path):
    """Every linear layer has an adapter, the fused ones one of the common rank."""
    import torch
    import transformers

    save_hf(
        tmp_path / "base", Model(FAMILIES[name]), random_params(Model(FAMILIES[name]))
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(plain, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                p.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    model, base = load_hf(tmp_path / "base")
    model, adapters = load_peft(tmp_path / "adapter", model)
    assert model.lora.rank == 4 and model.lora.scale == 1.5
    x = np.random.default_rng(0).integers(1, 61, (2, 12))
    expected = their_logits(adapted, x)
    np.testing.assert_allclose(
        logits(model, merge_params(base, adapters), x), expected, atol=1e-4
    )
    assert np.abs(logits(model, base, x) - expected).max() > 0.1


@needs_peft
@pytest.mark.transformers
def test_a_rewards_head_comes_with_its_adapter(peft, tmp_path):
    import transformers

    model = Model(FAMILIES["llama"], "scalar", SOME)
    base, adapters = random_params(model), random_adapters(model)
    save_hf(
        tmp_path / "base",
        Model(model.config, "scalar"),
        base,
        special_ids={"pad": 0},
        drop_bias=True,
    )
    save_peft(tmp_path / "adapter", model, adapters)
    auto = transformers.AutoModelForSequenceClassification
    adapted = peft.PeftModel.from_pretrained(
        auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    x = np.random.default_rng(0).integers(1, 61, (2, 12))
    params, rows = (
        jax.tree.map(jnp.asarray, merge_params(base, adapters)),
        jnp.asarray(x, jnp.int32),
    )
    ours = (
        model.scalar(params, model.last_hidden(params, rows, jnp.ones_like(rows)))
        - adapters["head"]["bias"]
    )
    np.testing.assert_allclose(their_logits(adapted, x)[:, 0], ours, atol=1e-4)
