"""Turns the records of `benchmarks.compare` into a Markdown table. Nothing is measured here.

Rates are units per second: the median over rounds, with the lowest and the highest round in
brackets. The ratio is ours over the faster peer's in the same round; above 1 rlhfjax is faster.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import machine

Record = dict[str, Any]


class Side(NamedTuple):
    """What is compared."""

    name: str
    default: str  # the setting of who sets nothing
    settings: tuple[str, ...]  # that the pilot tries


SIDES = {
    "rlhfjax": Side("rlhfjax", "auto", ("float32", "bfloat16_products")),
    "trl": Side(
        "TRL",
        "bf16",
        ("float32", "bf16", "medium", "float32+compile", "bf16+compile"),
    ),
    "tunix": Side("Tunix", "float32", ("float32", "bf16")),
}
OURS, *PEERS = SIDES
PAIRINGS = ("float32", "default", "best")
METRICS = ("tokens_per_s", "pairs_per_s", "new_tokens_per_s", "response_tokens_per_s")
HEADER = (
    "workload",
    "shape",
    "pairing",
    *(side.name for side in SIDES.values()),
    "ratio to the faster peer",
    "peak MB: " + ", ".join(side.name for side in SIDES.values()),
    "share of the roofline: float32, bf16",
)


def rate(record: Record) -> float:
    """Returns units per second."""
    return next(record[name] for name in METRICS if name in record)


def runs(
    records: Iterable[Record], workload: str, shape: str, phase: str
) -> Iterator[Record]:
    """Yields the runs of a workload that have a result."""
    wanted = {"kind": "run", "workload": workload, "shape": shape, "phase": phase}
    for record in records:
        if wanted.items() <= record.items() and "error" not in record:
            yield record


def best_settings(
    records: Iterable[Record], workload: str, shape: str
) -> dict[str, str]:
    """Returns each side's setting with the highest rate in the pilot."""
    best: dict[str, Record] = {}
    for record in runs(records, workload, shape, "pilot"):
        known = best.get(record["side"])
        if known is None or rate(record) > rate(known):
            best[record["side"]] = record
    return {side: record["setting"] for side, record in best.items()}


class Cell(NamedTuple):
    """One side in one pairing: its runs by number of the round."""

    setting: str
    rounds: dict[int, Record]

    @property
    def rate(self) -> float:
        return statistics.median(map(rate, self.rounds.values()))

    @property
    def peak_mb(self) -> int:
        return max(record["peak_rss_mb"] for record in self.rounds.values())

    @property
    def seconds(self) -> float:
        return statistics.median(r["median"] for r in self.rounds.values())

    def text(self) -> str:
        rates = [rate(record) for record in self.rounds.values()]
        spread = f"({number(min(rates))}–{number(max(rates))})"
        return f"{number(self.rate)} {spread}, {self.setting}"


def cells(
    records: Sequence[Record], workload: str, shape: str, pairing: str
) -> dict[str, Cell]:
    """Returns the cell of every side that has a result."""
    by_setting: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for record in runs(records, workload, shape, "round"):
        by_setting[record["side"], record["setting"]][record["round"]] = record
    best = best_settings(records, workload, shape)
    found = {}
    for name, side in SIDES.items():
        choices = {"float32": "float32", "default": side.default}
        setting = choices.get(pairing) or best.get(name, "float32")
        default = by_setting.get((name, side.default), {}).values()
        if pairing == "best" and any(r.get("dtype") == setting for r in default):
            setting = side.default  # "auto" stood for the best one
        if rounds := by_setting.get((name, setting)):
            found[name] = Cell(setting, rounds)
    return found


def ratios(row: dict[str, Cell]) -> list[float]:
    """Returns our rate over the faster peer's for every round that both have."""
    peers = [row[name] for name in PEERS if name in row]
    if OURS not in row or not peers:
        return []
    faster = max(peers, key=lambda cell: cell.rate)
    ours = row[OURS].rounds
    both = [i for i in ours if i in faster.rounds]
    return [rate(ours[i]) / rate(faster.rounds[i]) for i in both]


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:,.1f}"


