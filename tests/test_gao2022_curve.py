"""Gao et al.'s two forms, fitted: coefficients that are known come back, from numbers and from a
workdir.
"""

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

CURVE = runpy.run_path(
    str(Path(__file__).parents[1] / "experiments" / "gao2022" / "curve.py")
)
D = np.linspace(0.5, 6.0, 12)


def test_best_of_n_coefficients_come_back():
    alpha, beta, r2 = CURVE["fit"](D, D * (0.6 - 0.1 * D), "best_of_n")
    assert (alpha, beta, r2) == pytest.approx((0.6, 0.1, 1.0), abs=1e-9)
    assert CURVE["peak"](alpha, beta, "best_of_n") == pytest.approx(
        3.0
    )  # the derivative 0.6 - 0.2 d is 0


def test_rl_coefficients_come_back():
    alpha, beta, r2 = CURVE["fit"](D, D * (0.34 - 0.17 * np.log(D)), "ppo")
    assert (alpha, beta, r2) == pytest.approx((0.34, 0.17, 1.0), abs=1e-9)
    # alpha - beta log d - beta is 0 where log d = alpha / beta - 1 = 1
    assert CURVE["peak"](alpha, beta, "ppo") == pytest.approx(math.e)


def test_what_only_rises_has_no_peak():
    assert CURVE["peak"](0.5, -0.01, "best_of_n") == math.inf


def test_points_are_those_of_the_stage(tmp_path):
    rows = [
        {"stage": "ppo", "step": 1, "ppo/kl": 0.1},
        {
            "stage": "ppo",
            "step": 3,
            "ppo/val_kl": 4.0,
            "ppo/val_proxy": 1.5,
            "ppo/val_gold": 0.5,
        },
        {
            "stage": "ppo",
            "step": 6,
            "ppo/val_kl": -1e-9,
            "ppo/val_proxy": 0.0,
            "ppo/val_gold": 0.0,
        },
        {
            "stage": "best_of_n",
            "step": 1,
            "best_of_n/kl": 0.0,
            "best_of_n/proxy": 0.1,
            "best_of_n/gold": 0.2,
        },
        {
            "stage": "evaluate",
            "step": 0,
            "evaluate/gold_baseline": 0.25,
            "evaluate/proxy_baseline": -0.5,
        },
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    assert CURVE["points"](tmp_path, "ppo") == [
        {"d": 2.0, "proxy": 1.5, "gold": 0.5},
        {"d": 0.0, "proxy": 0.0, "gold": 0.0},  # an estimate of KL may be below 0
    ]
    assert CURVE["points"](tmp_path, "best_of_n") == [
        {"d": 0.0, "proxy": 0.1, "gold": 0.2}
    ]
    assert CURVE["start"](tmp_path) == {"d": 0.0, "proxy": -0.5, "gold": 0.25}
