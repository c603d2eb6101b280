"""The iterated recipe: what each round starts from and learns from, and its curve."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "experiments" / "iterated"


def module(name):
    spec = importlib.util.spec_from_file_location(
        f"iterated_{name}", FOLDER / f"{name}.py"
    )
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def config():
    return to_dict(module("recipe").get_config("rounds=3,size=toy"))


def test_every_round_starts_from_the_last_and_learns_from_all(config, tmp_path):
    folders = recipe.stage_folders(config, tmp_path)
    resolved = {
        name: recipe.resolve(config[name], folders, name) for name in config["stages"]
    }
    typed = recipe.check_all(resolved, folders)
    at = {name: str(folder) for name, folder in folders.items()}
    for k in (1, 2, 3):
        last = at["sft"] if k == 1 else at[f"ppo_{k - 1}"]
        assert typed[f"collect_{k}"].init_from == typed[f"ppo_{k}"].init_from == last
        assert (
            typed[f"ppo_{k}"].reference == typed[f"reward_{k}"].init_from == at["sft"]
        )
        assert typed[f"reward_{k}"].preferences == tuple(
            f"{at[f'collect_{i}']}/preferences" for i in range(1, k + 1)
        )
        assert (
            typed[f"ppo_{k}"].reward
            == typed[f"evaluate_{k}"].proxy
            == at[f"reward_{k}"]
        )
        assert typed[f"evaluate_{k}"].policy == at[f"ppo_{k}"]
        assert typed[f"evaluate_{k}"].baseline == at["sft"]
    assert len({typed[f"collect_{k}"].seed for k in (1, 2, 3)}) == 3
    assert (
        len({typed[f"evaluate_{k}"].seed for k in (1, 2, 3)}) == 1
    )  # the same prompts and draws every round


def test_one_round_is_the_quickstart_but_for_names_and_seeds():
    made = module("recipe")
    quickstart = runpy.run_path(str(FOLDER.parent / "quickstart" / "recipe.py"))[
        "get_config"
    ]
    one, base = (
        to_dict(made.get_config("rounds=1,size=smoke")),
        to_dict(quickstart("size=smoke")),
    )
    for stage in made.ROUND:
        now, then = one[f"{stage}_1"], base[stage]
        differ = {key for key in now if now[key] != then[key]}
        assert differ <= {
            "seed",
            "init_from",
            "preferences",
            "reference",
            "reward",
            "policy",
            "proxy",
            *("labeler", "gold"),  # those that its results were measured with
        }, stage
    assert {name: one[name] for name in made.START} == {
        name: base[name] for name in made.START
    }


def test_no_round_is_refused():
    with pytest.raises(ConfigError, match="rounds=0"):
        module("recipe").get_config("rounds=0")


def test_the_curve_has_a_row_a_round_and_sft_first(tmp_path):
    lines = []
    for k in (1, 2):
        lines.append({"stage": f"reward_{k}", "reward/val_accuracy": 0.5, "step": 0})
        lines.append(
            {"stage": f"reward_{k}", "reward/val_accuracy": 0.6 + k / 100, "step": 8}
        )
        values = {"gold_win_rate": 0.5 + k / 10, "kl": float(k)}
        values |= {"gold_win_rate_wilson_low": 0.4, "gold_win_rate_wilson_high": 0.9}
        values |= {"gold_policy": k / 10, "gold_baseline": 0.05, "proxy_policy": k / 5}
        lines.append(
            {"stage": f"evaluate_{k}"}
            | {f"evaluate/{name}": value for name, value in values.items()}
        )
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    rows = module("curve").rounds(tmp_path)
    assert [row["gold"] for row in rows] == [0.05, 0.1, 0.2]
    assert [row["gold_win_rate"] for row in rows] == [0.5, 0.6, 0.7]
    assert rows[2]["reward_val_accuracy"] == 0.62
    assert rows[2]["kl"] == 2.0
    assert (rows[2]["wilson_95_low"], rows[2]["wilson_95_high"]) == (0.4, 0.9)
