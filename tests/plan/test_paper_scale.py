"""Every paper-scale config fits the topology of experiments/README.md: estimated and compiled.

`pytest -m plan_scale` lowers what trains of every row for its topology, which takes most of a
device. It compiles those that are not in scale.txt, the table of programs that were compiled and
fit. `pytest -m nightly tests/plan` compiles the other programs of policy stages: rollouts take
longest. Both need the plan extra.
"""

import re
import sys
import warnings
from collections.abc import Callable

import filelock
import pytest

from rlhfjax.mesh import AXES
from rlhfjax.plan import candidates, estimate, variants
from rlhfjax.plan.chips import CHIPS, GIB
from tests.needs import needs
from tests.plan import scale
from tests.plan.scale import ROOT, ROWS, Row, check_it_fits, planned
from tests.test_experiments import experiment_files

# Nothing to plan: stages that do not train, and toys.
UNPLANNED = {
    *(
        "expert_iteration/recipe.py",
        "gao2022/best_of_n.py",
        "gao2022/collect.py",
        "iterated/recipe.py",
    ),
    *("quickstart/recipe.py", "quickstart/stages.py", "smollm2/recipe.py"),
    "smollm2/diversity.py",
    *("chitchat_ratings/recipe.py", "chinese/recipe.py", "prepare/recipe.py"),
    *("human/recipe.py", "instructgpt/figure1.py", "instructgpt/ptx.py"),
    *("gao2022/figure1a.py", "gao2022/figure1b.py", "ziegler2019/beta.py"),
    "lightman2023/prm.py",
}


NAMES = [row.name for row in ROWS]
REST = ("rollout", "know", "score", "prepare")
NEW = 4  # programs that may be new in CI: each takes up to minutes to compile


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_paper_scale_config_fits_by_arithmetic(row):
    """Its mesh divides batch, models and vocabulary, and a fifth of a device is left."""
    subject, completions = planned(row)
    chip = CHIPS[row.topology.partition(":")[0]]
    chips = 1
    for n in row.topology.partition(":")[2].split("x"):
        chips *= int(n)
    assert row.topology.partition(":")[2] in candidates.SLICES[chip.name]
    mesh = variants.mesh_for(subject, chips * chip.devices)
    assert mesh is not None, (
        f"{row.config}: its mesh does not divide {chips} chips, its batch or its models"
    )
    assert mesh.rules == subject.config.mesh.rules, (
        f"{row.config}: the vocabulary is not divided by mesh.tensor"
    )
    axes = {axis: getattr(mesh, axis) for axis in AXES}
    need, room = (
        estimate.estimate(subject, axes, chip, completions).bytes / GIB,
        chip.hbm / chip.devices / GIB,
    )
    assert need <= 0.8 * room, (
        f"{row.config} on {row.topology}: {need:.1f} GiB of {room:.0f}"
    )
    assert row.gib == f"{need:.1f} / {room:.0f}"


def test_every_config_of_a_paper_has_its_place():
    listed = {name.partition(":")[0] for name in NAMES}
    files = {f"{path.parent.name}/{path.name}" for path in experiment_files()}
    assert listed | UNPLANNED == files and not listed & UNPLANNED
    sizes = {"1.3b", "6.7b", "175b"}
    for file in ("ppo", "sft"):
        assert {
            name.partition("size=")[2]
            for name in NAMES
            if name.startswith(f"instructgpt/{file}.py")
        } == sizes


def test_a_config_that_does_not_fit_is_named():
    """The same row on a quarter of the chips: the failure says which config, and by how much."""
    row = next(row for row in ROWS if "instructgpt/ppo.py:size=6.7b" in row.config)
    smaller = row._replace(
        topology="v5p:2x2x1", flags=row.flags | {"config.mesh.fsdp": "4"}
    )
    with pytest.raises(
        AssertionError,
        match=r"instructgpt/ppo\.py:size=6\.7b on v5p:2x2x1: \d+\.\d GiB of 95",
    ):
        test_a_paper_scale_config_fits_by_arithmetic(smaller)


