"""Structured output: whatever is drawn among the tokens that may follow has the form."""

import random
import re

import numpy as np
import pytest

from rlhfjax import json_text
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.errors import ConfigError
from rlhfjax.sampling.structured import ANY_OBJECT, Form, Structures

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "tall": {"type": "boolean"},
    },
    "required": ["name", "tall"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ['{"name": "the cat", "tall": true}', "a dog ran", "12, 345"] * 40
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(texts, folder, vocab_size=310)


@pytest.fixture(scope="module")
def structures(tokenizer):
    return Structures(tokenizer)


def allowed(constraint) -> list[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def drawn(tokenizer, constraint, seed: int) -> str:
    """Returns a response of tokens drawn among those that may follow, the ends first."""
    rng = random.Random(seed)
    ids = []
    for _ in range(200):
        choices = allowed(constraint)
        if constraint.is_complete or tokenizer.eos_id in choices:
            return tokenizer.decode(ids)
        ids.append(rng.choice(choices))
        constraint.accept(ids[-1])
    raise AssertionError(tokenizer.decode(ids))


@pytest.mark.parametrize("seed", range(8))
def test_random_tokens_make_what_the_schema_says(tokenizer, structures, seed):
    text = drawn(tokenizer, structures.constraint(Form("json", PERSON)), seed)
    person = json_text.parse(text)
    assert list(person) == ["name", "tall"]
    assert isinstance(person["tall"], bool) and len(person["name"]) <= 4


@pytest.mark.parametrize("seed", range(4))
def test_random_tokens_make_what_the_expression_says(tokenizer, structures, seed):
    text = drawn(tokenizer, structures.constraint(Form("regex", "[a-c]{2,5}9")), seed)
    assert re.fullmatch("[a-c]{2,5}9", text)


def test_a_choice_spells_each_of_its_texts(tokenizer, structures):
    texts = ['a "cat"', "a\ndog", "☃"]
    form = Form("choice", texts)
    found = {drawn(tokenizer, structures.constraint(form), seed) for seed in range(30)}
    assert found == set(texts)
    for text in texts:
        constraint = structures.constraint(form)
        for token in tokenizer.encode(text):
            assert token in allowed(constraint) and not constraint.is_complete
            constraint.accept(token)
        assert constraint.is_complete and allowed(constraint) == [tokenizer.eos_id]


def test_a_response_may_end_where_it_is_whole_and_nowhere_else(tokenizer, structures):
    constraint = structures.constraint(Form("regex", "at?"))
    assert tokenizer.eos_id not in allowed(constraint)
    constraint.accept(tokenizer.token_id("a"))
    assert {tokenizer.eos_id, tokenizer.token_id("t")} <= set(allowed(constraint))
    assert not constraint.is_complete


def test_allowed_is_the_mask_for_every_size_of_a_vocabulary(tokenizer, structures):
    constraint = structures.constraint(Form("regex", "at?"))
    ids = allowed(constraint)
    for size in (tokenizer.vocab_size, tokenizer.vocab_size + 70, ids[-1]):
        mask = constraint.allowed(size)
        assert mask.shape == (size,)
        assert np.flatnonzero(mask).tolist() == [i for i in ids if i < size]


def test_specials_never_follow(tokenizer, structures):
    specials = set(tokenizer.template.specials.values()) - {tokenizer.eos_id}
    constraint = structures.constraint(ANY_OBJECT)
    for token in tokenizer.encode('{"'):
        assert not specials & set(allowed(constraint))
        constraint.accept(token)
    assert not {*specials, tokenizer.pad_id, tokenizer.eos_id} & set(
        allowed(constraint)
    )


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form("json", {"type": "strin"}), "json: Invalid type: strin"),
        (Form("json", {"not": {}}), r'json: Unimplemented keys: \["not"\]'),
        (Form("json", "{"), "json: "),
        (Form("regex", "(a"), "regex: error: unclosed group"),
        (Form("choice", []), "choice: expected texts, none of them empty"),
        (Form("choice", ["a", ""]), "choice: expected texts"),
    ],
)
def test_an_invalid_form_is_one_line(structures, form, message):
    with pytest.raises(ConfigError, match=message) as error:
        structures.constraint(form)
    assert "\n" not in str(error.value)


def test_a_token_that_may_not_follow_is_an_error(tokenizer, structures):
    constraint = structures.constraint(Form("regex", "ab"))
    with pytest.raises(ConfigError, match="structured output: "):
        constraint.accept(tokenizer.token_id("c"))
