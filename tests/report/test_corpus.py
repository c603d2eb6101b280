"""The section about a prepared corpus."""

import json
import re

import pytest

from rlhfjax.report import corpus, write_report
from rlhfjax.report.workdir import read_run
from tests.report.made_up_run import CORPUS, NASTY


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "prepare"}')
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    return tmp_path


def test_shares_are_of_the_rows_before_the_filter(workdir):
    (one,) = corpus.prepared(read_run(workdir))
    shares = [
        (row["name"], row["removed"], row["share"], row["left"]) for row in one.filters
    ]
    assert shares == [
        ("language", "200", "20.0 %", "800"),
        ("near", "80", "10.0 %", "720"),
    ]
    assert one.splits == "train 700 rows, 9,000 words; test 20 rows, 300 words"
    assert [row["share"] for row in one.sources] == ["72.0 %"]


def test_the_histogram_ends_with_the_last_length_that_there_is(workdir):
    (one,) = corpus.prepared(read_run(workdir))
    assert one.lengths.columns == {
        "words_from": [0, 1, 2, 4],
        "before": [10, 490, 300, 200],
        "after": [0, 400, 320, 0],
    }


def test_every_text_of_the_page_is_escaped(workdir):
    page = write_report(workdir).read_text()
    assert re.findall(r'<h2[^>]* id="(\w+)"', page)[1] == "corpus"
    assert "<script>alert" not in page and page.count("&lt;script&gt;") >= 3
    assert (
        "classifier of quality tells held-out documents apart with an AUC of 0.912"
        in page
    )
    assert "7 documents lost evaluation text and stayed." in page
    assert "en 800, de 200" in page
    assert NASTY not in page
