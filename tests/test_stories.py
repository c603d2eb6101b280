"""The small world of the studies: what a story is worth, by hand, and what is drawn."""

import random

import pytest

from experiments.stories import world
from experiments.stories.world import Event, Request, Wish

ANNA_AND_BEN = (
    "Tell a story about Anna and Ben. Anna takes the red ball. Ben gets the ball."
    " At the end Ben is in the park. At the end Anna is sad."
)


@pytest.mark.parametrize(
    ("story", "worth"),
    [
        (
            "Anna took the red ball. Anna gave the ball to Ben. Ben went to the park."
            " Anna was sad.",
            1.0,
        ),
        ("Anna took the red ball.", 1 / 4),
        ("Anna took the red ball. Anna went to the", 1 / 4 * 1 / 2),  # cut off
        ("Anna took the blue ball. Anna gave the ball to Ben.", 1 / 4),
        # Ben is elsewhere: the ball is not given.
        (
            "Anna took the red ball. Ben went to the park. Anna gave the ball to Ben.",
            1 / 3,
        ),
        # Nobody else is asked for, and nothing happens twice.
        ("Anna took the red ball. Leo was sad. Anna took the red ball.", 1 / 4 * 1 / 3),
        ("Ben went to the park. Ben went to the school.", 0.0),
        ("Anna was sad. Anna was happy. Anna was sad.", 0.0),
        ("The cat sat on the mat.", 0.0),
        ("", 0.0),
    ],
)
def test_a_story_is_worth_its_wishes_times_its_agreeing_sentences(story, worth):
    assert world.score(f"<|user|>{ANNA_AND_BEN}<|assistant|>", story) == worth


def test_sentences_after_the_eighth_do_not_agree():
    request = Request(("Anna", "Ben"), (Wish("feels", ("Anna", "sad")),))
    moods = " ".join(f"Ben was {mood}." for mood in world.MOODS)
    eight = f"Anna was sad. Anna met Ben. {moods}"
    assert world.worth(request, eight) == 1
    assert world.worth(request, f"{eight} Anna took the red ball.") == 8 / 9


def test_a_thing_that_is_held_cannot_be_taken_and_one_that_is_lost_can():
    request = Request(("Anna", "Ben"), (Wish("takes", ("Anna", "red", "key")),))
    held = "Ben took the red key. Anna took the red key."
    lost = "Ben took the red key. Ben lost the key. Anna took the red key."
    assert world.worth(request, held) == 0
    assert world.worth(request, lost) == 1
    assert (
        world.worth(request, lost.replace("Anna took the red", "Anna took the blue"))
        == 0
    )


def test_only_the_last_request_counts():
    turns = f"<|user|>Tell a story about Leo and Mary.<|assistant|>No.<|user|>{ANNA_AND_BEN}"
    assert world.score(turns, "Anna took the red ball.") == 1 / 4
    assert world.score("<|user|>Hello<|assistant|>", "Anna took the red ball.") == 0


def test_a_request_is_read_as_it_was_drawn():
    rng = random.Random(0)
    for _ in range(300):
        request = world.draw_request(rng)
        assert world.read_request(request.text()) == request
    assert world.read_request("Anna takes the red ball.") is None


def test_a_story_is_read_as_it_was_written():
    rng = random.Random(1)
    events = [world._any_event(rng, world.PEOPLE) for _ in range(200)]
    assert {event.form for event in events} == set(world.FORMS)
    assert world.read_story(" ".join(e.sentence() for e in events)) == events
    assert world.read_story("Anna was sad.  So Ben") == [
        Event("was", ("Anna", "sad")),
        None,
    ]


def test_a_faultless_story_is_worth_one_and_the_others_are_worth_less():
    rng = random.Random(2)
    requests = [world.draw_request(rng) for _ in range(300)]
    faultless = [world.draw_story(rng, each, 1.0, 1.0) for each in requests]
    assert set(map(world.worth, requests, faultless)) == {1.0}
    found = [world.draw_story(rng, each, **world.WRITERS[1]) for each in requests]
    written = [world.draw_story(rng, each, **world.LABELERS) for each in requests]
    means = [
        sum(map(world.worth, requests, stories)) / len(requests)
        for stories in (found, written)
    ]
    assert 0.25 < means[0] < 0.45 < 0.6 < means[1] < 0.75
    # Stories for other requests fulfill these by chance only.
    others = sum(map(world.worth, requests, faultless[1:])) / len(requests)
    assert others < 0.02


def test_files_are_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "DOCUMENTS", 50)
    monkeypatch.setattr(world, "FORUM", 30)
    monkeypatch.setattr(world, "CHATS", {"train": 20, "test": 10})
    for name in ("a", "b"):
        world.main(str(tmp_path / name))
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("a", "b")
    )
    assert first == second
    assert {name: text.count(b"\n") for name, text in first.items()} == {
        "documents.jsonl": 50,
        "forum.jsonl": 30,
        "chats_train.jsonl": 20,
        "chats_test.jsonl": 10,
        "prompted_test.jsonl": 10,
    }


def test_a_prompt_after_examples_ends_with_the_prompt_without_them():
    plain = list(world.chats(random.Random("test"), 5))
    prompted = list(world.prompted(random.Random("test"), 5))
    for row, alone in zip(prompted, plain, strict=True):
        assert len(row["messages"]) == 6
        assert row["messages"][-2:] == alone["messages"]
