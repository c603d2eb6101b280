"""Where a run comes from, as rows of a table: command, commit, hardware, versions, seeds, sizes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhfjax.report.workdir import Run


def rows(run: Run) -> list[tuple[str, str]]:
    """Returns (name, text) pairs about a run; [] for workdirs of older versions."""
    starts = list(run.provenance)
    if not starts:  # a single stage
        for stage in run.stages:
            starts += stage.provenance
    return of_starts(starts) + of_sizes([sizes(run)])


def sizes(run: Run) -> dict[str, str]:
    """Returns the numbers of parameters of each stage's models, by stage."""
    texts: dict[str, str] = {}
    for stage in run.stages:
        last_start = stage.provenance[-1] if stage.provenance else {}
        if numbers := last_start.get("parameters"):
            texts[stage.name] = _numbers(numbers)
    return texts


def of_sizes(runs: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Returns a pair per stage, with the sizes of all runs where they differ."""
    stages = dict.fromkeys(name for run in runs for name in run)
    rows = []
    for stage in stages:
        texts = _distinct(run.get(stage, "") for run in runs)
        rows.append((f"Parameters, {stage}", texts))
    return rows


def of_starts(starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Returns what the starts of one or several runs have in common, and where they differ."""
    if not starts:
        return []
    rows = {
        "Command": _distinct(start.get("command", "") for start in starts),
        "Commit": _distinct(map(commit, starts)),
        "Date": _dates(starts),
        "Seeds": _distinct(_pairs(start, "seeds") for start in starts),
        "Hardware": _distinct(map(hardware, starts)),
        "Versions": _distinct(_pairs(start, "versions") for start in starts),
    }
    return [(name, text) for name, text in rows.items() if text]


def _dates(starts: Sequence[Mapping[str, Any]]) -> str:
    """Returns the dates of the first and the last start, and the number of starts."""
    dates = sorted(str(start.get("date", "")) for start in starts)
    first, last = dates[0], dates[-1]
    when = first if first == last else f"{first} to {last}"
    number = f"{len(starts)} starts" if len(starts) > 1 else "1 start"
    return f"{when}, {number}"


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
    cores = f"{about.get('cores')} cores"
    parts = [
        str(about.get("devices", "")),
        "1 host" if hosts == 1 else f"{hosts} hosts",
        f"{cores} of {about['cpu']}" if "cpu" in about else cores,
        str(about.get("system", "")),
    ]
    return ", ".join(filter(None, parts))


def _numbers(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items())


def _pairs(start: Mapping[str, Any], part: str) -> str:
    values = start.get(part, {})
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _distinct(texts: Iterable[str], most: int = 3) -> str:
    """Returns the different texts, at most `most` of them."""
    found = list(dict.fromkeys(filter(None, texts)))
    more = f"; {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more
