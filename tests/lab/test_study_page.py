"""The page of a study: its numbers, its figures, and texts that try to break it."""

import csv
import io
import re
import urllib.parse

import numpy as np
import pytest

from rlhfjax.lab import Figure, Outcome, Shape, drawings, page, results
from rlhfjax.lab.found import Found
from rlhfjax.lab.results import Planned
from tests.lab.made_up import compared, greater, study
from tests.report.test_hostile import HOSTILE, SAFE, Structure


def found_of(texts):
    """A finished study all of whose texts are given."""
    claim, paper, figure, one, two, value, metric, option, command, *rest = texts
    comparison = {"condition": one, "baseline": two, "value": value}
    card = study(
        greater(name=rest[0], **comparison),
        requires=(compared("less", name=rest[1], **comparison),),
        claim=claim,
        paper=paper,
        figure=figure,
        conditions={one: {option: one}, two: {option: two}},
        seeds=2,
        values={value: metric},
        curves=(metric,),
        cost=rest[2],
        drawing=Figure(
            x="step",
            y=metric,
            title=rest[3],
            x_label=one,
            paper=Shape(lines={one: ((0, 1), (1, 2))}, x=two, y=metric, source=claim),
        ),
    )
    planned, rows = [], {}
    for i, condition in enumerate((one, two)):
        for seed in (0, 1):
            name = f"{condition} {seed}"
            plan = Planned(
                name, condition, {option: condition}, {option: seed}, name, {}
            )
            planned.append(plan)
            rows[name] = {
                "hash": name,
                "condition": condition,
                "overrides": dict(plan.overrides),
                "seeds": dict(plan.seeds),
                "metrics": {
                    metric: i + 0.1 * seed**2,
                    "collect/ten_words_accuracy": 0.7,
                },
                "curves": {
                    metric: {"step": [1.0, 2.0], "value": [0.0, float(i + seed)]}
                },
                "seconds": 61.0,
                "stages": {},
                "dtype": [command],
                "rule": "another",
                "command": command,
                "commit": metric,
                "clean": True,
                "date": "2020",
                "versions": {metric: command},
            }
    repeat = results.Repeat(one, False, metric)
    return Found(card, planned, rows, [repeat], here={planned[0].hash: command})


def rendered(texts) -> Structure:
    found = found_of(texts)
    return Structure(page.render(found, found.verdict()))


def test_a_study_page_has_the_elements_of_a_harmless_one(recwarn):
    safe = rendered(SAFE)
    for texts in (HOSTILE, HOSTILE[::-1], [*HOSTILE[5:], *HOSTILE[:5]]):
        hostile = rendered(texts)
        assert hostile.elements == safe.elements
        assert HOSTILE[4] in hostile.text
    assert not recwarn.list


def test_the_page_has_the_numbers():
    found = found_of(SAFE)
    text = Structure(page.render(found, found.verdict())).text
    words = " ".join(text.split())
    assert "4 of 4 runs have results" in words
    # name3 - name4: 0 - 1 for both seeds.
    assert "the seeds do not vary it: every difference is -1" in words
    row = r"name9\s*primary, paired t\s*name5 of name3 > name5 of name4\s*2\s*-1"
    assert re.search(row, words)
    assert re.search(r"collect/ten_words_accuracy\s*70.0 %\s*70.0 %\s*too high", words)
    assert "another rule" in words and "bit for bit" not in words
    assert "Run twice: name3 (differs in name6)" in words


def outcome(condition, seed, gold, kl=(0.0, 1.0, 4.0)):
    steps = [1.0, 2.0, 4.0]
    return Outcome(
        condition=condition,
        seeds={"seed": seed},
        metrics={"x": gold[-1]},
        curves={"gold": (steps, list(gold)), "kl": (steps[:], list(kl))},
    )


FOUND = [
    outcome("a", 0, (0.0, 1.0, 0.5)),
    outcome("a", 1, (0.2, 1.4, 0.7)),
    outcome("b", 0, (0.0, 0.5, 1.0), kl=(0.0, 2.0, 6.0)),
]


def table(drawn) -> list[dict]:
    text = urllib.parse.unquote(drawn.csv_link.partition(",")[2])
    return list(csv.DictReader(io.StringIO(text)))


def test_the_mean_over_runs_says_that_a_gold_reward_is_too_easy():
    """The greatest of several runs is above 55 % by chance."""
    rows = [
        {"metrics": {"collect/length_accuracy": x, "ppo/val_gold": 0.9}}
        for x in (0.5, 0.58, 0.54, None)
    ]
    (found,) = page.gold_baselines(rows)
    assert found == {
        "name": "collect/length_accuracy",
        "mean": "54.0 %",
        "greatest": "58.0 %",
        "high": False,
    }
    rows[0]["metrics"]["collect/length_accuracy"] = 0.56
    assert page.gold_baselines(rows)[0]["high"]


