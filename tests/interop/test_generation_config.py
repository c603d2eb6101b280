"""generation_config.json of Hugging Face folders: what is applied, and what is named instead."""

import json

import pytest

from rlhfjax.errors import DataError
from rlhfjax.interop import generation_config


def read(folder, **options):
    (folder / generation_config.FILE).write_text(json.dumps(options))
    return generation_config.read(folder)


def test_a_folder_without_the_file_says_nothing(tmp_path):
    assert generation_config.read(tmp_path) == ({}, {})


def test_settings_of_published_models(tmp_path):
    llama3 = read(
        tmp_path,
        bos_token_id=128000,
        do_sample=True,
        eos_token_id=[128001, 128008, 128009],
        temperature=0.6,
        top_p=0.9,
        transformers_version="4.42.3",
    )
    assert llama3.settings == {"temperature": 0.6, "top_k": 50, "top_p": 0.9}
    assert not llama3.ignored
    qwen = read(
        tmp_path,
        do_sample=True,
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        eos_token_id=151645,
    )
    assert qwen.settings == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
    }
    assert not qwen.ignored
    smollm2 = read(tmp_path, _from_model_config=True, eos_token_id=2, pad_token_id=2)
    assert smollm2 == ({}, {})


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}),
        ({"do_sample": False, "temperature": 0.9}, {"temperature": 0.0}),
        ({"temperature": 1, "top_p": None}, {"temperature": 1.0}),
        ({"max_new_tokens": 100, "max_length": 4096}, {"max_new_tokens": 100}),
        ({"min_p": 0.05, "stop_strings": "a"}, {"min_p": 0.05, "stop": ("a",)}),
        ({"stop_strings": ["a", "\n\n"]}, {"stop": ("a", "\n\n")}),
        ({"stop_strings": []}, {}),
    ],
)
def test_do_sample_means_what_it_does_in_transformers(tmp_path, options, settings):
    assert read(tmp_path, **options).settings == settings


def test_other_types_and_options_that_we_lack_are_named(tmp_path):
    got = read(
        tmp_path,
        temperature="0.6",
        top_k=1.5,
        num_beams=4,
        typical_p=1.0,
        suppress_tokens=[],
        stop_strings=["a", ""],
    )
    assert got.settings == {}
    assert got.ignored == {
        "temperature": "0.6",
        "top_k": 1.5,
        "num_beams": 4,
        "stop_strings": ["a", ""],
    }


def test_a_file_that_is_no_object_is_an_error(tmp_path):
    (tmp_path / generation_config.FILE).write_text("[1]")
    with pytest.raises(DataError, match=r"generation_config\.json: "):
        generation_config.read(tmp_path)
