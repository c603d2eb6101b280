"""Writes the table of studies in experiments/README.md from the committed rows of results.

    python -m rlhfjax.lab.index            writes the table
    python -m rlhfjax.lab.index --check    says whether it is current, and writes nothing

Every file below the README's folder that declares a STUDY has a row: claim, verdict, effects with
their intervals, seeds, cost, command and commits. Its figure is written beside it, as NAME.png.
Nothing is run.
"""

import argparse
import re
from collections.abc import Sequence

from rlhfjax import experiment, paths, process
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.lab import card, drawings, results
from rlhfjax.lab.found import Found, of_plan, plan
from rlhfjax.lab.results import Row
from rlhfjax.lab.verdict import Result, Verdict
from rlhfjax.paths import Path
from rlhfjax.progress import duration
from rlhfjax.report import tables
from rlhfjax.sweep.expand import expand_loaded

README = "experiments/README.md"
BEGIN, END = "<!-- studies -->", "<!-- end of studies -->"
COLUMNS = ("study", "claim", "verdict", "effect", "seeds", "cost", "command", "commit")
_DECLARES = re.compile(rf"^{card.NAME}\b", re.MULTILINE)


def studies(folder: Path) -> list[Path]:
    """Returns the files below a folder that declare a study."""
    files = [file for file in paths.files(folder) if file.name.endswith(".py")]
    return [file for file in sorted(files) if _DECLARES.search(file.read_text())]


def table(readme: Path) -> str:
    """Returns the table as Markdown.

    Raises:
      ConfigError: a study is invalid. DataError: a row is damaged.
    """
    folder = readme.parent
    found = [_cells(file, folder) for file in studies(folder)]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *found]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines) + "\n"


def draw(folder: Path) -> list[Path]:
    """Writes the figures of the studies below a folder that have rows; returns their files."""
    written = []
    for file in studies(folder):
        found = found_in(file)
        outcomes = [results.to_outcome(row) for row in found.in_order]
        content = drawings.picture(found.study, outcomes)
        if content is not None:
            written.append(paths.write(file.with_suffix(".png"), content))
    return written


def found_in(file: Path) -> Found:
    """Returns a study with the committed rows of its runs."""
    loaded = experiment.load(str(file))
    study = card.of(loaded)
    if study is None:
        raise ConfigError(f"{file}: it declares no {card.NAME}")
    planned = plan(study, expand_loaded(loaded, paths.path("runs")), str(file))
    rows = of_plan(results.committed(loaded), planned)
    return Found(study, planned, rows=results.by_hash(rows))


def _cells(file: Path, folder: Path) -> Sequence[str]:
    found = found_in(file)
    verdict, rows = found.verdict(), found.in_order
    name = str(file.relative_to(folder))
    study = f"[{name.removesuffix('.py')}]({name})"
    picture = file.with_suffix(".png")
    if paths.exists(picture):
        study += f"<br>![]({picture.relative_to(folder)})"
    workdir = f"runs/{name.removesuffix('.py')}"
    return (
        study,
        found.study.claim,
        _verdict(verdict, len(rows), len(found.planned)),
        "<br>".join(map(effect, verdict.primary)),
        str(found.study.seeds),
        _cost(found, rows),
        f"`rlhfjax sweep --config={folder.name}/{name} --workdir={workdir}`",
        ", ".join(_commits(rows)) or "none",
    )


def _verdict(verdict: Verdict, rows: int, planned: int) -> str:
    if not rows:
        return "not run yet"
    if rows < planned:
        return f"{verdict.name}: {rows} of {planned} runs"
    return f"**{verdict.name}**"


def effect(result: Result) -> str:
    """Returns a mean difference with its interval: `loss: -0.31 (95 %: -0.4 to -0.22)`."""
    name = result.comparison.name
    if result.estimate is None:
        return f"{name}: none yet"
    mean = f"{name}: {tables.number(result.estimate.mean)}"
    if (ends := result.interval) is None:
        return mean
    low, high = map(tables.number, ends)
    return f"{mean} ({100 * result.level:.4g} %: {low} to {high})"


def _cost(found: Found, rows: Sequence[Row]) -> str:
    if not rows:
        return found.study.cost
    devices = [str(row.get("hardware", {}).get("devices", "")) for row in rows]
    where = ", ".join(dict.fromkeys(filter(None, devices)))
    return f"{duration(results.seconds(rows))}{f' on {where}' if where else ''}"


def _commits(rows: Sequence[Row]) -> list[str]:
    commits = [str(row.get("commit") or "unknown")[:8] for row in rows]
    return list(dict.fromkeys(commits))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def updated(text: str, new_table: str) -> str:
    """Returns the README with another table.

    Raises:
      DataError: it lacks the marks between which the table stands.
    """
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        raise DataError(f"expected the lines {BEGIN} and {END}")
    return f"{text[: start + len(BEGIN)]}\n\n{new_table}\n{text[end:]}"


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog="python -m rlhfjax.lab.index", description=about
    )
    parser.add_argument("readme", nargs="?", default=README)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    readme = paths.path(given.readme)
    if not given.check:
        for picture in draw(readme.parent):
            print(picture)
    before = paths.read(readme, ConfigError).decode()
    after = updated(before, table(readme))
    if before == after:
        print(f"{readme}: the table of studies is current")
        return
    if given.check:
        raise DataError(f"{readme}: run python -m rlhfjax.lab.index")
    print(paths.write(readme, after))


if __name__ == "__main__":
    process.run(main)
