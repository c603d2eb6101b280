"""Every paper-scale config fits where experiments/README.md says: by arithmetic, and by the TPU compiler.

`pytest -m plan_scale` compiles what trains of every row for its topology, which takes most of a device (the plan extra;
a step of .ci/run), `pytest -m plan_rest` the other programs of the policy stages: rollouts, the longest to compile.
"""

import importlib.util
import json
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhfjax import main
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import AXES
from rlhfjax.plan import estimate, search, shapes
from rlhfjax.plan.chips import CHIPS, GIB
from tests.test_experiments import ROOT, experiment_files

# Nothing to plan: stages that do not train, and toys.
UNPLANNED = {
    *("expert_iteration/recipe.py", "gao2022/best_of_n.py", "gao2022/collect.py", "iterated/recipe.py"),
    *("quickstart/recipe.py", "quickstart/stages.py", "smollm2/recipe.py"),
}


class Row(NamedTuple):
    config: str
    topology: str
    gib: str
    flags: dict[str, str]


def rows() -> list[Row]:
    """The table of experiments/README.md."""
    found = []
    for line in (ROOT / "experiments" / "README.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0].startswith("experiments/"):
            flags = dict(flag.removeprefix("--").split("=", 1) for flag in cells[3].split())
            found.append(Row(cells[0], cells[1], cells[2], flags))
    return found


ROWS = rows()
NAMES = [row.config.removeprefix("experiments/") for row in ROWS]


def planned(row: Row) -> tuple[shapes.Subject, int]:
    """The stage as the row has it, its mesh included; completions."""
    path, _, arg = row.config.partition(":")
    config = runpy.run_path(str(ROOT / path))["get_config"](arg or None)
    for name, value in row.flags.items():
        if mesh_axis := re.fullmatch(r"config\.mesh\.(\w+)", name):
            config.mesh[mesh_axis[1]] = int(value)
    subject = shapes.subject(config, model=row.flags.get("model", ""), reward_model=row.flags.get("reward_model", ""))
    return subject, int(row.flags.get("completions", 2))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_paper_scale_config_fits_by_arithmetic(row):
    """Its mesh has the topology's devices, divides batch, models and vocabulary; a fifth of a device is left."""
    subject, completions = planned(row)
    chip = CHIPS[row.topology.partition(":")[0]]
    chips = 1
    for n in row.topology.partition(":")[2].split("x"):
        chips *= int(n)
    assert row.topology.partition(":")[2] in search.SLICES[chip.name]
    mesh = search.mesh_for(subject, chips * chip.devices)
    assert mesh is not None, f"{row.config}: its mesh does not divide {chips} chips, its batch or its models"
    assert mesh.rules == subject.config.mesh.rules, f"{row.config}: the vocabulary is not divided by mesh.tensor"
    axes = {axis: getattr(mesh, axis) for axis in AXES}
    need, room = estimate.estimate(subject, axes, chip, completions).bytes / GIB, chip.hbm / chip.devices / GIB
    assert need <= 0.8 * room, f"{row.config} on {row.topology}: {need:.1f} GiB of {room:.0f}"
    assert row.gib == f"{need:.1f} / {room:.0f}"


def test_every_config_of_a_paper_has_its_place():
    listed = {name.partition(":")[0] for name in NAMES}
    files = {f"{path.parent.name}/{path.name}" for path in experiment_files()}
    assert listed | UNPLANNED == files and not listed & UNPLANNED
    sizes = {"1.3b", "6.7b", "175b"}
    for file in ("ppo", "sft"):
        assert {name.partition("size=")[2] for name in NAMES if name.startswith(f"instructgpt/{file}.py")} == sizes


def test_a_config_that_does_not_fit_is_named():
    """The same row on a quarter of the chips: the failure says which config, and by how much."""
    row = next(row for row in ROWS if "instructgpt/ppo.py:size=6.7b" in row.config)
    smaller = row._replace(topology="v5p:2x2x1", flags=row.flags | {"config.mesh.fsdp": "4"})
    with pytest.raises(AssertionError, match=r"instructgpt/ppo\.py:size=6\.7b on v5p:2x2x1: \d+\.\d GiB of 95"):
        test_a_paper_scale_config_fits_by_arithmetic(smaller)


NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the plan extra"
)
TRAINS = {"ppo": "update", "group": "update"}  # the program of a stage that trains; of the others "step"
REST = ("rollout", "know", "score", "prepare")


def check_it_fits(row: Row, names: tuple[str, ...], out: Path) -> None:
    """`rlhfjax plan` of a row as a user gives it; fails with the config's name."""
    flags = [f"--{name}={value}" for name, value in row.flags.items()]
    where = [f"--config={ROOT / row.config}", f"--topology={row.topology}", f"--json={out}"]
    try:
        main.main(["rlhfjax", "plan", *where, *flags, f"--programs={','.join(names)}"])
    except (ConfigError, SystemExit) as e:
        pytest.fail(f"{row.config} on {row.topology} cannot be planned: {e}")
    plan = json.loads(out.read_text())
    assert [program["name"] for program in plan["programs"]] == list(names)
    assert plan["fits"], f"{row.config} does not fit {row.topology}: {plan['advice']}"


@NEEDS_LIBTPU
@pytest.mark.plan_scale
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_paper_scale_config_trains_where_it_says(row, tmp_path):
    check_it_fits(row, (TRAINS.get(planned(row)[0].config.stage, "step"),), tmp_path / "plan.json")


@NEEDS_LIBTPU
@pytest.mark.nightly
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_paper_scale_config_samples_where_it_says(row, tmp_path):
    subject, _ = planned(row)
    if subject.config.stage not in TRAINS:
        pytest.skip("it does not sample")
    check_it_fits(
        row, tuple(name for name in REST if name != "score" or subject.reward is not None), tmp_path / "plan.json"
    )
