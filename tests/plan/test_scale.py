"""The table of compiled programs: what is in a row's digest, and how the command writes rows."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlhfjax.config import to_dict
from rlhfjax.plan import shapes
from rlhfjax.plan.chips import CHIPS
from rlhfjax.plan.programs import StepPrograms
from rlhfjax.plan.topology import Target
from tests import tiny
from tests.needs import needs
from tests.plan import scale
from tests.plan.scale import ROOT, ROWS, Outcome, Table

FIRST, SECOND, THIRD = (row.name for row in ROWS[:3])


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The file, in the place of the real one."""
    file = tmp_path / "scale.txt"
    monkeypatch.setattr(scale, "TABLE", file)
    monkeypatch.setattr(scale, "libtpu", lambda: "1.2.3")
    return file


def test_the_table_is_written_as_it_is_read(table):
    """In the order of experiments/README.md, without rows that it does not have."""
    scale.write(Table("1.2.3", {SECOND: "b", "gone.py": "c", FIRST: "a"}))
    assert scale.read() == ("1.2.3", {FIRST: "a", SECOND: "b"})
    assert table.read_text().splitlines()[1:] == [
        "libtpu 1.2.3",
        f"{FIRST} a",
        f"{SECOND} b",
    ]


def test_an_interrupted_command_has_written_what_fits(table, monkeypatch, capsys):
    """The first row fits, the second does not, then it is interrupted. The third stays known."""

    def outcomes(chosen, known):
        assert chosen == ROWS
        assert known.digests == {SECOND: "old", THIRD: "third"}
        yield ROWS[0], Outcome("new", seconds=12.0)
        yield ROWS[1], Outcome("newer", failure=f"{SECOND} does not fit")
        raise KeyboardInterrupt

    scale.write(Table("1.2.3", {SECOND: "old", THIRD: "third"}))
    monkeypatch.setattr(scale, "outcomes", outcomes)
    with pytest.raises(KeyboardInterrupt):
        scale.update([])
    assert scale.read() == ("1.2.3", {FIRST: "new", THIRD: "third"})
    assert capsys.readouterr().out.splitlines() == [
        f"[1/39] {FIRST}: new, it fits (12 s)", f"[2/39] {SECOND}: {SECOND} does not fit",
    ]  # fmt: skip


def test_another_libtpu_makes_every_row_new(table, monkeypatch):
    scale.write(Table("1.2.2", {FIRST: "a", SECOND: "b"}))

    def outcomes(chosen, known):
        assert known == ("1.2.3", {})
        return [(row, Outcome("n")) for row in chosen]

    monkeypatch.setattr(scale, "outcomes", outcomes)
    assert scale.update([FIRST]) == 0
    assert scale.read() == ("1.2.3", {FIRST: "n"})


def test_a_known_row_is_not_compiled_and_what_does_not_fit_says_why(monkeypatch):
    monkeypatch.setattr(scale, "digest", lambda row: "d")

    def check(row, names, out):
        raise AssertionError(f"{row.name} does not fit: {names}")

    monkeypatch.setattr(scale, "check_it_fits", check)
    ppo = next(row for row in ROWS if row.name.startswith("instructgpt/ppo"))
    assert scale.compile_if_new(ppo, known="d") == Outcome("d", known=True)
    failure = f"{ppo.name} does not fit: ('update',)"
    assert scale.compile_if_new(ppo, known="") == Outcome("d", failure=failure)


@pytest.fixture
def small(monkeypatch):
    """digest(changes): of the sft of a small model, as if the devices at hand were TPUs."""
    values = to_dict(tiny.get_config("data=nowhere"))
    where = Target("v5e:2x2", jax.devices()[:4], CHIPS["v5e"], 1e9, "v5e:2x2")
    monkeypatch.setattr(scale, "libtpu", lambda: "1.2.3")
    monkeypatch.setattr(scale, "target", lambda topology: where)

    def digest(**changes):
        config = {**values, "sft": values["sft"] | changes}
        monkeypatch.setattr(
            scale, "planned", lambda row: (shapes.subject(config, "sft"), 2)
        )
        return scale.digest(ROWS[0])

    return digest


def test_a_rows_digest_changes_with_its_program(small):
    """By another batch, another mesh, another rule of that mesh; not by lowering other programs."""
    mesh = {"data": 1, "fsdp": 4}
    programs = [
        {},
        {"batch_size": 16},
        {"mesh": mesh},
        {"mesh": mesh | {"rules": {"embed": None}}},
    ]
    digests = [small(**changes) for changes in programs]
    assert len(set(digests)) == len(programs) and small() == digests[0]


FACTS = {
    "libtpu": lambda: "1.2.4",
    "held_by_others": lambda program, held: 1.0,
    "tpu_flags": lambda: ["--xla_tpu_x=1"],
    "options": lambda folder: {"xla_dump_to": folder},
    "topology": {"name": "2 x v5e:2x2"},
    "capacity": {"capacity": 2e9},
}


def test_a_rows_digest_changes_with_what_else_decides_whether_it_fits(
    small, monkeypatch
):
    """One program, lowered once: another version, memory, flags, options, or number of slices."""
    real = scale.programs.step_programs
    known = []

    def step_programs(subject, layout, completions):
        if not known:
            (step,) = real(subject, layout, completions).programs
            lowered = step.lower()
            step = step._replace(lower=lambda: lowered)
            known.append(
                StepPrograms([step], tokens=1, steps=1, batch=1, time=1, held=[])
            )
        return known[0]

    monkeypatch.setattr(scale.programs, "step_programs", step_programs)
    digests = [small()]
    for name, value in FACTS.items():
        with monkeypatch.context() as patch:
            if isinstance(value, dict):
                where = scale.target("")._replace(**value)
                name, value = "target", lambda topology, where=where: where
            patch.setattr(scale, name, value)
            digests.append(small())
    assert small() == digests[0] and len(set(digests)) == 1 + len(FACTS)


def test_flags_that_libtpu_reads(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_tpu_a=1"
    )
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--b=2 --c=3")
    assert scale.tpu_flags() == ["--xla_tpu_a=1", "--b=2", "--c=3"]


@needs("libtpu", extra="plan")
@pytest.mark.plan_scale
def test_the_digest_of_a_row_is_that_of_another_process():
    """That has another hash seed, folder and environment, and lowers the rows in another order."""
    names = ("huang2024/ppo.py:size=1b", "stiennon2020/reward.py:size=1.3b")
    rows = [row for row in ROWS if row.name in names]
    code = (
        "import sys; from tests.plan import scale\n"
        "print(*(scale.digest(row) for row in scale.ROWS[::-1] if row.name in sys.argv))"
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))
    }
    environment |= {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *(row.name for row in rows)]
    how = {"env": environment, "cwd": Path(__file__).parent, "text": True}
    output = subprocess.check_output(command, **how)
    assert output.split() == [scale.digest(row) for row in rows][::-1]
