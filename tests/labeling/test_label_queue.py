"""Which item is next: overlap, priorities, the screening test, calibration, the end."""

import numpy as np
import pytest

from rlhfjax.labeling import queue
from tests.labeling.label_world import compare, label, new_store, rank, skip

BETTER = {"ranks": [1, 2]}


def test_the_highest_priority_is_next_and_an_open_item_stays(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([compare(0, priority=0.1), compare(1, priority=0.9)])
    first = queue.next_item(store, "ann", queue.Rules())
    assert first.content["prompt"] == "prompt 1"
    assert queue.next_item(store, "ann", queue.Rules()) == first  # also after a reload
    label(store, "ann", BETTER)
    assert queue.next_item(store, "ann", queue.Rules()).content["prompt"] == "prompt 0"


def test_an_item_has_as_many_labelers_as_its_overlap(tmp_path):
    store = new_store(tmp_path, *"abc")
    store.add([compare(0, priority=2, overlap=2), compare(1, priority=1, overlap=1)])
    shown = {who: queue.next_item(store, who, queue.Rules()) for who in "abc"}
    prompts = [shown[who].content["prompt"] for who in "abc"]
    assert prompts == [
        "prompt 0",
        "prompt 0",
        "prompt 1",
    ]  # what others have on the screen counts
    assert queue.left(store) == 3
    for who in "abc":
        label(store, who, BETTER)
    assert queue.left(store) == 0
    assert queue.next_item(store, "a", queue.Rules()) == "finished"


def test_a_skipped_item_goes_to_others(tmp_path):
    store = new_store(tmp_path, "ann", "bob")
    store.add([compare()])
    skip(store, "ann")
    assert queue.next_item(store, "ann", queue.Rules()) == "waiting"
    label(store, "bob", BETTER)
    assert queue.next_item(store, "ann", queue.Rules()) == "finished"


def test_an_item_that_nobody_finishes_is_given_to_others_later(tmp_path, monkeypatch):
    store = new_store(tmp_path, "ann", "bob")
    store.add([compare()])
    queue.next_item(store, "ann", queue.Rules())
    assert queue.next_item(store, "bob", queue.Rules()) == "waiting"
    monkeypatch.setattr(queue, "RESERVED_SECONDS", -1.0)
    assert queue.next_item(store, "bob", queue.Rules()).task == "compare"


def test_the_screening_test_comes_first_and_admits_by_agreement(tmp_path):
    """Three pairs are known; at 2 / 3 one mistake is admitted, two are not."""
    store = new_store(tmp_path, "ann", "bob")
    known = {"known": {"ranks": [1, 2]}, "kind": "screening"}
    store.add([compare(9)])
    store.add([compare(i, **known) for i in range(3)])
    rules = queue.Rules(screening_agreement=0.6)
    for value in (BETTER, BETTER, {"ranks": [2, 1]}):
        label(store, "ann", value, rules)
    for value in (BETTER, {"ranks": [1, 1]}, {"ranks": [2, 1]}):  # a tie counts 1/2
        label(store, "bob", value, rules)
    assert queue.next_item(store, "ann", rules).kind == "work"
    assert queue.next_item(store, "bob", rules) == "not_admitted"
    assert store.label_count() == 0  # the test is no work
    assert queue.is_admitted(store, "bob", queue.Rules(screening_agreement=0.5))


def test_a_skipped_test_item_counts_as_wrong(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([compare(9), compare(0, known={"ranks": [1, 2]}, kind="screening")])
    skip(store, "ann")
    assert queue.next_item(store, "ann", queue.Rules()) == "not_admitted"


def test_calibration_items_come_after_so_many_labels(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([compare(i) for i in range(7)])
    known = {"known": {"ranks": [1, 2]}, "kind": "calibration"}
    store.add([compare(100 + i, **known) for i in range(2)])
    rules = queue.Rules(calibration_every=2)
    kinds = []
    for _ in range(9):
        kinds.append(queue.next_item(store, "ann", rules).kind[0])
        label(store, "ann", BETTER, rules)
    assert "".join(kinds) == "wwcwwcwww"


def test_the_collection_ends_with_its_count_but_open_items_may_be_submitted(tmp_path):
    store = new_store(tmp_path, "ann", "bob")
    store.add([compare(i) for i in range(5)])
    rules = queue.Rules(count=1)
    opened = queue.next_item(store, "bob", rules)
    label(store, "ann", BETTER, rules)
    assert queue.is_complete(store, rules)
    assert queue.next_item(store, "ann", rules) == "finished"
    assert queue.next_item(store, "bob", rules) == opened
    assert queue.wanted(store, queue.Rules()) == 5


def test_the_organizer_may_end_it(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([compare()])
    store.finish("organizer")
    assert queue.is_complete(store, queue.Rules())
    assert queue.next_item(store, "ann", queue.Rules()) == "finished"


def test_random_priorities_are_uniform_and_follow_the_seed():
    ids = [str(i) for i in range(4000)]
    first = np.array(queue.priorities(ids, 0))
    assert first.min() >= 0 and first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.02)
    assert queue.priorities(ids, 0) == first.tolist()
    assert queue.priorities(ids, 1) != first.tolist()
    share = [
        one.overlap for one in queue.in_turn([rank(i) for i in range(2000)], 3, 0.25, 0)
    ]
    assert set(share) == {1, 3}
    assert share.count(3) / 2000 == pytest.approx(0.25, abs=0.04)


def test_disagreement_by_hand():
    """Two members: margins of pairs (0,1), (0,2), (1,2) are 1, 3, 2 and -1, 3, 4."""
    rewards = np.array([[3.0, 2.0, 0.0], [2.0, 3.0, -1.0]])
    # standard deviations: 1, 0, 1
    assert queue.disagreement(rewards) == pytest.approx(2 / 3)
    shifted = rewards + np.array([[5.0], [-7.0]])  # a member's constant does not count
    assert queue.disagreement(shifted) == pytest.approx(2 / 3)
    assert queue.disagreement(np.array([[1.0, 0.0], [2.0, 1.0]])) == 0
