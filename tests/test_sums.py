"""Checksums of the files of a saved model: what was changed, cut or lost is named."""

import json

import jax.numpy as jnp
import pytest

from rlhfjax import checkpoint, sums
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.errors import CheckpointError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.rewards.load import describe, write

CONFIG = TransformerConfig(
    vocab_size=300, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_length=8
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the cat sat on the mat", "a dog"] * 20
    return train_sentencepiece(texts, tmp_path_factory.mktemp("t"), vocab_size=300)


@pytest.fixture
def folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_tree", lambda path, _: path.mkdir())
    saved = store.SavedModel(Model(CONFIG, "lm"), {"x": jnp.zeros(1)}, tokenizer)
    store.save(tmp_path / "model", saved)
    sums._warn.cache_clear()
    return tmp_path / "model"


def fails(call) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_model_loads_without_a_word(folder, tokenizer, caplog):
    assert store.open_model(folder, make_layout()).tokenizer == tokenizer
    assert not caplog.records


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def change(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "differs from the file that was saved"),
        (change, "differs from the file that was saved"),
        (lambda file: file.write_bytes(b""), "differs from the file that was saved"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_tokenizer_is_named(folder, damage, why):
    file = folder / "tokenizer.model"
    damage(file)
    opened = (
        lambda: store.open_model(folder, make_layout()),
        lambda: load_tokenizer(file),
    )
    for load in opened:
        message = fails(load)
        assert message.startswith(f"{file}: {why}")
        assert message.endswith(sums.RESTORE)


def test_a_tokenizer_that_came_later_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    message = fails(lambda: store.open_model(folder, make_layout()))
    assert "tokenizer.json: was not there when the folder was saved" in message


@pytest.mark.parametrize(
    ("name", "value"), [("n_heads", 4), ("rope_theta", 5.0), ("max_length", 16)]
)
def test_a_changed_option_of_the_model_is_named(folder, name, value):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["transformer"][name] = value
    file.write_text(json.dumps(content))
    message = fails(lambda: store.describe(folder))
    assert message.startswith(f"{file}: {name} is {value}, and was ")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"head": "lm"}', '{"head": 3, "transformer": {}}']
)
@pytest.mark.parametrize("name", ["config.json", sums.FILE])
def test_a_damaged_description_is_named(folder, name, content):
    (folder / name).write_text(content)
    message = fails(lambda: store.describe(folder))
    assert message.startswith(f"{folder / name}: ")
    assert sums.RESTORE in message


def test_an_absent_option_is_its_default(folder):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    del content["transformer"]["rope_theta"]
    file.write_text(json.dumps(content))
    assert store.describe(folder) == Model(CONFIG, "lm")


def test_a_folder_without_sums_loads_with_one_warning(folder, tokenizer, caplog):
    (folder / sums.FILE).unlink()
    for _ in range(2):
        assert store.open_model(folder, make_layout()).tokenizer == tokenizer
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder}: it has no {sums.FILE}")


def test_a_changed_reward_is_named(tmp_path):
    write(tmp_path, {"kind": "gold", "scorer": "sentiment"})
    file = tmp_path / "reward.json"
    file.write_text(file.read_text().replace("sentiment", "length"))
    message = fails(lambda: describe(str(tmp_path)))
    assert message.startswith(f"{file}: differs from the file that was saved")
