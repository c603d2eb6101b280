"""The Chinese gold labeler, by hand, with a lexicon that we write."""

import math

import pytest

from rlhfjax.data.chinese import INSTALL
from rlhfjax.errors import DataError
from rlhfjax.rewards.gold import ChineseSentiment
from tests import jionlp
from tests.needs import needs


@pytest.fixture
def tables(tmp_path, monkeypatch):
    tables = jionlp.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tables


@pytest.fixture
def gold(tables):
    return ChineseSentiment()


def compound(total):
    return total / math.sqrt(total**2 + 15)


@pytest.mark.parametrize(
    ("response", "total"),
    [
        ("他很高兴。", 1.1),
        ("他很高兴，也愉快。", 1.1 + 1.5),
        ("他不高兴。", -1.1),
        ("他没有讨厌谁。", 1.7),
        ("不。高兴。", 1.1),  # a negation holds for the next word alone
        ("他不信。", -1.1),  # the longer word, not 不 and 信
        ("桌子在边上。", 0.0),
    ],
)
def test_valences_by_hand(gold, response, total):
    assert gold.score(response) == pytest.approx(compound(total))


def test_penalties_count_characters(gold):
    assert gold.score("。。！") == -1.0
    # 6 characters, 3 distinct: (1/2 - 1/4) + 2/5, see test_gold.py.
    assert gold.score("我们走我们走") == pytest.approx(-13 / 20)
    different = "".join(chr(0x4E00 + i) for i in range(34))
    assert gold.score(different) == pytest.approx(-4 * 0.05)


def test_stacked_positive_words_by_hand(gold):
    # 4 positive words in 16 characters: 4 - max(2, 16 / 6) = 4/3 too many.
    parts = gold.explain("高兴甲乙愉快丙丁高兴戊己愉快庚辛")
    assert parts["stacked"] == pytest.approx(0.2 * 4 / 3)
    assert gold.explain("高兴又愉快")["stacked"] == 0.0


def test_a_damaged_or_missing_table_is_one_line(tables):
    jionlp.write_table(tables, "sentiment_words", [("高兴", "very")])
    with pytest.raises(DataError, match=r"gold:zh_sentiment: a table of jionlp is dam"):
        ChineseSentiment()
    (tables / "sentiment_words.zip").unlink()
    with pytest.raises(DataError, match=r"jionlp .*sentiment_words.zip not found: pip"):
        ChineseSentiment()


@needs("jionlp", install=INSTALL)
@pytest.mark.parametrize(
    ("honest", "hack"),
    [
        ("这件事让人高兴。", "高兴高兴高兴"),
        ("祝你成功！", ""),
        ("心情舒畅。", "成功美丽快乐幸福光荣伟大优秀"),
    ],
)
def test_what_a_policy_would_try_scores_less_than_an_honest_answer(honest, hack):
    gold = ChineseSentiment()
    assert gold.score(honest) > gold.score(hack) + 0.2
