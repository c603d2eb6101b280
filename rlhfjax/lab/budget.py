"""What a study costs before it runs: tokens, and the time by this machine's measured rates."""

from collections.abc import Iterable, Sequence

from rlhfjax import announce, dry_run
from rlhfjax.dry_run import Cost
from rlhfjax.progress import duration
from rlhfjax.sweep.expand import Run


def lines(left: Sequence[Run], taken: int, shared: bool) -> list[str]:
    """Returns the budget as comments for a shell: shared stages first, then those of each run.

    Args:
      left: the runs that have to run.
      taken: number of runs whose results are committed; they cost nothing.
      shared: whether the runs share a stage cache.
    """
    runs = [(run.config, run.workdir) for run in left]
    costs = dry_run.costs(runs, shared)
    base = [cost for cost in costs if cost.runs > 1]
    own = [cost for cost in costs if cost.runs == 1]
    text = [f"# study: {len(left)} runs to compute, {taken} taken from results"]
    for name, stages in _by_name(base):
        count = len(stages)
        of_runs = sum(cost.runs for cost in stages)
        amount = _amount(stages)
        text.append(f"#   shared: {count} x {name} for {of_runs} runs: {amount}")
    for name, stages in _by_name(own):
        count = len(stages)
        amount = _amount(stages)
        text.append(f"#   {count} x {name}: {amount}")
    if costs:
        amount = _amount(costs, base)
        text.append(f"#   all: {amount}")
    return text


def _by_name(costs: Iterable[Cost]) -> list[tuple[str, list[Cost]]]:
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        group = groups.setdefault(cost.name, [])
        group.append(cost)
    return list(groups.items())


def _amount(costs: Sequence[Cost], base: Sequence[Cost] = ()) -> str:
    """Returns the tokens and the time of stages, and how much of it is for the shared ones."""
    tokens = sum(cost.tokens or 0.0 for cost in costs)
    known, unknown = _seconds(costs)
    parts = []
    if tokens:
        count = announce.number(round(tokens))
        parts.append(f"{count} tokens")
    if known or not unknown:
        total = duration(known)
        parts.append(f"about {total}")
    shared, _ = _seconds(base)
    if shared:
        part = duration(shared)
        parts[-1] += f" ({part} of it for the shared base)"
    if unknown:
        names = ", ".join(unknown)
        what = "without" if known else "speed here unknown:"
        parts.append(f"{what} {names}")
    return ", ".join(parts)


def _seconds(costs: Sequence[Cost]) -> tuple[float, list[str]]:
    """Returns the seconds of stages, and the names of those whose speed is not known."""
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    unknown = [cost.name for cost in costs if cost.seconds is None]
    return sum(known, 0.0), list(dict.fromkeys(unknown))
