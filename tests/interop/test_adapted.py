"""PEFT adapters merged into a model, and adapters that a stage continues to train.

The folders are written here by hand, with PEFT's names and shapes.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax import recipe, stages, state
from rlhfjax.config import to_dict
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import peft_config, store
from rlhfjax.interop.adapted import adapted
from rlhfjax.interop.foreign import Foreign
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.interop.peft import load_peft, save_peft
from rlhfjax.main import main
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model
from rlhfjax.models.lora import LoraConfig
from rlhfjax.roles import DISK, Models
from rlhfjax.stages import stage_config
from rlhfjax.supervised import load_trained
from tests.interop.test_foreign import TINY, hf  # noqa: F401
from tests.interop.test_hf import FAMILIES, random_params, stacked
from tests.interop.test_peft import (
    ALL,
    NAMES,
    SOME,
    logits,
    needs_peft,
    paths,
    random_adapters,
    their_logits,
)

ONE = make_layout(MeshConfig(), jax.devices()[:1])
PREFIX = "base_model.model.model.layers"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    save_file(
        {f"{PREFIX}.{name}.weight": x for name, x in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def in_memory(model, params):
    """Returns a base model whose parameters may be used up."""

    def read(layout):
        shardings = state.shardings(model.shapes(), model.axes(), layout)
        return jax.tree.map(jnp.array, jax.device_put(params, shardings))

    return Foreign(model, read, lambda: None)


def merged(model, params, folder):
    found = adapted(in_memory(model, params), folder)
    return found.model, jax.device_get(found.params(ONE))


# ------------------------------------------------------------------ merged


@pytest.mark.parametrize("scan", (False, True))
def test_each_module_has_its_own_rank_and_scale(scan, tmp_path):
    """W + alpha / sqrt(r) B A, with rank and alpha of the first pattern that matches a name."""
    model = Model(FAMILIES["llama-gqa"])
    params, d = random_params(model), model.config.d_model
    kv = model.config.kv_heads * model.config.head_dim
    heads, width = model.config.n_heads, model.config.head_dim
    a, b = normal(2, d), normal(heads * width, 2, seed=1)
    a_1, b_1 = normal(5, d, seed=2), normal(kv, 5, seed=3)
    config = {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.*_proj": 5, "v_proj": 7},
        "alpha_pattern": {"proj": 1000, "k_proj": 3},  # no module is called "proj"
    }
    tensors = {
        "0.self_attn.q_proj.lora_A": a,
        "0.self_attn.q_proj.lora_B": b,
        "1.self_attn.k_proj.lora_A": a_1,
        "1.self_attn.k_proj.lora_B": b_1,
    }
    folder = write(tmp_path / "adapter", config, tensors)
    of_model, base = model, params
    if scan:
        base = stacked(params)
        of_model = Model(dataclasses.replace(model.config, scan_layers=True))
    again, found = merged(of_model, base, folder)
    assert again == of_model
    expected = jax.tree.map(np.copy, params)
    layers = expected["backbone"]["layers"]
    delta = 8 / math.sqrt(2) * (b @ a).T
    layers["layer_0"]["attention"]["query"]["kernel"] += delta.reshape(d, heads, width)
    delta = 3 / math.sqrt(5) * (b_1 @ a_1).T
    layers["layer_1"]["attention"]["key"]["kernel"] += delta.reshape(d, -1, width)
    expected = stacked(expected) if scan else expected
    for path, x in paths(expected).items():
        np.testing.assert_allclose(paths(found)[path], x, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("name", "lora"), [("gpt2", SOME), ("neox", ALL)])
def test_projections_that_share_a_module_get_their_own_product(name, lora, tmp_path):
    """W + alpha / r A B; GPT-2's c_attn has no adapter of the key."""
    model = Model(FAMILIES[name], lora=lora)
    params, adapters = random_params(model), random_adapters(model)
    save_peft(tmp_path / "adapter", model, adapters)
    _, found = merged(Model(model.config), params, tmp_path / "adapter")
    expected, parts = paths(params), paths(adapters)
    for path in [path for path in parts if path.endswith("lora_a")]:
        start = path.removesuffix("lora_a")
        product = np.tensordot(parts[path], parts[f"{start}lora_b"], 1)
        expected[f"{start}kernel"] = expected[f"{start}kernel"] + lora.scale * product
    assert len(parts) == {"gpt2": 8, "neox": 24}[name]
    for path, x in expected.items():
        np.testing.assert_allclose(paths(found)[path], x, atol=1e-5, err_msg=path)


def test_an_adapter_with_a_score_makes_a_reward_model_of_a_language_model(tmp_path):
    config = dataclasses.replace(FAMILIES["llama"], tie_embeddings=False)
    reward = Model(config, "scalar", SOME)
    params, adapters = random_params(Model(config)), random_adapters(reward)
    save_peft(tmp_path / "adapter", reward, adapters)
    model, found = merged(Model(config), params, tmp_path / "adapter")
    assert model == Model(config, "scalar")
    np.testing.assert_equal(found["head"], adapters["head"])
    assert {path: x.shape for path, x in paths(found).items()} == {
        path: x.shape for path, x in paths(model.shapes()).items()
    }


