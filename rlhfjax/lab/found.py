"""The runs that a study plans, and the rows that there are of them."""

import dataclasses
from collections.abc import Mapping, Sequence

from rlhfjax.errors import ConfigError
from rlhfjax.json_text import shown
from rlhfjax.lab import results
from rlhfjax.lab.card import Study
from rlhfjax.lab.results import Planned, Row
from rlhfjax.lab.verdict import Verdict, judge
from rlhfjax.sweep.expand import Run, plain


@dataclasses.dataclass(frozen=True)
class Found:
    """A study with the rows that there are of its planned runs."""

    study: Study
    planned: Sequence[Planned]
    rows: Mapping[str, Row]  # by hash
    repeats: Sequence[results.Repeat] = ()
    here: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The folder of a run that is in the sweep's folder, by hash."""

    @property
    def in_order(self) -> list[Row]:
        """The rows of the plan, in its order."""
        return [self.rows[run.hash] for run in self.planned if run.hash in self.rows]

    def verdict(self) -> Verdict:
        return judge(self.study, [results.to_outcome(row) for row in self.in_order])


def plan(study: Study, runs: Sequence[Run], file: str) -> list[Planned]:
    """Returns the runs of a study with their conditions.

    Raises:
      ConfigError: a run has no condition, a condition has another number of seeds than the card
        says, or two runs compute the same.
    """
    conditions = {
        name: {option: plain(option, value) for option, value in overrides.items()}
        for name, overrides in study.conditions.items()
    }
    planned = []
    for run in runs:
        names = [name for name, x in conditions.items() if x == run.setting]
        if len(names) != 1:
            what = "is no condition" if not names else f"is both {' and '.join(names)}"
            raise ConfigError(f"{file}: its sweep adds {run.name}, which {what}")
        planned.append(
            Planned(
                name=run.name,
                condition=names[0],
                overrides=run.overrides,
                seeds=run.seeds,
                hash=results.config_hash(run.config),
                config=run.config,
            )
        )
    _validate_seeds(study, planned, file)
    return planned


def _validate_seeds(study: Study, planned: Sequence[Planned], file: str) -> None:
    for condition in study.conditions:
        count = sum(run.condition == condition for run in planned)
        if count != study.seeds:
            raise ConfigError(
                f"{file}: STUDY.seeds={study.seeds}, but its sweep adds {count} runs of"
                f" {shown(condition)}"
            )
    names: dict[str, str] = {}
    for run in planned:
        other = names.setdefault(run.hash, run.name)
        if other != run.name:
            raise ConfigError(
                f"{file}: {other} and {run.name} have the same config; a seed or an"
                " override changes nothing"
            )


def of_plan(rows: Sequence[Row], planned: Sequence[Planned]) -> list[Row]:
    """Returns the rows of planned runs, with the names that conditions have now."""
    of_hash = {run.hash: run for run in planned}
    found: list[Row] = []
    for row in rows:
        if run := of_hash.get(row["hash"]):
            now = {"condition": run.condition, "seeds": dict(run.seeds)}
            found.append({**row, **now})  # pyright: ignore[reportArgumentType]
    return found