def test_the_curves_of_the_figure():
    """Seeds 0 and 1 of a: mean (0.1, 1.2, 0.6); sd sqrt(0.02) at first, half 12.706 sd / sqrt 2."""
    card = study(
        curves=("kl", "gold"),
        drawing=Figure(x="kl", y="gold", title="Gold", x_scale="sqrt"),
    )
    drawn = drawings.figure(card, FOUND)
    assert drawn is not None and "<svg" in drawn.markup and drawn.file == "Gold"
    rows = table(drawn)
    means = [row for row in rows if (row["line"], row["seeds"]) == ("a", "mean")]
    assert [float(row["y"]) for row in means] == pytest.approx([0.1, 1.2, 0.6])
    assert [float(row["x"]) for row in means] == pytest.approx([0, 1, 4])
    assert float(means[0]["half"]) == pytest.approx(12.706 * 0.1, rel=1e-3)
    seed = [row for row in rows if (row["line"], row["seeds"]) == ("b", "seed=0")]
    assert [(float(row["x"]), float(row["y"])) for row in seed] == [
        (0, 0),
        (2, 0.5),
        (6, 1),
    ]
    assert {row["line"] for row in rows} == {"a", "b"}


def test_a_curve_beside_the_conditions():
    """One line over the runs of all conditions, whose mean is that of their seed."""
    beside = {"frontier": ("gold", "kl")}
    drawing = Figure(x="kl", y="gold", title="t", conditions=("b",), beside=beside)
    rows = table(drawings.figure(study(curves=("kl", "gold"), drawing=drawing), FOUND))
    assert {row["line"] for row in rows} == {"b", "frontier"}
    one = [row for row in rows if (row["line"], row["seeds"]) == ("frontier", "seed=0")]
    runs = [run for run in FOUND if run.seed == "seed=0"]
    assert len({run.condition for run in runs}) == len(runs) > 1
    points = np.array([(float(row["x"]), float(row["y"])) for row in one])
    gold, kl = (
        np.mean([run.curve(name) for run in runs], 0) for name in ("gold", "kl")
    )
    np.testing.assert_allclose(points, np.stack([gold, kl], axis=1), rtol=1e-5)


def test_points_that_are_not_finite_or_without_partner_are_left_out():
    card = study(curves=("kl", "gold"), drawing=Figure(x="kl", y="gold", title="t"))
    run = outcome("a", 0, (0.0, np.nan, 0.5))
    run.curves["kl"][0].pop()
    run.curves["kl"][1].pop()
    rows = table(drawings.figure(card, [run]))
    assert [(row["seeds"], row["x"], row["y"]) for row in rows] == [
        ("seed=0", "0", "0"),
        ("mean", "0", "0"),
    ]


def test_a_value_over_sizes():
    """A line per method over the sizes of its conditions, as InstructGPT's figure 1."""
    lines = {"ppo": {"b": 2.0, "a": 1.0}}
    drawing = Figure(y="x", title="t", lines=lines, x_scale="log")
    drawn = drawings.figure(study(drawing=drawing), FOUND)
    assert "mathdefault" not in drawn.markup  # the axis would show its formulas as text
    rows = table(drawn)
    means = [(row["x"], row["y"]) for row in rows if row["seeds"] == "mean"]
    assert means == [("1", "0.6"), ("2", "1")]
    side = table(drawings.figure(study(drawing=Figure(y="x", title="t")), FOUND))
    means = [(row["x"], row["y"]) for row in side if row["seeds"] == "mean"]
    assert means == [("0", "0.6"), ("1", "1")]


def test_without_runs_or_a_drawing_there_is_no_figure():
    card = study(curves=("gold",), drawing=Figure(x="step", y="gold", title="t"))
    assert drawings.figure(card, []) is None and drawings.figure(study(), FOUND) is None
    assert drawings.paper(card) is None
    found = Found(card, [], {})
    text = page.render(found, found.verdict())
    assert "There is nothing to draw." in text and "a has 0 of 5 seeds" in text


def test_the_paper_s_shape_is_gray():
    shape = Shape(lines={"PPO": ((0, 1), (2, 3)), "SFT": ((0, 1),)}, x="KL", y="gold")
    card = study(drawing=Figure(y="x", title="t", paper=shape))
    drawn = drawings.paper(card)
    assert drawn is not None
    assert [(row["line"], row["x"], row["y"]) for row in table(drawn)] == [
        ("PPO", "0", "1"),
        ("PPO", "2", "3"),
        ("SFT", "0", "1"),
    ]
    colors = set(re.findall(r"var\(--(\w+)\)", drawn.markup))
    assert "muted" in colors and not {"first", "second"} & colors
