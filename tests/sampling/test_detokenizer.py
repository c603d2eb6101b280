"""Pieces of text: those of the whole, whole characters, in the same time for every token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.sampling.detokenizer import Detokenizer
from tests.data.test_tokenizer_shapes import SHAPES

TEXT = "the cat 🌧️ é 猫 ran\n\n  \ttwice\ufffd!"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(["the cat ran a dog sat"] * 40, folder, vocab_size=284)


def pieces(tokenizer, ids) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.rest()]


def test_each_character_comes_with_the_token_that_finishes_it(ours):
    found = pieces(ours, ours.encode("é🌧"))
    assert found == ["", "é", "", "", "", "🌧", ""]


def test_an_unfinished_character_comes_at_the_end(ours):
    ids = ours.encode("a🌧")[:-1]
    assert pieces(ours, ids)[:-1] == ["a", "", "", ""]
    assert "".join(pieces(ours, ids)) == ours.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 283), max_size=40))
def test_the_pieces_of_any_ids_make_the_text_of_the_whole(ours, ids):
    found = pieces(ours, ids)
    assert "".join(found) == ours.decode(ids)


@pytest.mark.parametrize("name", SHAPES)
def test_the_pieces_are_those_of_every_kind_of_tokenizer(name, tmp_path):
    make, template, *_ = SHAPES[name]
    backend, config = make()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = config | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT)
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(found).replace("\ufffd!", "")


def test_a_token_decodes_few_others(ours, monkeypatch):
    """The time of a token does not grow with the response."""
    longest = []
    decode = ours.decode

    def counted(ids):
        longest.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(ours, "decode", counted)
    pieces(ours, ours.encode("the cat ran " * 50))
    assert max(longest) == 2
