"""The stories of `rlhfjax.stories` as TFDS builders; they are drawn, always the same."""

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax import json_text
from rlhfjax.data.package_corpora import Corpus, Example
from rlhfjax.stories import draw


class Stories(Corpus):
    """Requests for stories and labelers' answers, for fine-tuning and as prompts."""

    name = "stories"
    LICENSE = "Apache-2.0"
    VERSION = tfds.core.Version("1.6.0")  # grows when other stories are drawn
    SIZES: ClassVar[dict[str, int]] = {
        "train": 12_000,
        "validation": 600,
        "test": 1_000,
    }
    drawn_as = ""  # the name of the builder that draws the same; empty: its own

    def _features(self) -> dict[str, Any]:
        return {"messages": tfds.features.Text(doc="JSON: a list of {role, content}")}

    def examples_of(self, split: str) -> Iterator[Example]:
        """Yields the examples of a split."""
        rng = random.Random(f"{self.drawn_as or self.name} {split}")
        for i in range(self.SIZES[split]):
            key = f"{split} {i}"
            yield key, self.example(rng, key)

    def example(self, rng: random.Random, key: str) -> dict[str, str]:
        """Returns the next example."""
        return {"messages": json_text.encode(draw.turn(rng, draw.LABELERS), key)}


class PromptedStories(Stories):
    """Those of `stories`, each after solved requests, for a model that was only pretrained."""

    name = "stories_prompted"
    drawn_as = "stories"

    def examples_of(self, split: str) -> Iterator[Example]:
        solved = random.Random(f"{self.name} {split}")
        for key, example in super().examples_of(split):
            before = [
                message
                for _ in range(draw.EXAMPLES)
                for message in draw.turn(solved, draw.WRITERS[0])
            ]
            messages = json_text.parse(example["messages"])
            yield key, {"messages": json_text.encode(before + messages, key)}


class ForumStories(Stories):
    """Pages of one to three requests and stories, each page by one writer, for pretraining."""

    name = "stories_forum"
    VERSION = tfds.core.Version("1.5.0")
    SIZES: ClassVar[dict[str, int]] = {"train": 30_000, "validation": 500, "test": 500}

    def example(self, rng: random.Random, key: str) -> dict[str, str]:
        writer, turns = rng.choice(draw.WRITERS), rng.randint(1, 1 + draw.EXAMPLES)
        page = []
        for _ in range(turns):
            make = draw.echo if rng.random() < draw.ECHOES else draw.turn
            page += make(rng, writer)
        return {"messages": json_text.encode(page, key)}


class StoryDocuments(Stories):
    """Stories that nobody asked for, of all writers, for pretraining."""

    name = "stories_documents"
    VERSION = tfds.core.Version("1.5.0")
    SIZES: ClassVar[dict[str, int]] = {"train": 20_000, "validation": 500, "test": 500}

    def _features(self) -> dict[str, Any]:
        return {"text": tfds.features.Text()}

    def example(self, rng: random.Random, key: str) -> dict[str, str]:
        del key
        request = draw.draw_request(rng)
        return {"text": draw.draw_story(rng, request, **rng.choice(draw.WRITERS))}
