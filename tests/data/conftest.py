"""A small tokenizer and a few conversations, shared by the tests of data/."""

import os
import random

import pytest

from rlhfjax.data import corpora, files, kept
from rlhfjax.data.sources import Rows
from rlhfjax.data.tokenizer import train_sentencepiece

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "sang",
    "on",
    "under",
    "mat",
    "happy",
    "sad",
    "who",
    "yes",
    "I",
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + rng.choice(".?!")


def conversation(
    rng: random.Random, turns: int, longest: int = 12
) -> list[dict[str, str]]:
    return [
        {
            "role": ("user", "assistant")[i % 2],
            "content": sentence(rng, rng.randint(1, longest)),
        }
        for i in range(turns)
    ]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    rng = random.Random(0)
    texts = [sentence(rng, 10) for _ in range(300)]
    return train_sentencepiece(
        texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=330
    )


@pytest.fixture(scope="session")
def talk():
    """talk(rng, turns, longest=12) -> messages."""
    return conversation


@pytest.fixture(scope="session")
def conversations():
    rng = random.Random(1)
    return Rows(
        [{"messages": conversation(rng, rng.randint(2, 9))} for _ in range(23)],
        "messages",
    )


@pytest.fixture(scope="session")
def documents():
    rng = random.Random(2)
    return Rows(
        [{"text": sentence(rng, rng.randint(1, 60))} for _ in range(19)], "text"
    )


@pytest.fixture(scope="session")
def rankings(tokenizer):
    rng = random.Random(3)
    rows = []
    for i in range(9):
        texts = [sentence(rng, rng.randint(1, 6)) for _ in range(2 + i % 3)]
        rows.append(
            {
                "prompt": sentence(rng, 5),
                "completions": texts,
                "scores": [float(len(t)) for t in texts],
            }
        )
    return Rows(rows, "preferences")


@pytest.fixture(scope="session")
def data_dir(shared):
    folder = shared / "tfds"  # what another worker has prepared is not prepared again
    for build in (corpora.Chitchat, corpora.KingJamesBible):
        corpora.prepare(build(data_dir=os.fspath(folder)))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of indexes; every file is large enough for one."""
    monkeypatch.setattr(kept, "SMALL", -1)
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The number of records that were read."""
    count = []
    read = files.Spans.content

    def counted(records, index, span):
        count.append(index)
        return read(records, index, span)

    monkeypatch.setattr(files.Spans, "content", counted)
    return count
