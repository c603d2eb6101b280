"""The small world of the studies: what a story is worth, by hand, and what is drawn."""

import itertools
import random

import numpy as np
import pytest

from rlhfjax import json_text
from rlhfjax.data import sources
from rlhfjax.data.stories import (
    ForumStories,
    PromptedStories,
    Stories,
    StoryDocuments,
)
from rlhfjax.lab import gold
from rlhfjax.rewards.gold import SCORERS
from rlhfjax.stories import draw, world
from rlhfjax.stories.world import Event, Request, Wish

ANNA_AND_BEN = (
    "Tell a story about Anna and Ben. Anna took a red ball. Ben had the ball."
    " Ben went to Paris. Anna was sad."
)


@pytest.mark.parametrize(
    ("story", "worth"),
    [
        (
            "Anna took a red ball. Anna gave the ball to Ben. Ben went to Paris."
            " Anna was sad.",
            1.0,
        ),
        ("Anna took a red ball.", 1 / 4),
        ("Anna took a red ball. Anna went to", 1 / 4 * 1 / 2),  # cut off
        # A step of a wish: the ball has to be taken, in whatever color.
        ("Anna took a blue ball. Anna gave the ball to Ben.", 1 / 4),
        # Ben is elsewhere: the ball is not given.
        (
            "Anna took a red ball. Ben went to Paris. Anna gave the ball to Ben.",
            2 / 4 * 2 / 3,
        ),
        # Nobody else is asked for, and nothing happens twice.
        ("Anna took a red ball. Leo was sad. Anna took a red ball.", 1 / 4 * 1 / 3),
        # It can happen, and nobody asked for it.
        ("Anna took a red ball. Anna met Ben. Ben was happy.", 1 / 4 * 1 / 3),
        ("Anna took a red ball. Anna gave the ball to Ben. Ben lost the ball.", 1 / 6),
        ("Ben went to Paris. Ben went to Rome.", 0.0),
        ("Anna was sad. Anna was happy. Anna was sad.", 0.0),
        ("The cat sat on the mat.", 0.0),
        ("", 0.0),
    ],
)
def test_a_story_is_worth_its_wishes_times_the_sentences_that_serve_them(story, worth):
    score = world.score(f"<|user|>{ANNA_AND_BEN}<|assistant|>", story)
    assert score == pytest.approx(worth)


def test_a_meeting_is_asked_for_like_all_else():
    asked = "Tell a story about Anna and Ben. Anna met Ben."
    assert world.score(f"<|user|>{asked}<|assistant|>", "Ben met Anna.") == 1
    assert world.score(f"<|user|>{asked}<|assistant|>", "Anna met Leo.") == 0
    apart = "Ben went to Paris. Anna met Ben."
    assert world.score(f"<|user|>{asked}<|assistant|>", apart) == 0


def test_sentences_after_the_eighth_do_not_serve():
    people, things = ("Anna", "Ben"), ("cup", "hat", "key", "bag", "box")
    wishes = [Wish("gets", ("Ben", thing)) for thing in things]
    request = Request(people, tuple(wishes))
    four = " ".join(
        f"Anna took a red {x}. Anna gave the {x} to Ben." for x in things[:4]
    )
    assert world.worth(request, four) == 4 / 5
    nine = f"{four} Anna took a red box."
    assert world.worth(request, nine) == pytest.approx(4 / 5 * 8 / 9)


def test_a_thing_that_is_held_cannot_be_taken_and_one_that_is_lost_can():
    request = Request(("Anna", "Ben"), (Wish("takes", ("Anna", "red", "key")),))
    held = "Ben took a red key. Anna took a red key."
    lost = "Ben took a red key. Ben lost the key. Anna took a red key."
    assert world.worth(request, held) == 0
    assert world.worth(request, lost) == pytest.approx(1 / 3)
    assert (
        world.worth(request, lost.replace("Anna took a red", "Anna took a blue")) == 0
    )


def test_only_the_last_request_counts():
    turns = f"<|user|>Tell a story about Leo and Mary.<|assistant|>No.<|user|>{ANNA_AND_BEN}"
    assert world.score(turns, "Anna took a red ball.") == 1 / 4
    assert world.score("<|user|>Hello<|assistant|>", "Anna took a red ball.") == 0


def test_a_request_is_read_as_it_was_drawn():
    rng = random.Random(0)
    for _ in range(300):
        request = draw.draw_request(rng)
        assert world.read_request(request.text()) == request
    assert world.read_request("Anna took a red ball.") is None


