"""The rows of experiments/README.md, and which of their programs the TPU compiler accepted.

scale.txt has one line per row: its name, and the digest of its training program. A program whose
digest is there was compiled and fits; CI compiles new ones. After a change that makes many
programs new,

    pip install -e '.[test,plan]'
    python -m tests.plan.scale            # compiles every new row, two at a time
    python -m tests.plan.scale stiennon   # only rows whose name contains one of these words

writes each row as soon as it fits. An interrupted command goes on where it stopped. It drops rows
that experiments/README.md does not have.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhfjax import main as command_line
from rlhfjax.errors import ConfigError
from rlhfjax.plan import programs, shapes
from rlhfjax.plan.compiled import held_by_others
from rlhfjax.plan.compiler import options
from rlhfjax.plan.topology import quiet, target
from tests.plan import fingerprint

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("scale.txt")
COMMAND = "python -m tests.plan.scale"
AT_A_TIME = 2  # compilations
# The program of a stage that trains; of other stages it is "step".
TRAINS = {"ppo": "update", "group": "update"}


class Row(NamedTuple):
    """A line of the table of experiments/README.md."""

    config: str
    topology: str
    gib: str
    flags: dict[str, str]

    @property
    def name(self) -> str:
        return self.config.removeprefix("experiments/")


class Table(NamedTuple):
    """The content of scale.txt."""

    libtpu: str  # the version that compiled the programs
    digests: dict[str, str]  # row's name -> digest


def rows() -> list[Row]:
    """Returns the table of experiments/README.md."""
    table = []
    for line in (ROOT / "experiments" / "README.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0].startswith("experiments/"):
            flags = dict(
                flag.removeprefix("--").split("=", 1) for flag in cells[3].split()
            )
            table.append(Row(cells[0], cells[1], cells[2], flags))
    return table


ROWS = rows()


def planned(row: Row) -> tuple[shapes.Subject, int]:
    """Returns the stage as the row has it, its mesh included, and its completions."""
    path, _, arg = row.config.partition(":")
    config = runpy.run_path(str(ROOT / path))["get_config"](arg or None)
    for name, value in row.flags.items():
        if mesh_axis := re.fullmatch(r"config\.mesh\.(\w+)", name):
            config.mesh[mesh_axis[1]] = int(value)
    models = {name: row.flags.get(name, "") for name in ("model", "reward_model")}
    return shapes.subject(config, **models), int(row.flags.get("completions", 2))


def trains(subject: shapes.Subject) -> str:
    """Returns the name of the program that trains."""
    return TRAINS.get(subject.config.stage, "step")


def check_it_fits(row: Row, names: tuple[str, ...], out: Path) -> None:
    """Runs `rlhfjax plan` on some programs of a row, as a user does.

    Raises AssertionError, with the row's config, unless all of them fit.
    """
    flags = [f"--{name}={value}" for name, value in row.flags.items()]
    where = [
        f"--config={ROOT / row.config}",
        f"--topology={row.topology}",
        f"--json={out}",
    ]
    try:
        command_line.main(
            ["rlhfjax", "plan", *where, *flags, f"--programs={','.join(names)}"]
        )
    except (ConfigError, SystemExit) as e:
        raise AssertionError(
            f"{row.config} on {row.topology} cannot be planned: {e}"
        ) from e
    plan = json.loads(out.read_text())
    compiled = [program["name"] for program in plan["programs"]]
    assert compiled == list(names), f"{row.config}: {compiled} were compiled"
    assert plan["fits"], f"{row.config} does not fit {row.topology}: {plan['advice']}"


# ---------------------------------------------------------------------- what was compiled


def digest(row: Row) -> str:
    """Returns a digest of what decides whether a row fits; lowers the row, without compiling it.

    The digest covers the program, its compile options, the topology, libtpu, the memory of a device
    and the bytes that other programs hold there.
    """
    subject, completions = planned(row)
    where = target(row.topology)
    layout = programs.layout_for(subject, where)
    step = programs.step_programs(subject, layout, completions)
    (program,) = (p for p in step.programs if p.name == trains(subject))
    facts = {
        "libtpu": libtpu(),
        "topology": where.name,
        "capacity": where.capacity,
        "beside": held_by_others(program, step.held),
        "flags": tpu_flags(),
    }
    with quiet():
        return fingerprint.digest(program.lower(), options(folder=""), **facts)


def libtpu() -> str:
    """Returns the version that is installed."""
    return importlib.metadata.version("libtpu")


def tpu_flags() -> list[str]:
    """Returns the flags that libtpu reads from the environment."""
    shared = os.environ.get("XLA_FLAGS", "").split()
    own = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    return [flag for flag in shared if flag.startswith("--xla_tpu")] + own


def read() -> Table:
    """Returns the table; its first line is a version, `libtpu 0.0.52`, the others rows."""
    text = TABLE.read_text()
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    (_, version), *digests = lines
    return Table(version, dict(digests))


def write(table: Table) -> None:
    """Writes the rows that there are, in the order of experiments/README.md."""
    known = [
        f"{row.name} {table.digests[row.name]}"
        for row in ROWS
        if row.name in table.digests
    ]
    comment = f"# Written by {COMMAND}: programs that were compiled and fit."
    head = [comment, f"libtpu {table.libtpu}"]
    new = TABLE.with_suffix(".new")
    new.write_text("\n".join([*head, *known, ""]))
    new.replace(TABLE)


# ---------------------------------------------------------------------- the command


class Outcome(NamedTuple):
    """The result of a row."""

    digest: str
    known: bool = False  # the table has its digest
    failure: str = ""  # the error, if it does not fit
    seconds: float = 0.0


def update(words: list[str]) -> int:
    """Compiles the rows that are new and writes those that fit; returns how many do not."""
    table = read()
    if table.libtpu != libtpu():
        table = Table(libtpu(), {})
    chosen = [
        row for row in ROWS if not words or any(word in row.name for word in words)
    ]
    failed = 0
    for n, (row, outcome) in enumerate(outcomes(chosen, table), start=1):
        table.digests.pop(row.name, None)
        if outcome.failure:
            failed += 1
        else:
            table.digests[row.name] = outcome.digest
        write(table)
        print(f"[{n}/{len(chosen)}] {row.name}: {describe(outcome)}", flush=True)
    print(
        f"{TABLE.name}: {len(table.digests)} of {len(ROWS)} rows, libtpu {table.libtpu}"
    )
    return failed


def outcomes(chosen: list[Row], table: Table) -> Iterator[tuple[Row, Outcome]]:
    """Yields each row with its outcome, in the order in which they are done."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(AT_A_TIME, mp_context=context) as pool:
        waiting = {
            pool.submit(compile_if_new, row, table.digests.get(row.name, "")): row
            for row in chosen
        }
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


def compile_if_new(row: Row, known: str) -> Outcome:
    """Compiles the row's program unless its digest is known."""
    began = time.monotonic()
    new = digest(row)
    if new == known:
        return Outcome(new, known=True)
    silent = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, silent:
        try:
            check_it_fits(row, (trains(planned(row)[0]),), Path(folder) / "plan.json")
        except AssertionError as e:
            return Outcome(new, failure=str(e))
    return Outcome(new, seconds=time.monotonic() - began)


def describe(outcome: Outcome) -> str:
    """Describes an outcome in words."""
    if outcome.failure:
        return outcome.failure
    return "known" if outcome.known else f"new, it fits ({outcome.seconds:.0f} s)"


if __name__ == "__main__":
    sys.exit(min(update(sys.argv[1:]), 1))
