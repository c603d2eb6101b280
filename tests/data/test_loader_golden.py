"""Batches do not change: digests of the first ones of every loader, in several settings.

The digests are of the loader before sources could be mixed by an option. A resumed run depends on
them: its position says how many examples were taken, not which.

    UPDATE_GOLDEN=1 pytest -n0 tests/data/test_loader_golden.py    # writes them anew
"""

import dataclasses
import hashlib
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from rlhfjax.data.loader import (
    Shards,
    preference_batches,
    pretrain_batches,
    prompt_batches,
    sft_batches,
)
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import Rows
from tests.data.conftest import conversation, sentence
from tests.data.test_templates import make as make_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "batches.json"
BATCHES = 9
SETTINGS = {
    "plain": {},
    "seed": {"seed": 7},
    "small": {"batch_size": 2, "length": 40},
    "shards": {"shards": Shards(2, (0, 1))},
    "pass": {"train": False},
}
LENGTHS = {"pretrain": 24, "sft": 96, "prompts": 48, "preferences": 64}


def rows():
    """Sources of every kind; the bytes of no tokenizer's training are in them."""
    rng = random.Random(5)
    documents = [{"text": sentence(rng, rng.randint(1, 60))} for _ in range(17)]
    chats = [{"messages": conversation(rng, rng.randint(2, 7))} for _ in range(21)]
    rankings = [
        {
            "prompt": sentence(rng, 4),
            "completions": [sentence(rng, 1 + j) for j in range(2 + i % 3)],
            "scores": [float(j) for j in range(2 + i % 3)],
        }
        for i in range(11)
    ]
    return {
        "text": Rows(documents, "text"),
        "messages": Rows(chats, "messages"),
        "preferences": Rows(rankings, "preferences"),
    }


def loaders(tokenizer):
    """Returns {name: options -> batches}."""
    source = rows()
    text, chats, rankings = source["text"], source["messages"], source["preferences"]
    prompts = Prompts(chats, per_conversation=2, seed=3)
    weighted = [(text, 3.0), (chats, 1.0)]

    def load(function, kind, source, **fixed):
        def batches(**options):
            options = {"batch_size": 4, "length": LENGTHS[kind], **fixed, **options}
            return function(source, tokenizer, **options)

        return batches

    return {
        "pretrain": load(pretrain_batches, "pretrain", text),
        "pretrain both": load(pretrain_batches, "pretrain", [text, chats]),
        "pretrain weighted": load(pretrain_batches, "pretrain", weighted),
        "cross_document": load(pretrain_batches, "pretrain", text, cross_document=True),
        "sft": load(sft_batches, "sft", chats),
        "sft both": load(sft_batches, "sft", [chats, chats]),
        "prompts": load(prompt_batches, "prompts", prompts),
        "preferences": load(preference_batches, "preferences", rankings),
        "preferences k": load(preference_batches, "preferences", rankings, k=5),
    }


def digest(batches) -> str:
    """Returns a digest of the first batches: names, dtypes, shapes and bytes of their arrays."""
    sha = hashlib.sha256()
    for batch in itertools.islice(batches, BATCHES):
        for field in sorted(dataclasses.fields(batch), key=lambda field: field.name):
            array = getattr(batch, field.name)
            if array is not None:
                head = f"{field.name} {array.dtype} {array.shape}\n"
                sha.update(head.encode() + array.tobytes())
    return sha.hexdigest()[:16]


def found() -> dict[str, str]:
    tokenizer = make_tokenizer("chatml")
    digests = {}
    for name, load in loaders(tokenizer).items():
        for setting, options in SETTINGS.items():
            if name == "prompts" and "shards" in options:
                continue
            batches = load(**options)
            identity = json.dumps(batches.get_state()["loader"], sort_keys=True)
            marked = hashlib.sha256(identity.encode()).hexdigest()[:16]
            digests[f"{name}, {setting}"] = f"{digest(batches)} {marked}"
    return digests


@pytest.mark.slow
def test_the_batches_and_what_a_position_must_agree_with_are_as_before():
    digests = found()
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(digests, indent=1) + "\n")
        pytest.skip("written")
    assert digests == json.loads(GOLDEN.read_text())
