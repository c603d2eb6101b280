"""Diversity, repetition and length, counted by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfjax.evals import text


def test_words_keep_apostrophes_and_drop_punctuation():
    got = text.words("Don't stop_now -- it’s 9, OK?! ' 'quoted'")
    assert got == [
        "don't",
        "stop",
        "now",
        "it’s",
        "9",
        "ok",
        "quoted",
    ]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("今天天气真不错", list("今天天气真不错")),  # 7 characters, 6 of them different
        ("今天。天気、ｶﾅ々!", list("今天天気ｶﾅ々")),
        (
            "コーヒーを飲む・カフェ゛",
            list("コーヒーを飲むカフェ"),
        ),  # a dot and a lone voicing mark are no words
        ("我的iPhone15很好, don't", ["我", "的", "iphone15", "很", "好", "don't"]),
        ("\U00020000\U0002a6df字", ["\U00020000", "\U0002a6df", "字"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),  # Korean puts blanks between words
        ("naïve Straße", ["naïve", "straße"]),
    ],
)
def test_pitfall_42_a_chinese_character_and_a_kana_is_a_word(said, words):
    assert text.words(said) == words


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("What is -- tea ?", 5),  # as wc counts
        ("", 0),
        ("孔夫子搬家——尽是书。", 8),
        ("我的iPhone15 很好 , ok", 3 + 2 + 1 + 1),
    ],
)
def test_pitfall_42_runs_between_blanks_where_there_are_blanks(said, count):
    assert text.count_runs(said) == count


def test_pitfall_42_figures_of_chinese_answers_by_hand():
    # Bigrams: 今天 天天 天气 | 今天 天气: 3 distinct of 5. Words: 4 and 3; 天 is twice in one.
    answers = ["今天天气", "今天气"]
    assert text.distinct_n(answers, 2) == pytest.approx(3 / 5)
    assert text.repeated_n(answers[0], 1) == pytest.approx(1 / 4)
    assert text.describe(answers)["words"] == 3.5


@given(st.text(st.characters(max_codepoint=0x24FF), max_size=60))
def test_words_of_scripts_with_blanks_are_runs_of_letters_and_digits(said):
    runs = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", said.lower())
    assert text.words(said) == runs


def test_distinct_n_counts_over_the_set():
    # Bigrams: "a b", "b c" | "a b", "b d" -> 3 different of 4; unigrams a b c a b d -> 4 of 6.
    answers = ["a b c", "A b, d!"]
    assert text.distinct_n(answers, 2) == pytest.approx(3 / 4)
    assert text.distinct_n(answers, 1) == pytest.approx(4 / 6)
    assert text.distinct_n(answers, 3) == 1.0


def test_one_answer_to_every_prompt_is_a_collapse_that_shows():
    assert text.distinct_n(["i love that so much"] * 10, 2) == pytest.approx(0.1)
    assert (
        text.distinct_n(["great"] * 10, 2) == 0.0
    )  # too short to have bigrams: not diverse either
    assert text.distinct_n([], 2) == 0.0


def test_no_bigram_spans_two_answers():
    assert text.distinct_n(["a b", "b c"], 2) == 1.0
    assert text.ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert text.ngrams(["a"], 2) == []


def test_repeated_n_by_hand():
    assert text.repeated_n("we go we go", 2) == pytest.approx(1 / 3)
    assert text.repeated_n("we go we go", 1) == pytest.approx(1 / 2)
    assert text.repeated_n("we", 2) == 0.0


def test_describe():
    figures = text.describe(["a b a b", "", "c d"])
    assert figures["words"] == 2.0
    assert figures["words_p95"] == pytest.approx(
        3.8
    )  # sorted 0 2 4; the 95th percentile lies at 1.9 of [0, 2]
    assert figures["empty"] == pytest.approx(1 / 3)
    assert figures["repeated_2"] == pytest.approx(1 / 9)
    assert figures["distinct_2"] == pytest.approx(3 / 4)
    assert figures["distinct_1"] == pytest.approx(4 / 6)
    assert text.describe([]) == {}
