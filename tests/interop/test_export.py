"""`rlhfjax export`: its files, what it prints, and transformers, which reads them."""

import dataclasses
import os
import random
import types

import jax
import numpy as np
import pytest

from rlhfjax import json_text, provenance
from rlhfjax.chat_settings import Options, choose_settings
from rlhfjax.data import chat
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import hf_config, qwen2_folder, store
from rlhfjax.interop.export import export, export_gguf
from rlhfjax.interop.gguf import save_gguf
from rlhfjax.main import main
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model, TransformerConfig
from tests.data.conftest import conversation, tokenizer
from tests.data.test_hf_tokenizer import CONFIG as BYTES
from tests.data.test_hf_tokenizer import byte_bpe
from tests.data.test_tokenizer_shapes import CHAT as MESSAGES
from tests.data.test_tokenizer_shapes import SHAPES, TEXTS, shapes
from tests.interop.test_hf import random_params
from tests.interop.test_hf_against import logits, their_logits
from tests.needs import needs

__all__ = ["shapes", "tokenizer"]  # fixtures
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
    assert not (exported.folder / "reward" / "generation_config.json").exists()


def test_all_ids_that_end_a_response_are_written_and_read_again(tmp_path):
    """A reward model has one: transformers would take a pad that is another for padding."""
    config = json_text.encode({"eos_token_id": [2, 3]}, "config.json")
    source = tmp_path / "source"
    source.mkdir()
    HuggingFaceTokenizer(byte_bpe(), BYTES, template="chatml").save(source)
    (source / "generation_config.json").write_text(config)
    several = load_tokenizer(source)
    written = {}
    for head in ("lm", "scalar"):
        model = Model(dataclasses.replace(CONFIG, vocab_size=340), head)
        saved = store.SavedModel(model, random_params(model), several)
        store.save(tmp_path / head, saved)
        export(tmp_path / head, tmp_path / "out" / head, drop_bias=True)
        written[head] = json_text.read(tmp_path / "out" / head / "config.json")
    assert written["lm"]["eos_token_id"] == [2, 3]
    assert written["scalar"]["eos_token_id"] == 2
    folder = tmp_path / "out" / "lm"
    settings = json_text.read(folder / "generation_config.json")
    assert settings["eos_token_id"] == [2, 3]
    opened = store.open_model(f"hf:{folder}", make_layout(devices=jax.devices()[:1]))
    assert opened.tokenizer.eos_id == 2 and opened.tokenizer.extra_eos_ids == (3,)


def test_without_a_model_those_of_the_recipe_are_named(run):
    (run / "03_evaluate").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="no model here") as error:
        store.find(run / "03_evaluate")
    assert str(error.value).endswith(f"models are in {run}/01_sft, {run}/02_reward")


def test_the_command_prints_it(run, tmp_path, capsys):
    main(["rlhfjax", "export", f"--workdir={run}/01_sft", f"--to={tmp_path}/x"])
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path}/x: Llama")


def test_a_gguf_file_has_the_model_the_tokenizer_and_the_template(
    run, tmp_path, tokenizer, capsys
):
    """Read back as gguf:FILE: parameters rounded to float16, and the same prompt."""
    file = tmp_path / "new" / "policy.gguf"
    old = os.umask(0o022)
    try:
        flags = (f"--workdir={run}/01_sft", f"--to={file}", "--format=gguf")
        main(["rlhfjax", "export", *flags])
    finally:
        os.umask(old)
    said = capsys.readouterr().out
    assert f"wrote {file}: llama, 9,712 parameters, float16, " in said
    assert f"rlhfjax chat --model=gguf:{file}" in said
    assert file.stat().st_mode & 0o777 == 0o644
    assert [child.name for child in file.parent.iterdir()] == ["policy.gguf"]
    layout = make_layout(devices=jax.devices()[:1])
    saved = store.load(f"gguf:{file}", layout)
    original = store.load(run / "01_sft", layout)
    assert saved.model == original.model

    def assert_rounded(found, x):
        expected = x if x.ndim == 1 else np.asarray(x, np.float16).astype(np.float32)
        np.testing.assert_array_equal(found, expected)

    jax.tree.map(assert_rounded, saved.params, original.params)
    messages = [{"role": "user", "content": "who <|user|> sat?"}]
    ids = chat.render_prompt(tokenizer, messages)
    np.testing.assert_array_equal(chat.render_prompt(saved.tokenizer, messages), ids)


