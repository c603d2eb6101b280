"""The conversations of the package chitchat-dataset, and people's ratings as preferences."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.package_corpora import Example, PackageCorpus, package_file
from rlhfjax.data.rows import split_of


class Chitchat(PackageCorpus):
    """7,168 human conversations (chitchat-dataset 0.9.0, MIT).

    The first speaker is the user, the other the assistant.
    """

    name = "chitchat"
    LICENSE = "MIT"
    RATINGS = ("witty", "upbeat", "interesting")
    source = ("chitchat_dataset", "dataset.json")

    def _features(self) -> dict[str, Any]:
        text = tfds.features.Text
        ratings = f"{', '.join(self.RATINGS)}; -1 unrated"
        return {
            "id": text(),
            "messages": text(doc="JSON: a list of {role, content}, one entry per turn"),
            "text": text(doc="the same as plain text"),
            "opening": text(doc="the question the speakers were given, or empty"),
            "ratings": tfds.features.Tensor(shape=(3,), dtype=np.int32, doc=ratings),
        }

    def examples(self) -> Iterator[Example]:
        """Yields conversations by id; those without a single word are left out."""
        file = package_file(*self.source)
        conversations = json_text.read(file, json_text.Object)
        for key, conversation in conversations.items():
            turns = _turns(conversation["messages"])
            if not turns:
                continue
            ratings = conversation.get("ratings") or {}
            features = {
                "id": key,
                "messages": json_text.encode(turns, key),
                "text": chat.to_text(turns),
                "opening": conversation.get("prompt") or "",
                "ratings": [int(ratings.get(name, -1)) for name in self.RATINGS],
            }
            yield key, features


def _turns(groups: list[list[dict[str, str]]]) -> list[chat.Message]:
    """Returns the turns of a conversation, given the package's groups of messages."""
    turns: list[chat.Message] = []
    first = None
    for message in (message for group in groups for message in group):
        content = message["text"].strip()
        if content:
            first = first if turns else message["sender"]
            role = "user" if message["sender"] == first else "assistant"
            turns.append({"role": role, "content": content})
    return chat.merge_turns(turns)


class ChitchatRatings(Chitchat):
    """Pairs of rated conversations with the same opening (chitchat-dataset 0.9.0, MIT).

    A person rated each conversation as witty, upbeat and interesting, 1 to 10; its score is the
    mean of the three. A row has two conversations of at least LEAST_TURNS turns whose scores differ
    by LEAST_DIFFERENCE or more. Conversations with nothing but 5, the form's default, and those
    without an opening are left out.

    Splits are by conversation: the two of a row are in one split, and a conversation is in no other
    one. Each conversation is in several rows, so rows are not independent.
    """

    name = "chitchat_ratings"
    LEAST_TURNS = 6
    LEAST_DIFFERENCE = 2.0
    DEFAULT_RATING = 5
    VALIDATION, TEST = 0.1, 0.4  # shares of the conversations

    def _features(self) -> dict[str, Any]:
        text = tfds.features.Text
        return {
            "prompt": text(doc="the question the speakers were given"),
            "completions": tfds.features.Sequence(text(doc="`dialogue` of each")),
            "scores": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "conversations": tfds.features.Sequence(text(doc="ids in tfds:chitchat")),
        }

    def examples_of(self, split: str) -> Iterator[Example]:
        """Yields the pairs of a split, by the openings and then by the conversations' order."""
        by_opening: dict[str, list[Rated]] = {}
        for rated in self.rated(split):
            by_opening.setdefault(rated.opening, []).append(rated)
        for group in by_opening.values():
            for first, second in itertools.combinations(group, 2):
                if abs(first.score - second.score) >= self.LEAST_DIFFERENCE:
                    yield _pair(first, second)

    def rated(self, split: str) -> Iterator["Rated"]:
        """Yields the conversations of a split, paired or not."""
        for key, features in self.examples():
            ratings = features["ratings"]
            turns = json_text.parse(features["messages"])
            usable = features["opening"] and len(turns) >= self.LEAST_TURNS
            is_rated = min(ratings) >= 0 and set(ratings) != {self.DEFAULT_RATING}
            its_split = split_of(key, self.VALIDATION, self.TEST)
            if usable and is_rated and its_split == split:
                score = sum(ratings) / len(ratings)
                yield Rated(key, features["opening"], dialogue(turns), score)


class Rated(NamedTuple):
    """A conversation that a person rated."""

    key: str  # its id in tfds:chitchat
    opening: str
    text: str  # see `dialogue`
    score: float  # mean of the ratings, 1 to 10


def dialogue(turns: Sequence[chat.Message]) -> str:
    """Returns a whole conversation as one text: a line per turn, `A: ` for who spoke first."""
    names = {"user": "A", "assistant": "B"}
    return "\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in turns)


def _pair(first: Rated, second: Rated) -> Example:
    """Returns two conversations as a row of kind preferences, with its key."""
    row = {
        "prompt": first.opening,
        "completions": [first.text, second.text],
        "scores": np.array([first.score, second.score], np.float32),
        "conversations": [first.key, second.key],
    }
    return f"{first.key} {second.key}", row
