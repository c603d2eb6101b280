"""A tokenizer.json made of our SentencePiece model gives our ids, text and conversations alike."""

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data import chat, sentencepiece_json
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import (
    FILES,
    MARKERS,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from rlhfjax.data.tokenizer_files import FILE

SPECIALS = (*MARKERS, "<pad>", "<s>", "</s>", "<unk>")
TEXT = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [" the cat", "dog ", "\u2581", "  ", "\r\n", "<|", "|>", "12 345", "<0x41>"]
        ),
    )
).map("".join)


@pytest.fixture(scope="module")
def converted(tokenizer, tmp_path_factory) -> tokenizers.Tokenizer:
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.export(folder)
    return tokenizers.Tokenizer.from_file(str(folder / FILE))


def ids(converted: tokenizers.Tokenizer, text: str) -> list[int]:
    return converted.encode(text, add_special_tokens=False).ids


def without_specials(text: str) -> bool:
    return not any(special in text for special in SPECIALS)


@settings(max_examples=80, deadline=None)
@given(text=TEXT.filter(without_specials))
def test_a_text_has_the_same_ids_and_comes_back(tokenizer, converted, text):
    expected = tokenizer.encode(text)
    assert ids(converted, text) == expected
    assert converted.encode(text).ids == [tokenizer.bos_id, *expected]
    assert converted.decode(expected) == text == tokenizer.decode(expected)


@settings(max_examples=50, deadline=None)
@given(
    roles=st.lists(st.sampled_from(list(chat.ROLES)), min_size=1, max_size=4),
    texts=st.lists(TEXT.filter(without_specials), min_size=4, max_size=4),
    cue=st.booleans(),
)
def test_a_conversation_has_the_same_ids(tokenizer, converted, roles, texts, cue):
    """As `apply_chat_template` does it: the rendered text, encoded with its special tokens."""
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, texts, strict=False)
    ]
    rendered = tokenizer.template.text(messages, cue=cue)
    assert ids(converted, rendered) == tokenizer.template.render(messages, cue=cue)[0]


@pytest.mark.parametrize("alphabet", ["ab", "a b1", "aé🙂"])
def test_merges_of_repetitive_text_come_in_the_same_order(tmp_path, alphabet):
    """Pieces such as "abab" that can be merged from several pairs."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(alphabet, k=30)) for _ in range(100)]
    texts += ["ab" * rng.randint(1, 20) for _ in range(30)]
    ours = train_sentencepiece(texts, tmp_path, vocab_size=300)
    ours.export(tmp_path)
    converted = tokenizers.Tokenizer.from_file(str(tmp_path / FILE))
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 60)))
        assert ids(converted, text) == ours.encode(text)


def test_an_exported_folder_is_read_as_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.export(tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer
    (tmp_path / "tokenizer.model").unlink()
    theirs = load_tokenizer(tmp_path)
    assert isinstance(theirs, HuggingFaceTokenizer)
    for name in ("pad_id", "bos_id", "eos_id", "unk_id", "vocab_size"):
        assert getattr(theirs, name) == getattr(tokenizer, name)
    messages = [
        {"role": "user", "content": "who sat?"},
        {"role": "assistant", "content": " a cat\n"},
    ]
    assert theirs.template.render(messages) == tokenizer.template.render(messages)
    assert (theirs.byte_lengths() == tokenizer.byte_lengths()).all()


def test_a_chat_template_of_the_user_is_not_ignored(tokenizer, tmp_path):
    tokenizer.export(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + ' ' + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert "+ ' ' + eos_token" in loaded.template.source


def test_a_unigram_model_is_exported_as_it_is(tmp_path):
    texts = ["the cat sat on the mat and the dog ran"] * 20
    trained = train_sentencepiece(
        texts, tmp_path / "t", vocab_size=276, model_type="unigram"
    )
    trained.export(tmp_path)
    assert [name for name in FILES if (tmp_path / name).exists()] == ["tokenizer.model"]
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    model = (tmp_path / "tokenizer.model").read_bytes()
    assert sentencepiece_json.obstacle(model) == "it is not BPE"