def test_what_a_gguf_file_cannot_hold_is_refused(run, tmp_path, capsys):
    file = tmp_path / "x.gguf"
    with pytest.raises(ConfigError, match="holds a language model, not a reward"):
        export_gguf(run / "02_reward", file)
    with pytest.raises(ConfigError, match="dtype is 'int4': accepted are float32, fl"):
        export_gguf(run / "01_sft", file, dtype="int4")
    assert not list(tmp_path.iterdir())
    file.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"--to=\S*x.gguf: it exists; name a new file"
    ):
        export_gguf(run / "01_sft", file)
    for flags, message in (
        (["--format=gguf", "--drop_bias"], "--drop_bias is for reward models"),
        (["--dtype=q8_0"], "dtype is 'q8_0': accepted are float32, float16"),
    ):
        with pytest.raises(SystemExit):
            places = (f"--workdir={run}/01_sft", f"--to={tmp_path}/y")
            main(["rlhfjax", "export", *places, *flags])
        assert message in capsys.readouterr().err


def test_a_number_beyond_float16_leaves_no_file(tmp_path, tokenizer):
    model = Model(CONFIG)
    params = random_params(model)
    params["backbone"]["embed"]["tokens"] = np.full((330, 16), 1e5, np.float32)
    with pytest.raises(CheckpointError, match=r"token_embd.weight: not all n"):
        save_gguf(tmp_path / "x.gguf", model, params, tokenizer)
    params["backbone"]["embed"].pop("tokens")
    with pytest.raises(CheckpointError, match="the parameters are not this model's"):
        save_gguf(tmp_path / "x.gguf", model, params, tokenizer)
    assert not list(tmp_path.iterdir())


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


TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9))


def qwen2_like(qkv_bias=True):
    """A model with Qwen2's biases, which are not zero, or a Llama."""
    model = Model(dataclasses.replace(CONFIG, vocab_size=400, qkv_bias=qkv_bias))
    return model, random_params(model)


def test_a_model_with_qwen2s_tokenizer_stays_one_and_another_is_a_llama(
    tokenizer, shapes
):
    model, params = qwen2_like()
    kept, _ = shapes["qwen3"]  # NFC and single digits, as Qwen2's
    saved = store.SavedModel(model, params, kept)
    assert qwen2_folder.for_transformers(saved) is saved
    for other in (tokenizer, shapes["smollm3"][0], shapes["llama2 first"][0]):
        saved = store.SavedModel(model, params, other)
        llama = qwen2_folder.for_transformers(saved)
        assert hf_config.write(llama.model, "float32", {})[0] == "llama"
    expected = logits(model, params, TOKENS)
    np.testing.assert_array_equal(logits(llama.model, llama.params, TOKENS), expected)
    saved = store.SavedModel(*qwen2_like(qkv_bias=False), tokenizer)
    assert qwen2_folder.for_transformers(saved) is saved


@needs("torch", "transformers", extra="transformers")
@pytest.mark.transformers
@pytest.mark.parametrize("name", ["ours", *SHAPES])
@pytest.mark.parametrize("bias", [True, False], ids=["qwen2", "llama"])
def test_auto_tokenizer_gives_our_ids_and_template_whatever_the_family(
    name, bias, tokenizer, shapes, tmp_path
):
    """transformers 5 puts Qwen2's pre-tokenizer over a qwen2 folder's tokenizer.json."""
    import transformers

    ours = tokenizer if name == "ours" else shapes[name][0]
    model, params = qwen2_like(qkv_bias=bias)
    store.save(tmp_path / "model", store.SavedModel(model, params, ours))
    export(tmp_path / "model", tmp_path / "exported")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids)
    for messages, cue in ((MESSAGES, False), (MESSAGES[:3], True)):
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=cue, return_dict=False
        )
        assert ids == ours.template.render(messages, cue=cue)[0]


@needs("torch", "transformers", extra="transformers")
@pytest.mark.transformers
def test_transformers_computes_the_same_with_a_qwen2_that_was_written_as_a_llama(
    tokenizer, tmp_path
):
    import torch
    import transformers

    model, params = qwen2_like()
    store.save(tmp_path / "model", store.SavedModel(model, params, tokenizer))
    text = export(tmp_path / "model", tmp_path / "exported")
    assert text.startswith("written as a Llama with output biases of zero: ")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    expected = their_logits(torch, theirs, TOKENS)
    np.testing.assert_allclose(logits(model, params, TOKENS), expected, atol=1e-4)


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
