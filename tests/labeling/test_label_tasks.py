"""What a label must be, per task; the order of the page and of the item."""

import pytest

from rlhfjax.labeling import tasks

ORDER = [2, 0, 1]  # the page shows response 2 first
THREE = {"prompt": "p", "responses": ["a", "b", "c"]}


def test_prompts_of_all_forms_become_turns():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert tasks.messages_of("Hi") == turns[:1]
    assert tasks.messages_of(turns) == turns
    marked = (
        "<|system|>Be kind<|user|>Hi<|assistant|>Yo<|user|>So? <\\|user|><|assistant|>"
    )
    assert tasks.messages_of(marked) == [
        {"role": "system", "content": "Be kind"},
        *turns,
        {"role": "user", "content": "So? <|user|>"},
    ]


def test_the_page_sees_texts_alone_in_the_shown_order():
    content = THREE | {"completion_tokens": [[1], [2], [3]], "row": 5}
    assert tasks.shown("rank", content, ORDER) == {
        "task": "rank",
        "prompt": [{"role": "user", "content": "p"}],
        "responses": ["c", "a", "b"],
    }


def test_a_ranking_is_stored_in_the_order_of_the_item():
    given = {
        "ranks": [1, 3, 1],
        "ratings": [7, None, 2],
        "flags": [["harmful"], [], []],
    }
    stored = tasks.stored("rank", THREE, ORDER, given)
    assert stored == {
        "ranks": [3, 1, 1],
        "ratings": [None, 2, 7],
        "flags": [[], [], ["harmful"]],
    }
    assert tasks.as_shown("rank", ORDER, stored) == given
    plain = tasks.stored("rank", THREE, ORDER, {"ranks": [1, 2, 3]})
    assert plain["ratings"] == [None] * 3 and plain["flags"] == [[], [], []]


def test_the_order_is_the_same_for_one_labeler_and_differs_between_labelers():
    orders = {who: tasks.order_for("item", who, 6) for who in "abcdefgh"}
    assert all(sorted(order) == list(range(6)) for order in orders.values())
    assert orders["a"] == tasks.order_for("item", "a", 6)
    assert len({tuple(order) for order in orders.values()}) > 5


def test_demonstrations_are_whole_conversations():
    one = tasks.stored("demonstrate", {"prompt": "p"}, [], {"text": " Hello.\n"})
    assert one["messages"][-1] == {"role": "assistant", "content": "Hello."}
    assert one["messages"][0] == {"role": "user", "content": "p"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    both = tasks.stored("demonstrate", {"both_sides": True}, [], {"messages": turns})
    assert both == {"messages": turns}


def test_feedback_is_sorted_pairs_of_seconds_and_one():
    content = {"prompt": "p", "pieces": ["a", " b"], "seconds_per_token": 0.5}
    given = {"feedback": [[1.5, -1], [0.25, 1]]}
    stored = tasks.stored("feedback", content, [], given)
    assert stored == {"feedback": [[0.25, 1.0], [1.5, -1.0]]}


EDIT = {"prompt": "p", "response": "old"}
STREAM = {"prompt": "p", "pieces": ["a"], "seconds_per_token": 1.0}


@pytest.mark.parametrize(
    ("task", "content", "given", "message"),
    [
        ("rank", THREE, [], "must be an object"),
        ("rank", THREE, {}, "ranks: one is needed for each of the 3"),
        ("rank", THREE, {"ranks": [1, 2]}, "ranks: one is needed"),
        ("rank", THREE, {"ranks": [1, 2, 4]}, "ranks: a value is missing"),
        ("rank", THREE, {"ranks": [1, 2, True]}, "ranks: a value is missing"),
        ("rank", THREE, {"ranks": [1, 2, 3], "ratings": [8, 1, 1]}, "ratings: a value"),
        (
            "rank",
            THREE,
            {"ranks": [1, 2, 3], "flags": [["x"], [], []]},
            "flags: a value",
        ),
        ("compare", THREE, {"ranks": [1, 0, 1]}, "ranks: a value is missing"),
        ("demonstrate", {"prompt": "p"}, {"text": " "}, "no text yet"),
        ("demonstrate", {"prompt": "p"}, {"text": "x" * 100_001}, "more than 100000"),
        ("demonstrate", {"both_sides": True}, {"messages": []}, "2 to 100 turns"),
        (
            "demonstrate",
            {"both_sides": True},
            {"messages": [{"role": "assistant", "content": "a"}] * 2},
            "turn 1 must be the user's",
        ),
        ("edit", EDIT, {"text": "old"}, "nothing was changed"),
        ("feedback", STREAM, {"feedback": []}, "at least once"),
        ("feedback", STREAM, {"feedback": [[62.0, 1]]}, "from 0 to 61 seconds"),
        ("feedback", STREAM, {"feedback": [[0.5, 2]]}, r"\+1 or -1"),
        ("feedback", STREAM, {"feedback": [[float("nan"), 1]]}, "pairs of seconds"),
    ],
)
def test_what_is_no_label(task, content, given, message):
    order = list(range(len(content.get("responses", ()))))
    with pytest.raises(tasks.Invalid, match=message):
        tasks.stored(task, content, order, given)


def test_reasons_and_seconds():
    assert tasks.reason({"reason": "other", "note": " x "}) == {
        "reason": "other",
        "note": "x",
    }
    for given in (None, {}, {"reason": "lazy"}, {"reason": "other", "note": 3}):
        with pytest.raises(tasks.Invalid):
            tasks.reason(given)
    assert tasks.seconds(3) == 3.0
    assert tasks.seconds(1e9) == 24 * 3600
    for given in (-1, "3", None, float("inf")):
        with pytest.raises(tasks.Invalid):
            tasks.seconds(given)
