"""Verdicts on recorded values: what must be found, what must not, and what is missing."""

import math

import numpy as np
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.lab import Across, Outcome, fall_from, fall_from_peak
from rlhfjax.lab.verdict import judge
from tests.lab.made_up import compared, greater, outcomes, study

HIGH = [0.61, 0.48, 0.55, 0.70, 0.52]
LOW = [0.42, 0.40, 0.41, 0.52, 0.47]
ALIKE = [0.43, 0.39, 0.42, 0.51, 0.48]


def verdict(card, **values):
    values = {"a": HIGH, "b": LOW, "c": ALIKE} | values
    return judge(card, outcomes(values))


def test_an_effect_is_found():
    found = verdict(study())
    assert found.name == "reproduced"
    assert found.reason == "The primary comparison holds."
    (result,) = found.primary
    assert result.state == "holds" and result.estimate.n == 5
    assert result.differences["seed=0"] == pytest.approx(0.19)
    low, high = result.interval
    assert 0 < low < 0.128 < high and result.detectable == pytest.approx(
        (high - low) / 2
    )


def test_an_effect_the_other_way_contradicts():
    found = verdict(study(), a=LOW, b=HIGH)
    assert found.name == "contradicted" and "greater" in found.reason
    assert found.primary[0].state == "against"


def test_pairs_find_what_unpaired_seeds_do_not():
    """The seeds differ more than the conditions: paired differences are 0.05 ± 0.01."""
    base = [0.1, 0.9, 0.3, 0.7, 0.5]
    above = [x + d for x, d in zip(base, (0.05, 0.06, 0.04, 0.05, 0.06), strict=True)]
    assert verdict(study(), a=above, b=base).name == "reproduced"
    others = [
        Outcome(condition="b", seeds={"seed": 10 + i}, metrics={"x": x})
        for i, x in enumerate(base)
    ]
    rest = outcomes({"a": above, "c": ALIKE})
    found = judge(study(), [*rest, *others])
    assert found.primary[0].estimate.method == "Welch's t"
    assert found.name == "inconclusive" and "contains 0" in found.reason


def test_a_difference_below_the_margin_does_not_count():
    assert verdict(study(greater(margin=0.02))).name == "reproduced"
    found = verdict(study(greater(margin=0.1)))
    assert found.name == "inconclusive" and "margin of 0.1" in found.reason


def test_a_null_claim_needs_its_margin():
    """c - b is 0.002 ± 0.01: within ± 0.05, not within ± 0.005. a - b is beyond 0.03."""
    equal = compared("equal", condition="c", margin=0.05)
    assert verdict(study(equal)).name == "reproduced"
    narrow = compared("equal", condition="c", margin=0.005)
    assert verdict(study(narrow)).name == "inconclusive"
    beyond = compared("equal", condition="a", margin=0.03)
    assert verdict(study(beyond)).name == "contradicted"


def test_a_requirement_that_does_not_hold():
    needs = greater(name="needed", condition="c", baseline=0.5)
    found = verdict(study(requires=(needs,)))
    assert found.name == "inconclusive"
    assert "Without these the claim cannot be tested: needed" in found.reason
    # Also where the claim would be contradicted.
    assert verdict(study(requires=(needs,)), a=LOW, b=HIGH).name == "inconclusive"
    needs = greater(name="needed", condition="c", baseline=0.3)
    found = verdict(study(requires=(needs,)))
    assert found.name == "reproduced" and "so do the requirements" in found.reason


def test_one_primary_comparison_that_is_against_contradicts():
    both = greater(), greater(name="other", condition="b", baseline="a")
    found = verdict(study(*both))
    assert found.name == "contradicted" and found.reason.endswith("other.")


def test_holm_makes_three_comparisons_stricter_than_one():
    """p = 0.028 alone; among three comparisons, of which the others find nothing, 0.083."""
    weak = [0.51, 0.41, 0.47, 0.55, 0.57]
    alone = verdict(study(), a=weak, b=LOW)
    assert alone.name == "reproduced" and 0.017 < alone.primary[0].p < 0.05
    names = [greater(name=str(i), condition="c") for i in range(2)]
    found = verdict(study(greater(), *names), a=weak, b=LOW)
    assert found.primary[0].adjusted == pytest.approx(3 * alone.primary[0].p)
    assert found.primary[0].state == "undecided" and found.name == "inconclusive"
    assert found.primary[0].level == pytest.approx(1 - 0.05 / 3)
    low, high = found.primary[0].interval
    assert low < 0 < high


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"a": HIGH[:4]}, "a has 4 of 5 seeds"),
        ({"a": []}, "a has 0 of 5 seeds"),
        ({"a": HIGH[:1]}, "a has 1 of 5 seeds"),
    ],
)
def test_missing_runs_are_said(values, reason):
    found = verdict(study(), **values)
    assert found.name == "inconclusive"
    assert found.reason == f"Runs are missing: {reason}."


def test_values_that_are_missing_or_not_finite_are_said():
    found = judge(study(), outcomes({"a": HIGH, "b": LOW, "c": ALIKE}, name="y"))
    assert found.name == "inconclusive"
    assert "greater (a, seed=0: it has no metric 'x')" in found.reason
    found = verdict(study(), a=[*HIGH[:4], math.nan])
    assert found.primary[0].state == "missing" and "seed=4: x is not finite" in (
        found.reason
    )