def test_merged_parameters_lie_in_their_shards(tmp_path):
    config = dataclasses.replace(FAMILIES["llama"], vocab_size=64)
    model = Model(config, lora=ALL)
    save_peft(tmp_path / "adapter", model, random_adapters(model))
    layout = make_layout(MeshConfig(fsdp=2, tensor=2, data=-1))
    params = random_params(model)
    found = adapted(in_memory(Model(model.config), params), tmp_path / "adapter")
    kernel = paths(found.params(layout))["backbone/layers/layer_0/mlp/up/kernel"]
    assert kernel.sharding.spec == layout.spec(("embed", "mlp"), kernel.shape)
    _, alone = merged(Model(model.config), params, tmp_path / "adapter")
    np.testing.assert_allclose(
        kernel, paths(alone)["backbone/layers/layer_0/mlp/up/kernel"], atol=1e-6
    )


# ------------------------------------------------------------------ adapter_config.json

# PEFT 0.21.2 writes these for LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]).
OF_PEFT = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def read(tmp_path, **changes):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(PLAIN | OF_PEFT | changes))
    return peft_config.read(file)


def test_what_peft_writes_is_read(tmp_path):
    config = read(tmp_path, init_lora_weights="eva", an_option_of_tomorrow=None)
    assert (config.rank, config.alpha, config.scale_of("x.q_proj")) == (2, 8, 4.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "use_dora is True: accepted is False"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', which may change the base"),
        ("init_lora_weights", "pissa_niter_4", "save_pretrained.* writes a plain adapter"),
        ("init_lora_weights", "olora", "accepted are True, False, 'gaussian', 'eva', 'orth"),
        ("init_lora_weights", "corda", "init_lora_weights is 'corda'"),
        ("init_lora_weights", "loftq", "init_lora_weights is 'loftq'"),
        ("init_lora_weights", 1, "init_lora_weights is 1"),
        ("layer_replication", [[0, 2], [1, 3]], "layer_replication is .*: accepted is None"),
        ("target_parameters", ["mlp.experts.down_proj"], "target_parameters is"),
        ("trainable_token_indices", [3], "trainable_token_indices is"),
        ("megatron_config", {"a": 1}, "megatron_config is"),
        ("use_qalora", True, "use_qalora is True"),
        ("bias", "lora_only", "bias is 'lora_only': accepted is 'none'"),
        ("an_option_of_tomorrow", 0.5, "an_option_of_tomorrow is 0.5: accepted is None"),
        ("an_option_of_tomorrow", 0, "an_option_of_tomorrow is 0: accepted is None"),
        ("task_type", "TOKEN_CLS", "task_type is 'TOKEN_CLS': accepted is 'CAUSAL_LM' or"),
        ("rank_pattern", {"(a|b": 4}, r"rank_pattern has the key \(a\|b: accepted are"),
        ("alpha_pattern", {r"(\w+)+x": 4.0}, "alpha_pattern has the key .*repeated groups"),
        ("rank_pattern", {"a*b*c*d*": 4}, "with at most 3 repetitions"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(tmp_path, key, value, message):
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: .*{message}"):
        read(tmp_path, **{key: value})


def test_tensors_of_another_rank_than_the_config_says(tmp_path):
    model = Model(FAMILIES["llama"])
    tensors = {
        "0.self_attn.q_proj.lora_A": normal(4, model.config.d_model),
        "0.self_attn.q_proj.lora_B": normal(model.config.d_model, 4),
    }
    folder = write(tmp_path / "adapter", {}, tensors)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.self_attn\.q_proj has rank 4, and by .* 2$"
    ):
        adapted(in_memory(model, {}), folder)


# ------------------------------------------------------------------ commands and stages


@pytest.fixture(scope="module")
def folders(hf, tmp_path_factory):  # noqa: F811
    """Returns a Hugging Face folder, an adapter for it, and the parameters of both, merged."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    lora = LoraConfig(rank=2, alpha=8.0)
    model = Model(TINY, lora=lora)
    adapters = random_adapters(model)
    save_peft(folder, model, adapters)
    _, params = merged(Model(TINY), load_hf(hf)[1], folder)
    return hf, folder, params


def assert_same(a, b, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_commands_take_an_adapter(folders, tmp_path):
    base, folder, params = folders
    flag = f"--adapter={folder}"
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    main(["rlhfjax", "import", f"--model=hf:{base}", flag, f"--workdir={ours}"])
    saved = store.load(ours, ONE)
    assert_same(saved.params, params)
    main(["rlhfjax", "export", f"--workdir=hf:{base}", flag, f"--to={theirs}"])
    assert_same(load_hf(theirs)[1], params)
    card = (theirs / "README.md").read_text()
    assert "The LoRA adapter adapter is merged into the weights." in card


def test_an_adapter_brings_its_tokenizer(folders, conversations, tmp_path):
    base, folder, _ = folders
    changed = tmp_path / "adapter"
    changed.mkdir()
    for file in (*folder.iterdir(), *base.glob("tokenizer*")):
        (changed / file.name).write_bytes(file.read_bytes())
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    for old, new in (("'\n' + m", "': ' + m"), ("assistant\n", "assistant: ")):
        settings["chat_template"] = settings["chat_template"].replace(old, new)
    (changed / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = []
    for adapter in (folder, changed):
        tokenizer = store.open_model(f"hf:{base}", ONE, adapter=str(adapter)).tokenizer
        texts.append(tokenizer.template.text([{"role": "user", "content": "a"}]))
    assert load(sft(base, conversations, changed))[1] == tokenizer
    assert texts == [
        "<|im_start|>user\na<|im_end|>\n",
        "<|im_start|>user: a<|im_end|>\n",
    ]


def sft(base, conversations, adapter, **lora):
    chats = {
        "spec": f"jsonl:{conversations}/train.jsonl",
        "kind": "messages",
        "split": "all",
    }
    return stage_config(
        "sft",
        init_from=f"hf:{base}",
        adapter=str(adapter),
        lora={"rank": 2, "alpha": 8.0} | lora,
        sources=(chats,),
        eval_sources=(chats,),
        length=48,
        batch_size=8,
        steps=1,
        eval_batches=1,
        optim={"learning_rate": 0.0},
    )


def load(config):
    """Returns the model that the stage trains, and its tokenizer."""
    typed = recipe.check(to_dict(config), "sft")
    roles = stages.find("sft").roles(typed)
    return load_trained(typed, Models("sft", roles, ONE, DISK))


def test_a_stage_goes_on_with_an_adapter(folders, conversations, tmp_path):
    """With a learning rate of 0 it leaves the adapter and the merged model as they were."""
    base, folder, params = folders
    recipe.run(sft(base, conversations, folder), tmp_path / "sft")
    assert_same(store.load(tmp_path / "sft", ONE).params, params, atol=1e-6)
    given, left = (
        load_file(place / "adapter_model.safetensors")
        for place in (folder, tmp_path / "sft" / "adapter")
    )
    assert_same(left, given)
    model, _ = load_peft(tmp_path / "sft" / "adapter", Model(TINY))
    assert model.lora.scale == 4.0


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 3}, "sft.lora: must be those of the adapter .*: rank=2, alpha=8, targets="),
        ({"alpha": 4.0}, "alpha=8"),
        ({"targets": "mlp"}, r"targets='attention/query\|attention/value'"),
    ],
)  # fmt: skip
def test_the_adapters_that_a_stage_trains_are_those_of_the_folder(
    folders, conversations, lora, message
):
    base, folder, _ = folders
    loaded, _ = load(sft(base, conversations, folder, **lora))
    with pytest.raises(ConfigError, match=message):
        loaded.read()


def test_a_stage_that_goes_on_with_an_adapter_trains_adapters(
    folders, conversations, tmp_path
):
    config = sft(folders[0], conversations, folders[1], rank=0)
    with pytest.raises(
        ConfigError, match=r"sft\.adapter=.*lora.rank=0 trains the whole"
    ):
        recipe.run(config, tmp_path / "sft")


def test_an_adapter_is_looked_for_before_the_first_step(
    folders, conversations, tmp_path
):
    with pytest.raises(CheckpointError, match=r"sft\.adapter=nowhere: no whole PEFT"):
        recipe.run(sft(folders[0], conversations, "nowhere"), tmp_path / "sft")
    other = write(tmp_path / "dora", {"use_dora": True}, {})
    with pytest.raises(CheckpointError, match=r"sft\.adapter=.*use_dora is True"):
        recipe.run(sft(folders[0], conversations, other), tmp_path / "sft")


# ------------------------------------------------------------------ against PEFT


@needs_peft
@pytest.mark.transformers
@pytest.mark.parametrize("name", NAMES)
def test_pefts_adapters_of_many_ranks_merge_into_its_logits(name, tmp_path):
    """rsLoRA, ranks and scales by pattern, and adapters in one layer of some modules."""
    import peft
    import torch
    import transformers

    base = Model(FAMILIES[name])
    save_hf(tmp_path / "base", base, random_params(base))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    linear = sorted(
        {
            module.rpartition(".")[2]
            for module, layer in plain.named_modules()
            if type(layer).__name__ in ("Linear", "Conv1D")
        }
        - {"lm_head", "embed_out"}
    )
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=linear,
        rank_pattern={rf"\w+\.1\..*{linear[0]}": 7, linear[1]: 2},
        alpha_pattern={f"^.*{linear[1]}": 3, "1.": 50},
        task_type="CAUSAL_LM",
    )
    adapted_model = peft.get_peft_model(plain, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in adapted_model.named_parameters():
            if "lora_" in key:
                p.normal_(0, 0.3)
    adapted_model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {min(x.shape) for x in saved.values()} >= {2, 4, 7}
    model, params = load_hf(tmp_path / "base")
    model, found = merged(model, params, tmp_path / "adapter")
    x = np.random.default_rng(0).integers(1, 61, (2, 12))
    expected = their_logits(adapted_model, x)
    np.testing.assert_allclose(logits(model, found, x), expected, atol=1e-4)
    assert np.abs(logits(model, params, x) - expected).max() > 0.1
