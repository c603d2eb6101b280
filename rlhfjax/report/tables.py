"""Builds the tables of a report as text, for the page and for the terminal."""

import dataclasses
import math
from typing import Any

from rlhfjax.metrics import duration
from rlhfjax.report.workdir import Run, Stage

# Labels of the metrics of a comparison. Others keep their name.
LABELS = {
    "gold_win_rate": "Win rate by gold reward",
    "proxy_win_rate": "Win rate by proxy reward",
    "gold": "Gold reward",
    "proxy": "Proxy reward",
    "gold_difference": "Gold reward, policy minus baseline, per prompt",
    "kl": "KL to the reference, nats",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "repeated_2": "Repeated bigrams within a response",
    "words": "Words per response",
    "response_length": "Tokens per response",
    "eos_rate": "Responses that end with EOS",
    "empty": "Empty responses",
    "prompts": "Prompts",
    "prompts_cut": "Prompts cut to the maximum length",
}
PERCENT = {"gold_win_rate", "proxy_win_rate", "eos_rate", "empty", "prompts_cut"}
# The metrics that best tell how a stage went, most telling first. The stage table shows the first
# four that a stage has.
TELLING = (
    "gold_win_rate", "gold_policy", "gold_baseline", "val_accuracy", "val_length_accuracy",
    "val_calibration_error", "val_gold", "val_proxy", "val_kl", "val_loss", "val_nats_per_byte",
    "reward", "kl", "loss", "accuracy",
)  # fmt: skip
# Kinds of intervals: the suffix in NAME_SUFFIX_low and its label. Metrics NAME_low and NAME_high
# are of workdirs whose metrics do not name the kind.
INTERVALS = {
    "wilson": "Wilson",
    "bca": "BCa",
    "t": "Student's t",
    "": "percentile bootstrap",
}
GREEDY = "none: responses are greedy (temperature 0), not samples"
# The headline rows that are shown large at the top of the page.
CARDS = ("gold_win_rate", "gold", "kl", "distinct_2")


@dataclasses.dataclass(frozen=True)
class Headline:
    """A row of the headline table."""

    name: str  # of the metric
    label: str
    baseline: str  # its value for the baseline, may be empty
    policy: str  # its value for the policy
    note: str = ""


def number(x: float | int, percent: bool = False) -> str:
    """Formats a number: three significant digits, thousands separated, `n/a` for NaN.

    Args:
      percent: format a share as a percentage with one decimal.
    """
    if not math.isfinite(x):
        return "n/a" if math.isnan(x) else str(x)
    if percent:
        return f"{100 * x:.1f} %"
    if (float(x).is_integer() and abs(x) < 1e9) or 99.95 <= abs(x) < 1e9:
        return f"{x:,.0f}"
    if abs(x) >= 1e9 or abs(x) < 1e-3:
        return f"{x:.1e}"
    if abs(x) >= 1:
        return f"{x:#.3g}"
    return f"{x:.3f}" if abs(x) >= 0.01 else f"{x:#.2g}"


def headlines(run: Run) -> list[Headline]:
    """Returns the metrics of the run's last comparison, one per row; [] if there is none.

    `NAME_policy` and `NAME_baseline` share a row; the interval of NAME is in its note.
    """
    stages = run.comparisons
    if not stages:
        return []
    metrics = stages[-1].last
    bases = [name.removesuffix("_policy").removesuffix("_baseline") for name in metrics]
    names = dict.fromkeys(bases)
    ends = {
        end for name in names for method in INTERVALS for end in _ends(name, method)
    }
    rows = [_headline(name, metrics) for name in names if name not in ends]
    if "kl" not in metrics and stages[-1].config.get("temperature") == 0:
        rows.append(Headline("kl", LABELS["kl"], baseline="", policy="", note=GREEDY))
    order = {name: i for i, name in enumerate(LABELS)}
    return sorted(rows, key=lambda row: order.get(row.name, len(order)))


def _ends(name: str, method: str) -> tuple[str, str]:
    prefix = f"{name}_{method}" if method else name
    return f"{prefix}_low", f"{prefix}_high"


def _headline(name: str, metrics: dict[str, float]) -> Headline:
    percent = name in PERCENT
    baseline = metrics.get(f"{name}_baseline")
    policy = metrics.get(f"{name}_policy", metrics.get(name))
    note = _interval(name, metrics)
    if not note and name.startswith("distinct") and baseline and policy is not None:
        note = f"{policy / baseline:.0%} of the baseline's"
    return Headline(
        name=name,
        label=LABELS.get(name, name),
        baseline="" if baseline is None else number(baseline, percent),
        policy="" if policy is None else number(policy, percent),
        note=note,
    )


def _interval(name: str, metrics: dict[str, float]) -> str:
    """Returns `Wilson 95 %: LOW to HIGH`, or "" if the metric has no interval."""
    for method, label in INTERVALS.items():
        low_name, high_name = _ends(name, method)
        if low_name in metrics and high_name in metrics:
            low = number(metrics[low_name], name in PERCENT)
            high = number(metrics[high_name], name in PERCENT)
            return f"{label} 95 %: {low} to {high}"
    return ""


def stage_row(stage: Stage) -> dict[str, str]:
    """Returns a row of the stage table."""
    steps = ""
    if stage.total:
        steps = f"{stage.steps:,}"
        if stage.status != "done":
            steps += f" of {stage.total:,}"
    speeds = [
        f"{number(value)} {name.removesuffix('_per_second')}/s"
        for name, value in stage.rates.items()
        if name.endswith("_per_second")
    ]
    metrics = [f"{name} {number(stage.last[name])}" for name in telling(stage)]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": stage.status,
        "steps": steps,
        "time": "" if stage.seconds is None else duration(stage.seconds),
        "speed": speeds[0] if speeds else "",
        "metrics": ", ".join(metrics),
    }


def goodput_row(stage: Stage) -> dict[str, str]:
    """Returns a row of the table of wall times.

    The column `start` is everything before the first step except compilation.
    """
    record: Any = stage.goodput
    seconds = dict(record["seconds"])
    start_parts = ("imports", "build", "restore")
    seconds["start"] = sum(seconds.pop(part) for part in start_parts)
    times = {name: duration(value) for name, value in seconds.items()}
    return {
        "name": stage.name,
        "goodput": number(record["goodput"], percent=True),
        "starts": str(record["starts"]),
        **times,
    }


def telling(stage: Stage, most: int = 4) -> list[str]:
    """Returns the names of the metrics that best tell how a stage went, at most `most`."""
    known = [name for name in TELLING if name in stage.last]
    return known[:most] or sorted(stage.last)[:most]
