"""The tables of a report, as text: what the page and the terminal both show."""

import dataclasses
import math

from rlhfjax.metrics import duration
from rlhfjax.report.workdir import Run, Stage

# What a metric of a comparison is called on paper. Others keep their name.
LABELS = {
    "gold_win_rate": "Win rate by gold reward",
    "proxy_win_rate": "Win rate by proxy reward",
    "gold": "Gold reward",
    "proxy": "Proxy reward",
    "gold_difference": "Gold reward, policy minus baseline, by prompt",
    "kl": "KL to the reference, nats",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "repeated_2": "Repeated bigrams within an answer",
    "words": "Words per answer",
    "response_length": "Tokens per answer",
    "eos_rate": "Answers that end by themselves",
    "empty": "Empty answers",
    "prompts": "Prompts",
    "prompts_cut": "Prompts too long for their room, cut",
}
PERCENT = {"gold_win_rate", "proxy_win_rate", "eos_rate", "empty", "prompts_cut"}
# The metrics that tell how a stage went, most telling first; the table shows the first few that are there.
TELLING = (
    "gold_win_rate", "gold_policy", "gold_baseline", "val_accuracy", "val_length_accuracy", "val_calibration_error",
    "val_gold", "val_proxy", "val_kl", "val_loss", "val_nats_per_byte", "reward", "kl", "loss", "accuracy",
)  # fmt: skip
# What an interval's ends are called after NAME_, and the interval on paper. Plain ends are those
# of a workdir whose metrics do not say which interval they are of.
INTERVALS = {
    "wilson": "Wilson",
    "bca": "BCa",
    "t": "Student's t",
    "": "percentile bootstrap",
}
GREEDY = "none: responses are greedy (temperature 0), not samples"
CARDS = (
    "gold_win_rate",
    "gold",
    "kl",
    "distinct_2",
)  # the headline rows that stand large at the top


@dataclasses.dataclass(frozen=True)
class Headline:
    """A row of the headline table: what, of the baseline (or nothing), of the policy, and a remark."""

    name: str
    label: str
    baseline: str
    policy: str
    note: str = ""


def number(x: float | int, percent: bool = False) -> str:
    """A number for people: three digits that count, thousands apart, `n/a` for NaN; or per cent with one decimal."""
    if not math.isfinite(x):
        return "n/a" if math.isnan(x) else str(x)
    if percent:
        return f"{100 * x:.1f} %"
    if (float(x).is_integer() and abs(x) < 1e9) or 99.95 <= abs(x) < 1e9:
        return f"{x:,.0f}"
    if abs(x) >= 1e9 or abs(x) < 1e-3:
        return f"{x:.1e}"
    return f"{x:#.3g}" if abs(x) >= 1 else f"{x:.3f}" if abs(x) >= 0.01 else f"{x:#.2g}"


def headlines(run: Run) -> list[Headline]:
    """The headline rows: the metrics of the run's last comparison; none before there is one.

    `NAME_policy` and `NAME_baseline` share a row; the ends of NAME's interval are in its remark.
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
    baseline, policy = (
        metrics.get(f"{name}_baseline"),
        metrics.get(f"{name}_policy", metrics.get(name)),
    )
    note = _interval(name, metrics)
    if not note and name.startswith("distinct") and baseline and policy is not None:
        note = f"{policy / baseline:.0%} of the baseline's"
    shown = ["" if x is None else number(x, percent) for x in (baseline, policy)]
    return Headline(name, LABELS.get(name, name), *shown, note)


def _interval(name: str, metrics: dict[str, float]) -> str:
    """`Wilson 95 %: LOW to HIGH`, or nothing where a metric has no interval."""
    for method, label in INTERVALS.items():
        ends = [metrics.get(end) for end in _ends(name, method)]
        if None not in ends:
            low, high = (number(end, name in PERCENT) for end in ends)
            return f"{label} 95 %: {low} to {high}"
    return ""


def stage_row(stage: Stage) -> dict[str, str]:
    """A row of the stage table."""
    steps = (
        f"{stage.steps:,}"
        if stage.status == "done"
        else f"{stage.steps:,} of {stage.total:,}"
    )
    rates = {
        name.removesuffix("_per_second"): v
        for name, v in stage.rates.items()
        if name.endswith("_per_second")
    }
    speed = [f"{number(value)} {unit}/s" for unit, value in rates.items()]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": stage.status,
        "steps": steps if stage.total else "",
        "time": "" if stage.seconds is None else duration(stage.seconds),
        "speed": speed[0] if speed else "",
        "metrics": ", ".join(
            f"{name} {number(stage.last[name])}" for name in telling(stage)
        ),
    }


def goodput_row(stage: Stage) -> dict[str, str]:
    """A row of the table of where the time went; the start is all that comes before the first step but compiling."""
    seconds = dict(stage.goodput["seconds"])
    seconds["start"] = sum(
        seconds.pop(name) for name in ("imports", "build", "restore")
    )
    times = {name: duration(value) for name, value in seconds.items()}
    share, starts = (
        number(stage.goodput["goodput"], percent=True),
        str(stage.goodput["starts"]),
    )
    return {"name": stage.name, "goodput": share, "starts": starts, **times}


def telling(stage: Stage, most: int = 4) -> list[str]:
    """The names of the metrics that tell how the stage went, at most so many."""
    known = [name for name in TELLING if name in stage.last]
    return known[:most] or sorted(stage.last)[:most]
