"""Shows a search in the terminal: what fits, ranked, and why the other slices do not."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from rlhfjax.mesh import MeshConfig, axis_sizes
from rlhfjax.plan.by_hand import BY_HAND
from rlhfjax.plan.candidates import SLICES, Candidate
from rlhfjax.plan.memory import GIB
from rlhfjax.plan.search import Search, shown
from rlhfjax.plan.tables import gib, new_table

MOST_RANKED = 16


def search_tables(result: Search, chips: Sequence[str]) -> RenderableType:
    """Returns what fits, what does not, and the answers.

    Args:
      chips: those that were searched.
    """
    parts: list[RenderableType] = [ranking(result)]
    if (misses := why_not(result, chips)).row_count:
        parts.append(misses)
    return Group(*parts, escape(answers(result)))


def ranked(result: Search) -> list[Candidate]:
    """Returns one candidate per slice that fits or should fit, the best first.

    The best is the one with the most tokens per chip-second, or with prices the cheapest.
    """
    found = []
    for group in result.slices.values():
        fitting = [c for c in group if c.fits]
        if not fitting and any(c.plan is not None for c in group):
            continue
        likely = fitting or [c for c in group[:1] if c.expected_to_fit]
        found += [max(likely, key=result.value)] if likely else []
    return sorted(found, key=lambda c: -result.value(c))


def ranking(result: Search) -> Table:
    """Returns the table of what fits, the best first."""
    priced = any(c.price is not None for c in result.candidates)
    columns = ["slice", "how", "GiB", "by", "s/step", "days", "money"]
    table = new_table(
        "What fits, best first: GiB per device, time of a step, days and money of the run",
        columns if priced else columns[:-1],
        left=["slice", "how", "by"],
    )
    for column in table.columns:
        column.no_wrap = column.header != "how"
    for c in ranked(result)[:MOST_RANKED]:
        rate = result.rate(c)
        whole = c.cost(rate)
        cells = [
            c.topology,
            describe(c),
            f"{(c.needed or c.expected.bytes) / GIB:.1f}/{c.capacity / GIB:.0f}",
            "hand" if c.plan is None else "compiler",
            f"{c.expected.tokens / (rate * c.chips):,.3g}",
            f"{whole.days:,.3g}",
        ]
        if priced:
            cells.append("-" if whole.money is None else f"{whole.money:,.4g}")
        table.add_row(*cells)
    return table


def why_not(result: Search, chips: Sequence[str]) -> Table:
    """Returns the slices on which nothing fits, each with what needs least there."""
    table = new_table(
        "What does not fit",
        ["slice", "needs least", "why"],
        left=["slice", "needs least"],
    )
    table.columns[2].justify = "left"
    fitting = {c.topology for c in ranked(result)}
    slices = result.slices
    for chip in chips:
        for shape in SLICES[chip]:
            name = f"{chip}:{shape}"
            if name not in slices:
                table.add_row(name, "-", "no mesh divides the batch and the models")
            elif name not in fitting:
                least = _least(slices[name])
                table.add_row(name, describe(least), reason(least))
    return table


def _least(group: Sequence[Candidate]) -> Candidate:
    """Returns what needs least on a slice, of what was compiled if anything was."""
    compiled = [c for c in group if c.plan is not None]
    return min(compiled or group, key=lambda c: c.needed or c.expected.bytes)


def reason(c: Candidate) -> str:
    """Returns why a candidate does not fit: its bytes, and the largest parts of the estimate."""
    parts = sorted(c.expected.parts.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{part} {gib(size)}" for part, size in parts[:3])
    if c.needed is not None:
        return f"compiled, {gib(c.needed)} GiB of {gib(c.capacity)}; by hand: {largest}"
    return f"{gib(c.expected.bytes)} GiB of {gib(c.capacity)} by hand: {largest}"


def describe(c: Candidate) -> str:
    """Returns the mesh of a candidate, and the settings that differ from the config's."""
    parts = [describe_mesh(c.mesh)]
    if c.settings.remat:
        parts.append(f"remat {c.settings.remat}")
    if c.settings.microbatches:
        parts.append(f"microbatches {c.settings.microbatches}")
    return ", ".join(parts)


def describe_mesh(mesh: MeshConfig) -> str:
    """Returns the axes above 1 and the logical axes that are not sharded."""
    parts = [f"{axis} {size}" for axis, size in axis_sizes(mesh).items() if size > 1]
    parts += [f"{name} whole" for name, axes in mesh.rules.items() if not axes]
    return ", ".join(parts) or "one device"


def answers(result: Search) -> str:
    """Returns the smallest and the best slice, and how many were compiled."""
    lines = []
    fewest, best = result.fewest, result.best
    if fewest is None or best is None:
        lines.append("No slice fits.")
    else:
        by_chip = ", ".join(result.smallest.values())
        lines.append(f"Smallest that fits: {fewest.topology}. By chip: {by_chip}.")
        what = "Most tokens per chip-second"
        if best.price is not None:
            what = "Cheapest"
        lines.append(
            f"{what}: {best.topology}, {best.rate:,.1f} tokens per chip-second; "
            f"{describe(best)}; {best.cost().text()}."
        )
    count = len(result.candidates)
    lines.append(
        f"Compiled {result.compilations} of {count} candidates on {len(result.slices)} slices."
    )
    if result.exhausted:
        lines.append(
            "--compiles was reached: a slice that was not compiled may be smaller or better."
        )
    if any(c.by_hand for c in shown(result)):
        lines.append(f"GPUs are {BY_HAND}: a GPU's compiler needs the GPU.")
    return "\n".join(lines)
