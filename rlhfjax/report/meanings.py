"""What metrics mean: unit, explanation, and what a bad value looks like; see docs/metrics.md."""

import functools
import re
import tomllib
from typing import NamedTuple

from rlhfjax import paths
from rlhfjax.evals.stats import METHODS

TABLE = "metrics.toml"
MODELS = ("_policy", "_baseline", "_pretrained")
HEADER = """\
# Metrics

What metrics.jsonl, the report and TensorBoard name, by topic. A stage writes its metrics as
`STAGE/NAME`. The report shows these texts when the pointer is on a name.

- `val_NAME` is the metric NAME on held-out data.
- `NAME_policy`, `NAME_baseline` and `NAME_pretrained` are NAME of one model.
- `NAME_METHOD_low` and `NAME_METHOD_high` are the ends of the 95 % interval of NAME, by the METHOD
  `wilson` (shares), `bca` or `t` (means, bootstrap or Student's), or `wald` (regressions).
- A bad value is one that usually means trouble. Thresholds are rules of thumb, not tests.

This page is made of `rlhfjax/report/metrics.toml`; see `tests/report/test_meanings.py`.
"""


class Meaning(NamedTuple):
    """What one metric is."""

    unit: str
    what: str
    bad: str  # what a bad value looks like, and why; "" if no value is bad

    @property
    def hint(self) -> str:
        """The text that is shown on hover."""
        text = f"{self.what} Unit: {self.unit}."
        return f"{text} Bad: {self.bad}" if self.bad else text


@functools.cache
def groups() -> dict[str, dict[str, Meaning]]:
    """Returns the meanings by topic and name, in the order of the table."""
    file = paths.path(__file__).parent / TABLE
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    return {
        group: {name: Meaning(**entry) for name, entry in entries.items()}
        for group, entries in table.items()
    }


@functools.cache
def _all() -> dict[str, Meaning]:
    return {
        name: meaning for group in groups().values() for name, meaning in group.items()
    }


def find(name: str, kind: str = "") -> Meaning | None:
    """Returns what a metric means; None if the table does not have it.

    Args:
      name: without the stage; may be held-out, of one model, or the end of an interval.
      kind: the kind of the stage, such as "ppo"; some names mean different things.
    """
    name = re.sub(rf"_({'|'.join(METHODS)})_(low|high)$", "", name)
    name = name.removeprefix("val_")
    bare = next(
        (name.removesuffix(model) for model in MODELS if name.endswith(model)), name
    )
    known = _all()
    for candidate in (f"{kind}/{name}", name, f"{kind}/{bare}", bare):
        if candidate in known:
            return known[candidate]
    stems = [
        stem for stem in known if stem.endswith("*") and name.startswith(stem[:-1])
    ]
    return known[stems[0]] if stems else None


def hint(name: str, kind: str = "") -> str:
    """Returns the text that is shown when the pointer is on a metric; "" if it is unknown."""
    meaning = find(name, kind)
    if meaning is None:
        return ""
    return f"Held-out. {meaning.hint}" if name.startswith("val_") else meaning.hint


def markdown() -> str:
    """Returns docs/metrics.md."""
    lines = [HEADER]
    for group, entries in groups().items():
        lines += [f"## {group}", ""]
        lines += ["| metric | unit | what it is | a bad value |", "|---|---|---|---|"]
        for name, meaning in entries.items():
            cells = (f"`{name}`", meaning.unit, meaning.what, meaning.bad or "-")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
