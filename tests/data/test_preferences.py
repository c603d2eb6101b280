"""Ranked completions on disk: both forms say the same, and a folder is whole or not there."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhfjax.data.preferences import ranks_of, read_preferences, write_preferences
from rlhfjax.data.sources import open_source
from rlhfjax.errors import DataError

ROWS = [
    {
        "prompt": f"who sat {i}?\n\u2603",
        "prompt_tokens": [1, 40 + i, 7],
        "completions": ["a cat", "", "no \u201cone\u201d"][: 2 + i % 2],
        "completion_tokens": [[5, 6, 2], [2], list(range(10, 10 + i))][: 2 + i % 2],
        "scores": [0.1, 0.1, -1.6][: 2 + i % 2],
    }
    for i in range(11)
]


@pytest.fixture
def folder(tmp_path):
    write_preferences(
        tmp_path / "data",
        {"train": ROWS, "validation": ROWS[:2]},
        labeler="simulated: length",
    )
    return tmp_path / "data"


def plain(row):
    return {
        name: [list(map(int, ids)) for ids in value]
        if name == "completion_tokens"
        else list(value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in row.items()
    }


def test_what_is_written_is_read_in_order_with_native_ids(folder):
    source = read_preferences(folder)
    assert len(source) == len(ROWS) and len(read_preferences(folder, "validation")) == 2
    for i, row in enumerate(source):
        for name in ("prompt", "prompt_tokens", "completions", "completion_tokens"):
            assert plain(row)[name] == ROWS[i][name]
        np.testing.assert_array_equal(
            np.float32(row["scores"]), np.float32(ROWS[i]["scores"])
        )
        assert row["labeler"] == "simulated: length"


def test_the_twin_in_json_lines_holds_the_same_rows(folder):
    twin = open_source(f"jsonl:{folder}/{{split}}.jsonl", kind="preferences")
    native = read_preferences(folder)
    assert [plain(row) for row in twin] == [plain(row) for row in native]
    assert "\u201cone\u201d" in (folder / "train.jsonl").read_text(
        encoding="utf-8"
    )  # for people: no escapes


def test_tfds_itself_reads_the_folder(folder):
    builder = tfds.builder_from_directory(folder)
    rows = list(builder.as_data_source(split="train"))
    assert len(rows) == 11 and rows[3]["tokens"].tolist() == [5, 6, 2, 2, 10, 11, 12]
    assert rows[3]["token_counts"].tolist() == [3, 1, 3] and rows[3][
        "ranks"
    ].tolist() == [1, 1, 2]


def test_ties_share_a_rank():
    assert ranks_of([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 3]


def test_writing_again_replaces_the_older_rows(folder):
    write_preferences(folder, {"train": ROWS[:3]}, labeler="other")
    assert (
        len(read_preferences(folder)) == 3
        and not (folder / "validation.jsonl").exists()
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        ".data.lock",
        "data",
    ]


KILLED = """
import os, pathlib, signal, sys
from rlhfjax.data import preferences
write = pathlib.Path.write_text
def die(self, *args, **kwargs):
    if self.suffix == ".jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, *args, **kwargs)
pathlib.Path.write_text = die
row = {"prompt": "p", "prompt_tokens": [1]}
row |= {"completions": ["a", "b"], "completion_tokens": [[1], [2]], "scores": [0, 1]}
preferences.write_preferences(sys.argv[1], {"train": [row]}, labeler="x")
"""


def test_a_kill_while_writing_leaves_no_folder_and_the_next_write_cleans_up(tmp_path):
    target = tmp_path / "data"
    process = subprocess.run(
        [sys.executable, "-c", KILLED, os.fspath(target)], check=False
    )
    assert process.returncode == -signal.SIGKILL and not target.exists()
    with pytest.raises(DataError, match="holds no dataset"):
        read_preferences(target)
    assert list(tmp_path.glob(".data.tmp-*"))
    write_preferences(target, {"train": ROWS}, labeler="x")
    assert len(read_preferences(target)) == 11 and not list(
        tmp_path.glob(".data.tmp-*")
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scores": [1.0]}, "2 completions but 1 scores"),
        ({"scores": [1.0, float("inf")]}, "finite"),
        ({"completion_tokens": [[1]]}, "2 completions but 1 completion_tokens"),
        ({"prompt": ""}, "column 'prompt' is empty"),
    ],
)
def test_a_malformed_row_is_named_and_nothing_is_written(tmp_path, change, why):
    with pytest.raises(DataError, match=f"split 'train' row 1: .*{why}"):
        write_preferences(
            tmp_path / "data", {"train": [ROWS[0], ROWS[2] | change]}, labeler="x"
        )
    assert not (tmp_path / "data").exists()


def test_pitfall_35_a_score_that_float32_cannot_hold_is_an_error(tmp_path):
    """1e39 is finite as it comes and infinite as ArrayRecord keeps it."""
    row = ROWS[2] | {"scores": [1.0, 1e39]}
    with pytest.raises(
        DataError, match=r"split 'train' row 1: .* in the range of float32, got 1e\+39"
    ):
        write_preferences(tmp_path / "data", {"train": [ROWS[0], row]}, labeler="x")
    assert not (tmp_path / "data").exists()


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no rows in split 'validation'"):
        write_preferences(
            tmp_path / "data", {"train": ROWS, "validation": []}, labeler="x"
        )