def _line(records: Sequence[Record], workload: str, shape: str, pairing: str) -> str:
    row = cells(records, workload, shape, pairing)
    columns = [workload, shape, pairing]
    columns += [row[name].text() if name in row else "—" for name in SIDES]
    paired = ratios(row)
    if paired:
        median, low, high = statistics.median(paired), min(paired), max(paired)
        columns.append(f"{median:.2f} ({low:.2f}–{high:.2f})")
    else:
        columns.append("—")
    peaks = [str(row[name].peak_mb) if name in row else "—" for name in SIDES]
    columns.append(", ".join(peaks))
    columns.append(_roofline_share(records, workload, shape, row))
    return "| " + " | ".join(columns) + " |"


def _roofline_share(
    records: Sequence[Record], workload: str, shape: str, row: dict[str, Cell]
) -> str:
    """Returns the roofline's seconds over our seconds, for both kinds of products."""
    wanted = {"kind": "roofline", "workload": workload, "shape": shape}
    found = [r for r in records if wanted.items() <= r.items() and "error" not in r]
    if not found or OURS not in row:
        return "—"
    seconds = found[-1]["seconds"].values()
    return ", ".join(f"{100 * least / row[OURS].seconds:.0f} %" for least in seconds)


def _arithmetic(records: Sequence[Record]) -> Iterator[str]:
    """Yields how each roofline comes about."""
    for record in records:
        if record["kind"] != "roofline" or "error" in record:
            continue
        title = f"{record['workload']} {record['shape']}: {record['gflop']:.1f} GFLOP"
        least = [f"{s:.3f} s of {name}" for name, s in record["seconds"].items()]
        yield f"\n{title}, at least {', '.join(least)}\n"
        yield "| product | count | GFLOP each | float32 GFLOP/s | bf16 GFLOP/s |"
        yield "|---|---|---|---|---|"
        for p in record["products"]:
            rates = " | ".join(str(value) for value in p["gflops_per_s"].values())
            product = f"[{p['m']}, {p['k']}] x [{p['k']}, {p['n']}]"
            yield f"| {product} | {p['count']} | {p['gflop']:.4g} | {rates} |"


def _failures(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if "error" in record:
            names = ("phase", "side", "setting", "workload", "shape")
            what = " ".join(record[name] for name in names if name in record)
            yield f"- {what}: {record['error']}"


def _left_out(of_runs: Sequence[Record]) -> Iterator[str]:
    """Yields what a side never ran, because its interpreter was not given."""

    def workload(record: Record) -> str:
        return f"{record['workload']} {record['shape']}"

    workloads = dict.fromkeys(map(workload, of_runs))
    for name, side in SIDES.items():
        ran = {workload(record) for record in of_runs if record["side"] == name}
        if missing := [each for each in workloads if each not in ran]:
            yield f"{side.name} was not run on {', '.join(missing)}."


def _versions(records: Sequence[Record]) -> dict[str, str]:
    """Returns the versions that the peers reported."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record["kind"] == "run" and record["side"] != OURS:
            for package, version in record.get("versions", {}).items():
                found[f"{SIDES[record['side']].name}: {package}"].add(version)
    return {name: " and ".join(sorted(found[name])) for name in sorted(found)}


def markdown(records: Sequence[Record]) -> str:
    """Returns the table, what it was measured on, what is missing, and the rooflines."""
    of_runs = [r for r in records if r["kind"] == "run"]
    workloads = dict.fromkeys((r["workload"], r["shape"]) for r in of_runs)
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for workload, shape in workloads:
        lines += [_line(records, workload, shape, pairing) for pairing in PAIRINGS]
    lines.append("")
    for record in records:
        if record["kind"] == "machine":
            lines.append(machine.sentence(record))
    loads = [r["load_before"] for r in of_runs if r["phase"] == "round"]
    if loads:
        lines.append(f"Load average before a run: {min(loads)} to {max(loads)}.")
    versions = [f"{name} {version}" for name, version in _versions(records).items()]
    if versions:
        lines.append("; ".join(versions) + ".")
    lines += _left_out(of_runs)
    if failures := list(_failures(records)):
        lines += ["", "No result:", "", *failures]
    return "\n".join([*lines, *_arithmetic(records)])
