"""Where a run comes from, as rows of a table: command, commit, hardware, versions, seeds, sizes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhfjax.report.workdir import Run


def rows(run: Run) -> list[tuple[str, str]]:
    """Returns (name, text) pairs about a run; [] for workdirs of older versions."""
    starts = run.provenance or [row for s in run.stages for row in s.provenance]
    return of_starts(starts) + of_sizes([sizes(run)])


def sizes(run: Run) -> dict[str, str]:
    """Returns the numbers of parameters of each stage's models, by stage."""
    texts = {
        stage.name: _numbers(stage.provenance[-1].get("parameters", {}))
        for stage in run.stages
        if stage.provenance
    }
    return {name: text for name, text in texts.items() if text}


def of_sizes(runs: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Returns a pair per stage, with the sizes of all runs where they differ."""
    stages = dict.fromkeys(name for run in runs for name in run)
    return [
        (f"Parameters, {name}", _distinct(run.get(name, "") for run in runs))
        for name in stages
    ]


def of_starts(starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns what the starts of one or several runs have in common, and where they differ."""
    if not starts:
        return []
    dates = sorted(str(start.get("date", "")) for start in starts)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    number = f"{len(starts)} starts" if len(starts) > 1 else "1 start"
    found = [
        ("Command", _distinct(start.get("command", "") for start in starts)),
        ("Commit", _distinct(map(commit, starts))),
        ("Date", f"{when}, {number}"),
        ("Seeds", _distinct(_pairs(start.get("seeds", {})) for start in starts)),
        ("Hardware", _distinct(map(hardware, starts))),
        ("Versions", _distinct(_pairs(start.get("versions", {})) for start in starts)),
    ]
    return [(name, text) for name, text in found if text]


def commit(start: Mapping[str, Any]) -> str:
    """Returns the commit and whether the source was as committed."""
    commit = start.get("commit")
    if not commit:
        return "unknown: the package was installed from no repository"
    clean = start.get("clean")
    states = {True: "clean", False: "with uncommitted changes", None: "installed"}
    return f"{commit} ({states[clean]})"


def hardware(start: Mapping[str, Any]) -> str:
    about = start.get("hardware", {})
    if not about:
        return ""
    hosts = about.get("hosts", 1)
    parts = [
        str(about.get("devices", "")),
        "1 host" if hosts == 1 else f"{hosts} hosts",
        f"{about.get('cores')} cores",
        str(about.get("system", "")),
    ]
    return ", ".join(filter(None, parts))


def _numbers(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _distinct(texts: Iterable[str], most: int = 3) -> str:
    """Returns the different texts, at most `most` of them."""
    found = list(dict.fromkeys(filter(None, texts)))
    more = f"; {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more
