"""The tokenizer loses nothing, invents no turns and trains the same way twice."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data import tokenizer as module
from rlhfjax.data.tokenizer import (
    MARKERS,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from rlhfjax.errors import ConfigError, DataError

ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([*MARKERS, "\u2581", "  ", "\r\n", "<|", "<pad>"]),
    )
)


@settings(max_examples=200, deadline=None)
@given(parts=ANY_TEXT)
def test_any_text_survives_the_round_trip_without_specials(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    forbidden = {tokenizer.token_id(marker) for marker in MARKERS}
    forbidden |= {
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.unk_id,
    }
    assert not forbidden & set(ids)


@settings(max_examples=200, deadline=None)
@given(parts=ANY_TEXT)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.byte_lengths()[np.array(ids, int)].sum() == len(text.encode())
    texts = tokenizer.token_bytes()
    assert b"".join(texts[i] for i in ids) == text.encode()


def test_specials_and_markers_have_no_bytes(tokenizer):
    lengths = tokenizer.byte_lengths()
    specials = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
    assert not lengths[
        specials + [tokenizer.token_id(marker) for marker in MARKERS]
    ].any()
    assert isinstance(tokenizer, Tokenizer)


def test_pitfall_02_pad_bos_eos_and_unk_are_four_ids(tokenizer, tmp_path):
    assert (
        len({tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id})
        == 4
    )
    options = {
        "vocab_size": 300,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
    }
    with open(
        tmp_path / "padless.model", "wb"
    ) as file:  # SentencePiece's defaults: no pad at all
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat"] * 9),
            model_writer=file,
            hard_vocab_limit=False,
            **options,
        )
    with pytest.raises(
        DataError, match="pad, bos, eos and unk must be four distinct ids"
    ):
        SentencePieceTokenizer(tmp_path / "padless.model")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_to_the_byte(tmp_path, model_type):
    texts = [
        "the cat sat on the mat\nthe dog ran under the tree",
        "what a happy bird sang, who knows",
    ] * 20
    models = []
    for run in ("a", "b"):
        train_sentencepiece(
            texts, tmp_path / run, vocab_size=290, model_type=model_type
        )
        models.append((tmp_path / run / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


def test_a_line_longer_than_sentencepiece_accepts_is_not_dropped(tmp_path):
    # The only text is one line of 40 kB, which SentencePiece itself would drop.
    tokenizer = train_sentencepiece(
        ["quixotic zephyr " * 2500], tmp_path, vocab_size=300
    )
    assert len(tokenizer.encode("quixotic zephyr")) <= 4
    unbroken = train_sentencepiece(["abcdéfgh" * 2500], tmp_path, vocab_size=280)
    assert len(unbroken.encode("abcdéfgh")) < 8


def test_a_tokenizer_that_fails_the_round_trip_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module.SentencePieceTokenizer, "decode", lambda self, ids: "x")
    with pytest.raises(DataError, match="round trip"):
        train_sentencepiece(["the cat sat on the mat"] * 9, tmp_path, vocab_size=275)
    assert list(tmp_path.iterdir()) == []


def test_load_from_folder_and_file(tmp_path):
    train_sentencepiece(["the cat sat on the mat"] * 9, tmp_path, vocab_size=275)
    ids = load_tokenizer(tmp_path).encode("the mat")
    assert ids == load_tokenizer(tmp_path / "tokenizer.model").encode("the mat")


def test_errors_say_what_is_wrong(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="vocab_size=9000"):
        train_sentencepiece(["a small text"], tmp_path, vocab_size=9000)
    with pytest.raises(DataError, match="no text to train on"):
        train_sentencepiece(["", "  "], tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(DataError, match=r"no piece '<\|tool\|>'"):
        tokenizer.token_id("<|tool|>")


def test_a_script_of_many_characters_takes_a_coverage(tmp_path):
    # 33,000 characters of one sentence, and 600 characters once each: fewer than 2 %.
    rare = "".join(chr(0x4E00 + i) for i in range(600))
    texts = ["今天天气很好，我高兴。" * 3000, rare]
    with pytest.raises(ConfigError, match=r"alone need (\d+) ids.*character_coverage"):
        train_sentencepiece(texts, tmp_path, vocab_size=288)
    tokenizer = train_sentencepiece(
        texts, tmp_path, vocab_size=288, character_coverage=0.98
    )
    assert len(tokenizer.encode("今天天气很好")) < 6
    ids = tokenizer.encode(rare[-3:])
    assert len(ids) == 9 and tokenizer.decode(ids) == rare[-3:]  # in bytes
    assert tokenizer.byte_lengths()[ids].sum() == 9
