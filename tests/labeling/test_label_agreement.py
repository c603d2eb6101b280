"""Agreement of labelers with each other and with known rankings, by hand."""

import pytest

from rlhfjax.labeling import agreement
from rlhfjax.labeling.store import Label


def given(
    who, item, ranks, kind="work", known=None, action="submit", task="rank", seconds=4.0
):
    return Label(
        id=0,
        at=0.0,
        who=who,
        action=action,
        seconds=seconds,
        value={"ranks": ranks},
        shown={"order": []},
        item=item,
        kind=kind,
        task=task,
        content={},
        known=None if known is None else {"ranks": known},
    )


def test_opinions_of_every_pair():
    assert agreement.opinions_of(given("a", "x", [1, 2, 2])) == {
        ("x", 0): 1.0,  # 0 above 1
        ("x", 1): 1.0,  # 0 above 2
        ("x", 2): 0.0,  # a tie
    }
    assert agreement.opinions_of(given("a", "x", [1, 2], action="skip")) == {}
    assert agreement.opinions_of(given("a", "x", [1, 2], task="edit")) == {}


def test_agreement_of_two_labelers_by_hand():
    """Item x: a has 1, 1, 0, b has 1, -1, -1: 1 + 0 + 1/2 of 3 pairs. Item y: a alone."""
    labels = [
        given("a", "x", [1, 2, 2]),
        given("b", "x", [2, 3, 1]),
        given("a", "y", [1, 2]),
    ]
    assert agreement.with_others(labels, "a") == (1.5, 3)
    assert agreement.with_others(labels, "b") == (1.5, 3)
    measured = agreement.between(labels)
    assert measured["agreement"] == pytest.approx(0.5)
    assert measured["agreement_untied"] == pytest.approx(0.5)  # 1 of 2
    assert measured["agreement_pairs"] == 3
    # Fleiss: P = mean(1, 0, 0) = 1/3. Shares: 3 of 6 are +1, 2 of 6 -1, 1 of 6 ties; with +1 and -1
    # alike 5/12, 1/6, 5/12: P_e = 54/144.
    expected = (1 / 3 - 54 / 144) / (1 - 54 / 144)
    assert measured["agreement_kappa"] == pytest.approx(expected)


def test_with_known_rankings_a_skip_is_a_disagreement():
    labels = [
        given("a", "x", [1, 2, 3], kind="calibration", known=[1, 2, 3]),
        given("a", "y", [1, 1], kind="calibration", known=[1, 2]),
        given("a", "z", [], kind="calibration", known=[1, 2], action="skip"),
    ]
    assert agreement.with_known(labels) == (3.5, 5)


def test_the_summary_of_a_labeler():
    labels = [
        given("a", "x", [1, 2], seconds=2.0),
        given("a", "y", [1, 2], seconds=10.0),
        given("a", "w", [1, 2], seconds=6.0),
        given("a", "z", [], action="skip"),
        given("b", "x", [2, 1]),
        given("a", "s", [1, 2], kind="screening", known=[1, 2]),
    ]
    own = agreement.summary(labels, "a")
    assert (own["labels"], own["skipped"], own["seconds"]) == (3, 1, 6.0)
    assert own["hours"] == pytest.approx(18 / 3600)
    assert (own["with_others"], own["screening"], own["calibration"]) == (
        0.0,
        1.0,
        None,
    )
    assert own["pairs"] == {"with_others": 1, "calibration": 0, "screening": 1}
    assert agreement.between(labels[:4]) == {}  # one labeler
