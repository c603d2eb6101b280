"""The report of what predicts a gold reward."""

import json

import numpy as np
import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.lab import gold

ROWS = [
    {"prompt": "p", "completions": ["good day", "day"], "scores": [1.0, 0.0]},
    {
        "prompt": "p",
        "completions": ["day", "a good day", "x"],
        "scores": [0.0, 2.0, 0.0],
    },
] * 4


def test_the_report():
    """The better response is the longer one and says "good", in all pairs."""
    lines = gold.report(ROWS)
    assert lines[0].startswith("8 prompts, 8 held-out pairs")
    assert lines[1:4] == [
        "100.0%  length_accuracy  too high",
        "100.0%  word_accuracy  too high",
        "100.0%  ten_words_accuracy  too high",
    ]
    assert lines[4] == "the ten words: +good"


def test_a_scorer_scores_anew():
    rows = [row | {"scores": [0.0] * len(row["completions"])} for row in ROWS]
    assert "0 held-out pairs" in gold.report(rows)[0]
    assert gold.report(rows, "sentiment")[4].startswith("the ten words: +good")
    with pytest.raises(ConfigError, match=r"gold.name='nothing': expected one of"):
        gold.report(rows, "nothing")
    with pytest.raises(DataError, match="at least 2 are needed"):
        gold.report(ROWS[:1])


def test_the_command_reads_a_source(tmp_path, monkeypatch, capsys):
    file = tmp_path / "pairs_train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["gold", f"jsonl:{tmp_path}/pairs_{{split}}.jsonl", "--gold=sentiment"]
    monkeypatch.setattr(gold.argparse._sys, "argv", words)
    gold.main()
    assert "8 prompts" in capsys.readouterr().out


def test_rows_of_several_lengths_are_padded():
    table = gold._padded([[1.0], [2.0, 3.0]], 2)
    np.testing.assert_array_equal(table, [[1.0, np.nan], [2.0, 3.0]])
