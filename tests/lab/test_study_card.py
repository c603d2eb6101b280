"""Cards that cannot be meant, and what a rule is."""

import pytest

from rlhfjax import experiment
from rlhfjax.errors import ConfigError
from rlhfjax.lab import Figure, Shape, Study, card, results
from tests.lab import made_up
from tests.lab.made_up import compared, greater, study

LINE = {"paper": ((0, 1), (2.5, 3))}


def drawing(**changes):
    return Figure(**{"y": "x", "title": "t"} | changes)


BAD = {
    "primary: expected a comparison": lambda: study(primary=()),
    "4 comparisons, at most 3": lambda: study(*[greater(name=c) for c in "wxyz"]),
    "two comparisons are called 'greater'": lambda: study(greater(), greater()),
    "condition 'nobody' is unknown; known: a, b, c": lambda: study(
        greater(baseline="nobody")
    ),
    "value 'z' is unknown; known: x, y": lambda: study(greater(value="z")),
    "margin=0: must be > 0": lambda: compared("equal"),
    "margin=-1: must be >= 0": lambda: greater(margin=-1),
    "margin=nan: must be >= 0": lambda: greater(margin=float("nan")),
    "expected='more': must be": lambda: compared("more"),
    "the baseline is the condition itself": lambda: greater(baseline="a"),
    "baseline=inf: expected a number": lambda: study(greater(baseline=float("inf"))),
    "seeds=1: must be >= 2": lambda: study(seeds=1),
    "seeds=True: must be >= 2": lambda: study(seeds=True),
    "claim='': expected a text": lambda: study(claim=""),
    "conditions: expected": lambda: study(conditions={}),
    "condition 'a': expected a dict": lambda: study(conditions={"a": 3}),
    "values: x=3: expected a metric's name": lambda: study(values={"x": 3}),
    "y: value 'z' is unknown": lambda: study(drawing=drawing(y="z")),
    "curve 'kl' is unknown; known: none": lambda: study(drawing=drawing(x="kl")),
    "curve 'x' is unknown; known: kl": lambda: study(
        drawing=drawing(x="step"), curves=("kl",)
    ),
    "drawing: condition 'd' is unknown": lambda: study(
        drawing=drawing(lines={"l": {"d": 1}})
    ),
    "x_scale='cubic'": lambda: drawing(x_scale="cubic"),
    "beside goes with x": lambda: drawing(beside={"l": ("a", "b")}),
    "curve 'kl' is unknown; known: gold": lambda: study(
        drawing=drawing(x="step", y="gold", beside={"l": ("step", "kl")}),
        curves=("gold",),
    ),
    "lines go with a value": lambda: drawing(x="step", lines={"l": {"a": 1.0}}),
    "expected points (x, y)": lambda: Shape(lines={"l": ((1, 2, 3),)}),
    "expected finite numbers": lambda: Shape(lines={"l": ((1, float("nan")),)}),
    "expected lines of points": lambda: Shape(lines={}),
}


# The type checks of tests would find some of these mistakes before the card does.
@pytest.mark.parametrize("said", BAD)
def test_a_card_that_cannot_be_meant(said):
    with pytest.raises(Exception) as caught:
        BAD[said]()
    if isinstance(caught.value, ConfigError):
        message = str(caught.value)
        assert said in message and message.startswith("study: ")
        assert "\n" not in message
    else:
        assert "Type-check error" in str(caught.value) and said in TYPED


TYPED = {
    "expected='more': must be",
    "seeds=True: must be >= 2",
    "condition 'a': expected a dict",
    "values: x=3: expected a metric's name",
    "x_scale='cubic'",
    "expected points (x, y)",
}


def test_a_card_says_what_it_expects():
    assert greater().statement == "x of a > x of b"
    assert greater(baseline=0.5, margin=0.1).statement == (
        "x of a > 0.5, by more than 0.1"
    )
    assert compared("equal", margin=2).statement == "x of a = x of b, within ±2"
    shape = Shape(lines=LINE)
    card = study(drawing=drawing(lines={"l": {"a": 1, "b": 2.5}}, paper=shape))
    assert isinstance(card, Study) and card.comparisons == (greater(),)


def test_a_file_without_a_study_and_with_something_else(tmp_path):
    file = made_up.write(tmp_path)
    loaded = experiment.load(file)
    found = card.of(loaded)
    assert found is not None and found.claim == "A larger rate is better"
    assert card.of(loaded._replace(names={})) is None
    with pytest.raises(ConfigError, match=r"study.py: STUDY=3: expected rlhfjax.lab"):
        card.of(loaded._replace(names={"STUDY": 3}))


def test_whatever_decides_the_verdict_changes_the_rule():
    def one(run):
        return run.metric("x")

    def two(run):
        return 2 * run.metric("x")

    card = study()
    assert results.rule_digest(card) == results.rule_digest(study(claim="b", cost="1"))
    others = [
        study(greater(margin=0.1)),
        study(compared("less")),
        study(seeds=6),
        study(requires=(greater(name="r"),)),
        study(values={"x": "other", "y": "y"}),
        study(values={"x": one, "y": "y"}),
        study(values={"x": two, "y": "y"}),
    ]
    digests = {results.rule_digest(x) for x in [card, *others]}
    assert len(digests) == 8
