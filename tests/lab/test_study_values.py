"""The values that the studies under experiments/ compute from a run, on curves made by hand."""

import functools
import math
import runpy

import numpy as np
import pytest

from rlhfjax.lab.outcomes import Outcome
from tests.doc_commands import ROOT

N = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
KL = [math.log(n) - (n - 1) / n for n in N]


@functools.cache
def study(name):
    return runpy.run_path(str(ROOT / "experiments" / name))


def outcome(metrics=None, **curves):
    series = {
        name.replace("__", "/"): (
            [float(i) for i in range(len(y))],
            list(map(float, y)),
        )
        for name, y in curves.items()
    }
    return Outcome(condition="c", seeds={"s": 0}, metrics=metrics or {}, curves=series)


def best_of_n(gains):
    run = outcome(best_of_n__kl=KL, best_of_n__gold=[0.3 + x for x in gains])
    for name in run.curves:
        run.curves[name][0][:] = N
    return run


def test_coefficients_of_best_of_n_are_those_that_made_the_curve():
    d = np.sqrt(KL)
    run = best_of_n(d * (0.8 - 0.25 * d))
    alpha, beta = study("gao2022/figure1a.py")["fitted"](run)
    assert (alpha, beta) == pytest.approx((0.8, 0.25))


@pytest.mark.parametrize(
    ("curve", "better"),
    [
        (lambda d: d * (0.8 - 0.25 * d), True),
        (lambda d: d * (0.8 - 0.25 * np.log(np.maximum(d, 1e-9))), False),
        (lambda d: d * (0.8 - 0.05 * d * d), False),
    ],
)
def test_the_form_that_made_the_curve_predicts_larger_n_best(curve, better):
    value = study("gao2022/figure1a.py")["better_form"](best_of_n(curve(np.sqrt(KL))))
    assert (value > 0.01) if better else (value < -0.01)


def test_coefficients_of_rl_are_those_that_made_the_curve():
    kl = np.array([-0.01, 0.5, 2.0, 5.0, 9.0, 20.0])  # an estimate may be below 0
    d = np.sqrt(np.maximum(kl, 1e-9))
    run = outcome(ppo__val_kl=kl, ppo__val_gold=d * (0.34 - 0.17 * np.log(d)))
    found = study("gao2022/figure1b.py")["fitted"](run)
    assert found == pytest.approx((0.34, 0.17))


def test_how_far_a_penalized_run_is_off_the_curve_of_gold_over_kl():
    """Without penalty gold is 1 - sqrt(KL); with one it ends 0.1 above that."""
    d = np.array([0.0, 3.0, 1.0, 2.0])  # in the order of training: KL may fall, too
    ends = np.array([4.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    gold = (
        1 - np.sqrt(ends) + np.array([9.0, 0.3, -0.1, 0.1, 0.1, 0.1])
    )  # the last five count
    penalized = {"penalized__val_kl": ends, "penalized__val_gold": gold}
    run = outcome(ppo__val_kl=d**2, ppo__val_gold=1 - d, **penalized)
    off = study("gao2022/figure1b.py")["off_the_curve"]
    assert off(run) == pytest.approx(0.1)
    short = outcome(ppo__val_kl=(d / 2) ** 2, ppo__val_gold=1 - d, **penalized)
    assert math.isnan(off(short))
    assert study("gao2022/figure1b.py")["proxy_gain"](
        outcome(ppo__val_proxy=[0.5, 0.2, 1.5])
    ) == pytest.approx(1.0)


def test_the_loss_where_the_gold_reward_reaches_the_level():
    names = study("instructgpt/ptx.py")
    level = names["LEVEL"]
    gold = [level - 0.3, level - 0.1, level + 0.1, level - 0.2, level + 0.3]
    run = outcome(ppo__val_gold=gold, ppo__val_text_loss=[3.0, 3.2, 3.6, 9.0, 9.0])
    assert names["loss_at_level"](run) == pytest.approx(3.4)  # halfway, the first time
    low = outcome(ppo__val_gold=[0.0, 0.1], ppo__val_text_loss=[3.0, 3.2])
    assert math.isnan(names["loss_at_level"](low))


def test_the_share_of_the_best_gain_at_a_kl():
    """The frontier is 0.1 + 2 sqrt(KL) up to a KL of 4; PPO gains 1.2 of 2 at a KL of 1."""
    share = study("ziegler2019/beta.py")["share_of_best"]
    curves = {
        "pool__kl": [0.0, 0.25, 2.25, 4.0, 5.0],
        "pool__tilt_proxy": [0.1, 1.1, 3.1, 4.1],  # none for the last KL
    }
    run = outcome({"ppo/val_kl": 1.0, "ppo/val_proxy": 1.3}, **curves)
    assert share(run) == pytest.approx(0.6)
    far = outcome({"ppo/val_kl": 4.5, "ppo/val_proxy": 4.0}, **curves)
    assert math.isnan(share(far))


def test_the_diversity_that_is_kept():
    run = outcome(
        {"evaluate/distinct_2_policy": 0.6, "evaluate/distinct_2_baseline": 0.75}
    )
    assert study("smollm2/diversity.py")["kept"](run) == pytest.approx(0.8)