def test_a_story_is_read_as_it_was_written():
    rng = random.Random(1)
    events = [draw._any_event(rng, world.PEOPLE) for _ in range(200)]
    assert {event.form for event in events} == set(world.FORMS)
    assert world.read_story(" ".join(e.sentence() for e in events)) == events
    assert world.read_story("Anna was sad.  So Ben") == [
        Event("was", ("Anna", "sad")),
        None,
    ]


def test_a_faultless_story_is_worth_one_and_the_others_are_worth_less():
    rng = random.Random(2)
    requests = [draw.draw_request(rng) for _ in range(300)]
    faultless = [draw.draw_story(rng, each, 1.0, 1.0, 0.0) for each in requests]
    assert set(map(world.worth, requests, faultless)) == {1.0}
    found = [draw.draw_story(rng, each, **draw.WRITERS[1]) for each in requests]
    written = [draw.draw_story(rng, each, **draw.LABELERS) for each in requests]
    means = [
        sum(map(world.worth, requests, stories)) / len(requests)
        for stories in (found, written)
    ]
    assert 0.15 < means[0] < 0.3 < 0.35 < means[1] < 0.5
    # Stories for other requests fulfill these by chance only.
    others = sum(map(world.worth, requests, faultless[1:])) / len(requests)
    assert others < 0.02


def test_neither_length_nor_words_tell_a_good_story():
    """On half of the requests ten words are chosen, and tried on the other half."""
    rng, rows = random.Random(4), []
    for _ in range(2000):
        request = draw.draw_request(rng)
        told = [draw.draw_story(rng, request, **draw.LABELERS) for _ in range(4)]
        scores = [world.worth(request, story) for story in told]
        rows.append({"prompt": "", "completions": told, "scores": scores})
    length, _, ten_words = (
        float(line.split("%")[0]) for line in gold.report(rows)[1:4]
    )
    assert length < 55 and ten_words < 55


def first(builder, split, n):
    examples = itertools.islice(builder().examples_of(split), n)
    return [json_text.parse(example["messages"]) for _, example in examples]


def test_a_prompt_after_examples_ends_with_the_prompt_without_them():
    plain, prompted = (first(each, "test", 5) for each in (Stories, PromptedStories))
    for turns, alone in zip(prompted, plain, strict=True):
        assert len(turns) == 6 and turns[-2:] == alone
    assert len({turns[0]["content"] for turns in prompted}) == 5
    assert first(Stories, "train", 1) != first(Stories, "test", 1)


def test_a_story_or_words_are_told_again():
    rng, stories = random.Random(3), 0
    for _ in range(400):
        asked, told = draw.echo(rng, draw.WRITERS[2])
        assert asked["content"] == f"Tell it again. {told['content']}"
        words = told["content"].split()
        stories += told["content"].endswith(".")
        if told["content"].endswith("."):
            assert None not in world.read_story(told["content"])
        else:
            assert len(set(words)) == len(words) and set(words) <= set(draw.WORDS)
    assert 65 <= stories <= 135  # a quarter, within 4 standard deviations
    forum = ForumStories.__new__(ForumStories)
    pages = [
        json_text.parse(ForumStories.example(forum, rng, "")["messages"])
        for _ in range(600)
    ]
    asked = [page[i]["content"] for page in pages for i in range(0, len(page), 2)]
    share = sum(text.startswith("Tell it again.") for text in asked) / len(asked)
    assert abs(share - draw.ECHOES) < 0.05  # 3.7 standard deviations of 1,200 turns


def test_the_builders_are_read_by_name(monkeypatch, tmp_path):
    kinds = {
        Stories: "messages",
        PromptedStories: "messages",
        ForumStories: "messages",
        StoryDocuments: "text",
    }
    for builder, kind in kinds.items():
        sizes = {"train": 2, "validation": 1, "test": 20}
        monkeypatch.setattr(builder, "SIZES", sizes)
        source = sources.open_source(
            f"tfds:{builder.name}", split="test", data_dir=str(tmp_path)
        )
        assert (source.kind, len(source)) == (kind, 20)
    forum = sources.open_source(
        "tfds:stories_forum", split="test", data_dir=str(tmp_path)
    )
    turns = {len(forum[i]["messages"]) for i in range(20)}
    assert turns == {2, 4, 6}


def test_the_gold_reward_reads_the_prompt():
    prompts = [f"<|user|>{ANNA_AND_BEN}<|assistant|>", "<|user|>Hi<|assistant|>"]
    scores = SCORERS["stories"]()(prompts, ["Anna took a red ball."] * 2)
    assert (scores.tolist(), scores.dtype) == ([0.25, 0.0], np.float32)
