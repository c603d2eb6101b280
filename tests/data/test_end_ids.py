"""The ids that end a response: read from a model's files, kept with its tokenizer."""

import json

import pytest

from rlhfjax.data.end_ids import END_IDS
from rlhfjax.data.hf_tokenizer import CONFIG_FILE, HuggingFaceTokenizer
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import DataError
from tests.data.test_hf_tokenizer import CONFIG, byte_bpe


@pytest.fixture
def folder(tmp_path):
    tokenizer = HuggingFaceTokenizer(byte_bpe(), CONFIG, template="chatml")
    tokenizer.save(tmp_path)
    return tmp_path


def write(folder, **files):
    for name, ids in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))


def test_all_ids_of_both_files_end_a_response(folder):
    write(folder, config=3, generation_config=[2, 0, 9999])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>") == 2
    assert tokenizer.extra_eos_ids == (0, 3)  # no token has the id 9999
    assert tokenizer.decode([*tokenizer.encode("the cat"), 3]) == "the cat"


@pytest.mark.parametrize("ids", [2, [2], None, []])
def test_a_folder_with_one_end_has_no_others(folder, ids):
    write(folder, config=ids)
    assert load_tokenizer(folder).extra_eos_ids == ()


def test_a_saved_tokenizer_keeps_them(folder, tmp_path):
    """Saved models have no config.json of Hugging Face, nor a generation_config.json."""
    write(folder, generation_config=[0, 3])
    again = tmp_path / "again"
    again.mkdir()
    load_tokenizer(folder).save(again)
    assert not (again / "generation_config.json").exists()
    tokenizer = load_tokenizer(again)
    assert tokenizer.extra_eos_ids == (0, 3) and tokenizer == load_tokenizer(folder)
    assert tokenizer.with_template("").extra_eos_ids == (0, 3)


@pytest.mark.parametrize("ids", ["x", [2, "x"], [True], -1, [1.5], {"a": 1}])
def test_other_values_are_errors_that_name_the_file(folder, ids):
    write(folder, generation_config=ids)
    words = r"generation_config\.json: eos_token_id is .*: expected ids, integers >= 0"
    with pytest.raises(DataError, match=words):
        load_tokenizer(folder)


def test_a_kept_value_of_another_type_is_an_error(folder):
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text()) | {END_IDS: "2"}
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"{END_IDS} is '2': expected ids"):
        load_tokenizer(folder)
