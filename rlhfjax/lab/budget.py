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
    costs = dry_run.costs([(run.config, run.workdir) for run in left], shared)
    base = [cost for cost in costs if cost.runs > 1]
    own = [cost for cost in costs if cost.runs == 1]
    text = [f"# study: {len(left)} runs to compute, {taken} taken from results"]
    for name, stages in _by_name(base):
        of_runs = sum(cost.runs for cost in stages)
        text.append(
            f"#   shared: {_times(stages)} {name} for {of_runs} runs: {_amount(stages)}"
        )
    for name, stages in _by_name(own):
        text.append(f"#   {_times(stages)} {name}: {_amount(stages)}")
    if costs:
        text.append(f"#   all: {_amount(costs)}{_share(base)}")
    return text


def _by_name(costs: Iterable[Cost]) -> list[tuple[str, list[Cost]]]:
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        groups.setdefault(cost.name, []).append(cost)
    return list(groups.items())


def _times(costs: Sequence[Cost]) -> str:
    return f"{len(costs)} x"


def _amount(costs: Sequence[Cost]) -> str:
    """Returns the tokens and the time of stages; where some are unknown it says of how many."""
    tokens = [cost.tokens for cost in costs if cost.tokens]
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    parts = []
    if tokens:
        parts.append(f"{announce.number(round(sum(tokens)))} tokens")
    if seconds:
        parts.append(f"about {duration(sum(seconds))}")
    if unknown := len(costs) - len(seconds):
        which = "its" if len(costs) == 1 else f"of {unknown} stages the"
        parts.append(f"{which} speed on this machine is not measured yet")
    return ", ".join(parts)


def _share(base: Sequence[Cost]) -> str:
    """Returns the time of the shared stages, stated apart."""
    seconds = [cost.seconds for cost in base if cost.seconds is not None]
    if not seconds:
        return ""
    return f", of which {duration(sum(seconds))} for the shared base"
