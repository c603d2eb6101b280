"""`rlhfjax export`: its files, what it prints, and transformers, which reads them."""

import os
import random
import types

import jax
import numpy as np
import pytest

from rlhfjax import json_text, provenance
from rlhfjax.chat_settings import Options, choose_settings
from rlhfjax.data import chat
from rlhfjax.errors import CheckpointError
from rlhfjax.interop import store
from rlhfjax.interop.export import export
from rlhfjax.main import main
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model, TransformerConfig
from tests.data.conftest import conversation, tokenizer
from tests.interop.test_hf import random_params
from tests.needs import needs

__all__ = ["tokenizer"]  # a fixture
CONFIG = TransformerConfig(
    vocab_size=330, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=64
)
START = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "rlhfjax run --config=x.py",
    "commit": "0123abc",
    "clean": False,
    "seeds": {"sft": 7},
    "versions": {"jax": "0.10.2"},
    "hardware": {"devices": "8 x TPU v5e", "hosts": 2, "machine": "secret-host"},
}


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """Two stages of a recipe: a language model and a reward model."""
    workdir = tmp_path_factory.mktemp("run")
    for name, head in (("01_sft", "lm"), ("02_reward", "scalar")):
        model = Model(CONFIG, head)
        saved = store.SavedModel(model, random_params(model), tokenizer)
        store.save(workdir / name / "model", saved)
        row = json_text.encode(START, name)
        (workdir / name / provenance.FILE).write_text(row + "\n")
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The summary and the folder of each."""
    folder = tmp_path_factory.mktemp("exported")
    old = os.umask(0o022)
    try:
        texts = {
            "lm": export(run / "01_sft", folder / "lm"),
            "reward": export(
                run / "02_reward", folder / "reward", dtype="bfloat16", drop_bias=True
            ),
        }
    finally:
        os.umask(old)
    return types.SimpleNamespace(texts=texts, folder=folder)


def test_it_says_what_was_written_and_how_it_is_loaded(exported):
    text = exported.texts["lm"]
    assert (
        f"wrote {exported.folder}/lm: LlamaForCausalLM, 9,712 parameters, float32"
        in text
    )
    for file in (exported.folder / "lm").iterdir():
        assert f"  {file.name} " in text
    assert "add_generation_prompt=True" in text
    assert f"rlhfjax chat --model=hf:{exported.folder}/lm" in text
    reward = exported.texts["reward"]
    assert "AutoModelForSequenceClassification.from_pretrained(folder)" in reward
    assert "bfloat16" in reward and "rlhfjax chat" not in reward


def test_files_have_the_modes_of_the_umask(exported):
    for name in ("lm", "reward"):
        assert (exported.folder / name).stat().st_mode & 0o777 == 0o755
        for file in (exported.folder / name).iterdir():
            assert file.stat().st_mode & 0o777 == 0o644, file


def test_the_card_says_where_the_model_comes_from(exported):
    card = (exported.folder / "reward" / "README.md").read_text()
    for stage in ("01_sft", "02_reward"):
        row = f"| {stage} | {START['date']} | 0123abc with changes | 7 |"
        assert row in card
    assert "`rlhfjax run --config=x.py`" in card and "8 x TPU v5e" in card
    assert "secret-host" not in card  # a card is published
    assert str(exported.folder) not in card
    assert "# license: add one" in card and "lower than in training by" in card
    assert "02_reward" not in (exported.folder / "lm" / "README.md").read_text()


def test_chat_samples_from_an_export_as_from_the_workdir(run, exported):
    layout = make_layout(devices=jax.devices()[:1])
    settings = [
        choose_settings(name, store.open_model(name, layout), Options())
        for name in (run / "01_sft", f"hf:{exported.folder}/lm")
    ]
    assert settings[0].sampling == settings[1].sampling
    assert not settings[1].notes
    assert settings[1].stop_ids == {settings[0].sampling.eos_id}
    assert not (exported.folder / "reward" / "generation_config.json").exists()


def test_without_a_model_those_of_the_recipe_are_named(run):
    (run / "03_evaluate").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="no model here") as error:
        store.find(run / "03_evaluate")
    assert str(error.value).endswith(f"models are in {run}/01_sft, {run}/02_reward")


def test_the_command_prints_it(run, tmp_path, capsys):
    main(["rlhfjax", "export", f"--workdir={run}/01_sft", f"--to={tmp_path}/x"])
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path}/x: Llama")


@needs("torch", "transformers", extra="transformers")
@pytest.mark.transformers
def test_auto_tokenizer_gives_our_ids(exported, tokenizer):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(exported.folder / "lm")
    rng = random.Random(0)
    for turns in range(1, 30):
        messages = conversation(rng, turns % 5 + 1)
        messages[0]["content"] += "\u2581é🙂 \n 12 345"
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert ids == chat.render(tokenizer, messages)[0].tolist()
        cued = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert cued == chat.render_prompt(tokenizer, messages).tolist()
        text = messages[0]["content"]
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(
            text
        )
        assert theirs.decode(tokenizer.encode(text)) == text


@needs("torch", "transformers", extra="transformers")
@pytest.mark.transformers
@pytest.mark.parametrize("name", ["lm", "reward"])
def test_the_printed_lines_run(exported, name):
    lines = exported.texts[name].partition("load it in Python:\n")[2]
    code = lines.partition("or: ")[0]
    lines = [line.removeprefix("  ") for line in code.splitlines()]
    results = []
    exec("\n".join(lines), {"print": results.append})
    assert len(results) == 1
    assert np.isfinite(results[0]) if name == "reward" else isinstance(results[0], str)
