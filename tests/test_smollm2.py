"""The SmolLM2 recipe with a model of another family: a random Qwen3 with ChatML, a few steps."""

import json
import runpy
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import store
from rlhfjax.interop.hf import save_hf
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model, TransformerConfig
from tests.interop.test_foreign import BYTES, CHATML, SPECIALS
from tests.interop.test_hf import random_params

RECIPE = Path(__file__).parents[1] / "experiments" / "smollm2" / "recipe.py"
QWEN3 = TransformerConfig(
    vocab_size=len(BYTES),
    d_model=16,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_head=8,
    d_ff=32,
    max_length=256,
    qk_norm="head",
    norm_eps=1e-6,
)
# What makes the run small.
SMALL = {
    "sft": {"steps": 2, "eval_every": 2, "eval_batches": 1, "batch_size": 4},
    "collect": {"batch_size": 4},
    "reward": {"steps": 2, "eval_every": 2, "batch_size": 4},
    "ppo": {"steps": 2, "eval_every": 2, "batch_size": 4, "minibatches": 1},
    "evaluate": {"batch_size": 4},
}
LIMITS = (
    ("collect", "prompts"),
    ("collect", "eval_prompts"),
    ("ppo", "eval_prompts"),
    ("evaluate", "prompts"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder as somebody downloads it: weights in two files, a byte tokenizer, ChatML."""
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    model = Model(QWEN3)
    ids = {"pad": 0, "eos": (2, 0)}
    save_hf(folder, model, random_params(model), "bfloat16", special_ids=ids)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(BYTES)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    backend.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**said, "chat_template": CHATML})
    )
    return folder


def config_of(model, **more):
    arg = ",".join(
        f"{name}={value}" for name, value in {"model": model, **more}.items()
    )
    return to_dict(runpy.run_path(str(RECIPE))["get_config"](arg))


def test_another_model_is_tuned_first_and_its_last_layers_are_adapted(folder):
    config = config_of(f"hf:{folder}")
    assert config["stages"][:3] == ["import", "sft", "collect"]
    assert config["import"]["init_from"] == f"hf:{folder}"
    for stage in ("collect", "reward", "ppo"):
        assert config[stage]["init_from"] == "stage:sft"
    assert config["evaluate"]["baseline"] == "stage:sft"
    assert config["sft"]["lora"]["targets"] == "layer_(2)/(attention|mlp)"
    assert config_of(f"hf:{folder}", size="gpu")["sft"]["lora"]["rank"] == 0
    with pytest.raises(ConfigError, match=r"model=Qwen3: expected hf:…, gguf:…, pip:…"):
        config_of("Qwen3")
    with pytest.raises(CheckpointError, match="hf:gone: expected a local folder"):
        config_of("hf:gone")


def on(value, conversations):
    """Returns a config whose chats are those of the tests."""
    if isinstance(value, list | tuple):
        return [on(element, conversations) for element in value]
    if not isinstance(value, dict):
        return value
    if value.get("spec") == "tfds:chitchat":
        spec = f"jsonl:{conversations}/train.jsonl"
        return {"spec": spec, "kind": "messages", "split": "all"}
    return {key: on(element, conversations) for key, element in value.items()}


@pytest.mark.nightly
def test_a_downloaded_model_goes_through_the_recipe(folder, conversations, tmp_path):
    config = on(config_of(f"hf:{folder}"), conversations)
    for stage, options in SMALL.items():
        config[stage] |= options
        for name in ("optim", "value_optim"):
            if name in config[stage]:
                config[stage][name]["warmup_steps"] = 0
    for stage, prompts in LIMITS:
        config[stage][prompts]["limit"] = 4
    metrics = recipe.run(config, tmp_path)
    assert metrics["evaluate/prompts"] == 4
    trained = store.load(tmp_path / "04_ppo", make_layout())
    assert trained.model.config.qk_norm == "head"
    assert trained.tokenizer.eos_id == 2
    assert trained.tokenizer.template.source == CHATML