def test_seeds_that_change_nothing_are_said():
    found = verdict(study(), a=[0.6] * 5, b=[0.5] * 5)
    assert found.name == "inconclusive"
    assert "the seeds do not vary it: every difference is 0.1" in found.reason


def test_a_function_of_the_card_that_fails_is_one_line():
    card = study(values={"x": lambda run: run.metrics["nothing"]})
    with pytest.raises(ConfigError, match="study: value 'x': KeyError: 'nothing'"):
        verdict(card)
    card = study(values={"x": lambda run: 2 * run.metric("x")})
    mean = verdict(card).primary[0].estimate.mean
    assert mean == pytest.approx(2 * np.mean(np.subtract(HIGH, LOW)))


# ------------------------------------------------------------------ noise and humps


def test_in_noise_it_finds_nothing_beyond_the_nominal_rate():
    """600 studies of three comparisons without an effect: one is decided in at most 5 % of them.

    Two standard deviations of such a count are 10.7.
    """
    rng = np.random.default_rng(0)
    three = [
        greater(),
        greater(name="other", baseline="c"),
        greater(name="third", condition="c", baseline="b"),
    ]
    card = study(*three)
    decided = 0
    for _ in range(600):
        values = {name: rng.normal(size=5).tolist() for name in "abc"}
        found = judge(card, outcomes(values))
        decided += any(result.state != "undecided" for result in found.primary)
    assert 0 < decided <= 600 * 0.05 + 10.7


STEPS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
# Best-of-n by a weak proxy: gold rises and falls, the proxy rises.
HUMP = [0.0, 0.22, 0.4, 0.52, 0.5, 0.43, 0.3, 0.12]
RISE = [0.0, 0.5, 0.9, 1.3, 1.6, 1.9, 2.1, 2.3]


def pools(gold, proxy, noise, seed=0, seeds=5):
    """Curves of several seeds, whose noise is a random walk over n: pools share their responses."""
    rng = np.random.default_rng(seed)
    walks = noise * rng.normal(size=(seeds, 2, len(STEPS))).cumsum(axis=2)
    return [
        Outcome(
            condition="a",
            seeds={"seed": i},
            metrics={},
            curves={
                "gold": (STEPS, [*np.add(gold, walks[i, 0])]),
                "proxy": (STEPS, [*np.add(proxy, walks[i, 1])]),
            },
        )
        for i in range(seeds)
    ]


def hump(fall: Across):
    """The proxy rises over the range where gold falls."""
    values = {
        "fall": fall,
        "rise": lambda run: run.curve("proxy")[-1] - run.curve("proxy")[3],
    }
    falls = compared("less", name="gold falls", value="fall", baseline=0.0)
    rises = greater(name="the proxy rises", value="rise", baseline=0.0)
    return study(
        falls,
        requires=(rises,),
        values=values,
        conditions={"a": {}},
        curves=("gold", "proxy"),
    )


FALLS = [fall_from_peak("gold"), fall_from("gold", 8)]


@pytest.mark.parametrize("fall", FALLS, ids=["peak", "step"])
def test_a_hump_is_found(fall):
    found = judge(hump(fall), pools(HUMP, RISE, noise=0.04))
    assert found.name == "reproduced"
    assert found.primary[0].estimate.mean == pytest.approx(-0.4, abs=0.1)


@pytest.mark.parametrize("fall", FALLS, ids=["peak", "step"])
def test_a_curve_that_only_rises_has_no_hump(fall):
    assert judge(hump(fall), pools(RISE, RISE, 0.04)).name != "reproduced"


@pytest.mark.parametrize(("fall", "most"), zip(FALLS, (30, 22), strict=True))
def test_noise_has_a_hump_no_more_often_than_nominal(fall, most):
    """600 studies of flat gold curves.

    Of a fixed step 2.5 % fall significantly, or 15 ± 3.8; at a peak that others choose at most 5 %.
    """
    card, flat = hump(fall), [0.0] * len(STEPS)
    found = [judge(card, pools(flat, RISE, 0.1, seed)).name for seed in range(600)]
    assert 0 < found.count("reproduced") <= most


def test_a_run_s_own_maximum_would_find_humps_in_noise():
    """What `fall_from_peak` is for: a maximum is above its own curve's end in noise, too."""

    def own(run):
        return run.curve("gold")[-1] - max(run.curve("gold"))

    card, flat = hump(own), [0.0] * len(STEPS)  # pyright: ignore[reportArgumentType]
    found = [judge(card, pools(flat, RISE, 0.1, seed)).name for seed in range(100)]
    assert found.count("reproduced") > 15


def test_the_peak_of_a_seed_is_chosen_by_the_others():
    """Others peak at the second point; the seed's own maximum at the first does not count."""
    value = fall_from_peak("g").function
    runs = [
        Outcome(
            condition="a",
            seeds={"s": i},
            metrics={},
            curves={"g": ([1.0, 2.0, 3.0], y)},
        )
        for i, y in enumerate(([9.0, 5.0, 1.0], [0.0, 4.0, 1.0], [2.0, 3.0, 0.0]))
    ]
    assert value(runs[0], runs[1:]) == 1.0 - 5.0
    assert value(runs[1], [runs[0], runs[2]]) == 1.0 - 0.0