def test_the_table_is_of_rows_that_there_are_and_of_the_tested_libtpu():
    table = scale.read()
    stale = set(table.digests) - set(NAMES)
    assert not stale, (
        f"{scale.TABLE.name}: experiments/README.md has no {stale}: {scale.COMMAND}"
    )
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in table.digests.values())
    assert (
        f"libtpu=={table.libtpu}"
        in (ROOT / "constraints/py311.txt").read_text().splitlines()
    )


@pytest.fixture(scope="session")
def digest_of(shared) -> Callable[[Row], str]:
    """The digest of a row, which one worker computes for all."""

    def of(row: Row) -> str:
        file = shared / f"digest-{ROWS.index(row)}"
        with filelock.FileLock(f"{file}.lock"):
            if not file.exists():
                file.write_text(scale.digest(row))
            return file.read_text()

    return of


def new_rows(
    table: scale.Table, digest_of: Callable[[Row], str], row: Row
) -> list[Row]:
    """The rows whose program is not that of the table. Workers begin at rows of their own."""
    start = ROWS.index(row)
    return [
        x
        for x in ROWS[start:] + ROWS[:start]
        if table.digests.get(x.name) != digest_of(x)
    ]


@needs("libtpu", extra="plan")
@pytest.mark.plan_scale
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_paper_scale_config_trains_where_it_says(row, digest_of, tmp_path):
    """A program that was compiled is not compiled again; a new one is, unless many are."""
    table, digest = scale.read(), digest_of(row)
    if table.digests.get(row.name) == digest:
        return
    new = new_rows(table, digest_of, row)
    if len(new) > NEW:
        pytest.fail(
            f"{len(new)} of {len(ROWS)} programs are new, more than {NEW} "
            f"({scale.TABLE.name} is of libtpu {table.libtpu}, {scale.libtpu()} is installed): "
            f"run {scale.COMMAND} and commit its table",
            pytrace=False,
        )
    check_it_fits(row, (scale.trains(planned(row)[0]),), tmp_path / "plan.json")
    line = f"{row.name} {digest}"
    warnings.warn(
        f"new, and it fits; commit its line of {scale.TABLE.name}: {line}", stacklevel=1
    )


@pytest.fixture
def compiled_rows(monkeypatch, tmp_path):
    """(n, table) -> what the first row's test compiles if the first n rows are changed."""
    monkeypatch.setattr(scale, "libtpu", lambda: "0.2")

    def first_row(new: int, table: dict[str, str]) -> list[str]:
        compiled, here = [], sys.modules[__name__]
        monkeypatch.setattr(
            here, "check_it_fits", lambda row, *_: compiled.append(row.name)
        )
        monkeypatch.setattr(scale, "read", lambda: scale.Table("0.1", table))

        def digest_of(row: Row) -> str:
            return "other" if ROWS.index(row) < new else "same"

        test_a_paper_scale_config_trains_where_it_says(ROWS[0], digest_of, tmp_path)
        return compiled

    return first_row


def test_a_known_program_is_not_compiled(compiled_rows):
    assert compiled_rows(0, dict.fromkeys(NAMES, "same")) == []


@pytest.mark.parametrize("rows", [NAMES, NAMES[1:]], ids=["changed", "added"])
def test_a_few_new_programs_are_compiled_and_say_their_line(compiled_rows, rows):
    message = f"commit its line of scale.txt: {re.escape(NAMES[0])} other"
    with pytest.warns(UserWarning, match=message):
        assert compiled_rows(NEW, dict.fromkeys(rows, "same")) == [NAMES[0]]


def test_many_new_programs_fail_with_the_command(compiled_rows):
    message = r"5 of 39 programs are new.*0\.1, 0\.2 is installed.*run python -m tests\.plan\.scale"
    with pytest.raises(pytest.fail.Exception, match=message):
        compiled_rows(NEW + 1, dict.fromkeys(NAMES, "same"))


@needs("libtpu", extra="plan")
@pytest.mark.nightly
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_paper_scale_config_samples_where_it_says(row, tmp_path):
    subject, _ = planned(row)
    if subject.config.stage not in scale.TRAINS:
        pytest.skip("it does not sample")
    names = tuple(name for name in REST if name != "score" or "reward" in subject.roles)
    check_it_fits(row, names, tmp_path / "plan.json")
