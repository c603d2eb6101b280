"""Builds the tables of a report as text, for the page and for the terminal."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rlhfjax.progress import duration
from rlhfjax.report import meanings, names
from rlhfjax.report.workdir import Run, Stage

# Labels of the metrics of a comparison. Others keep their name.
LABELS = {
    "gold_win_rate": "Win rate by gold reward",
    "gold_win_rate_equal_length": "Win rate by gold reward, equal length",
    "proxy_win_rate": "Win rate by proxy reward",
    "proxy_win_rate_equal_length": "Win rate by proxy reward, equal length",
    "gold": "Gold reward",
    "proxy": "Proxy reward",
    "gold_difference": "Gold reward, difference per prompt",
    "proxy_difference": "Proxy reward, difference per prompt",
    "kl": "KL to the reference",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "repeated_2": "Repeated bigrams within a response",
    "words": "Words per response",
    "response_length": "Length of responses",
    "eos_rate": "Responses that end with EOS",
    "empty": "Empty responses",
    "prompts": "Prompts",
    "prompts_cut": "Prompts cut to the maximum length",
    "chat_examples_cut": "Held-out conversations cut to the maximum length",
    "data_merged_turns": "Messages joined to the one before them",
    "data_skipped_rows": "Malformed rows that were left out",
}
PERCENT = {
    "gold_win_rate",
    "gold_win_rate_equal_length",
    "proxy_win_rate",
    "proxy_win_rate_equal_length",
    "eos_rate",
    "empty",
    "prompts_cut",
    "chat_examples_cut",
}
# Losses on held-out text, which have a separate table.
TAX = {
    "chat_loss": "Held-out conversations",
    "chat_nats_per_byte": "Held-out conversations",
    "text_loss": "Held-out documents",
    "text_nats_per_byte": "Held-out documents",
}
# The metrics that best tell how a stage went, most telling first. The stage table shows the first
# four that a stage has.
TELLING = (
    "best_step", "best_value",
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
    "wald": "Wald",
    "": "percentile bootstrap",
}
GREEDY = "none: responses are greedy (temperature 0), not samples"
SHAPED = "none: with min_p, repetition_penalty or stop, responses are no samples of the policy"
# The headline rows that are shown large at the top of the page; those of the proxy reward only
# without a gold reward.
CARDS = ("gold_win_rate", "gold", "kl", "distinct_2")
CARDS_OF_PROXY = ("proxy_win_rate", "proxy", "kl", "distinct_2")


@dataclasses.dataclass(frozen=True)
class Headline:
    """A row of the headline table."""

    name: str  # of the metric
    label: str
    baseline: str  # its value for the baseline, may be empty
    policy: str  # its value for the policy
    note: str = ""
    unit: str = ""
    hint: str = ""  # what the metric means


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

    `NAME_policy` and `NAME_baseline` share a row; the intervals of NAME are in its note.
    """
    stages = run.comparisons
    if not stages:
        return []
    metrics = stages[-1].last
    models = names.of_models(run, stages[-1])
    rows = [
        _headline(name, stages[-1], models)
        for name in dict.fromkeys(map(_base, metrics))
        if not _ends_interval(name) and name not in TAX
    ]
    note = _why_no_kl(stages[-1].config)
    if "kl" not in metrics and note:
        rows.append(Headline("kl", LABELS["kl"], baseline="", policy="", note=note))
    order = {name: i for i, name in enumerate(LABELS)}
    return sorted(rows, key=lambda row: order.get(row.name, len(order)))


def _why_no_kl(config: Mapping[str, Any]) -> str:
    """Returns why evaluation measured no KL; empty if its options do not say so."""
    if config.get("temperature") == 0:
        return GREEDY
    penalty = config.get("repetition_penalty", 1)
    is_shaped = config.get("min_p") or penalty != 1 or config.get("stop")
    return SHAPED if is_shaped else ""


def cards(rows: list[Headline]) -> list[Headline]:
    """Returns the rows that are shown large, in their order."""
    has_gold = any(row.name.startswith("gold") for row in rows)
    wanted = CARDS if has_gold else CARDS_OF_PROXY
    return [row for row in rows if row.name in wanted and row.policy]


def rewards_note(run: Run) -> str:
    """Returns what the win rates of the last comparison are by, in words."""
    metrics = run.comparisons[-1].last if run.comparisons else {}
    if "gold_win_rate" in metrics or "gold_policy" in metrics:
        return (
            "The gold reward is the labeler's own. The proxy reward is the reward model "
            "that the policy was optimized against."
        )
    if "proxy_policy" in metrics:
        return (
            "No gold reward was given: the win rate is by the proxy reward, the one that the "
            "policy was optimized against, and overstates how much better the responses are."
        )
    return (
        "Neither a gold nor a proxy reward was given, so there is no win rate: "
        "read the samples."
    )


def _base(name: str) -> str:
    """Returns the name of a metric without its model."""
    if _ends_interval(name):
        return name
    for role in names.ROLES:
        name = name.removesuffix(f"_{role}")
    return name


def _ends_interval(name: str) -> bool:
    return name.endswith(("_low", "_high"))


def _ends(name: str, method: str) -> tuple[str, str]:
    prefix = f"{name}_{method}" if method else name
    return f"{prefix}_low", f"{prefix}_high"


def _headline(name: str, stage: Stage, models: Mapping[str, str]) -> Headline:
    metrics = stage.last
    percent = name in PERCENT
    baseline = metrics.get(f"{name}_baseline")
    policy = metrics.get(f"{name}_policy", metrics.get(name))
    note = _intervals(name, metrics, models)
    if not note and name.startswith("distinct") and baseline and policy is not None:
        whose = names.possessive(models["baseline"])
        note = f"{policy / baseline:.0%} of {whose}"
    return Headline(
        name=name,
        label=LABELS.get(name, name),
        baseline="" if baseline is None else number(baseline, percent),
        policy="" if policy is None else number(policy, percent),
        note=note,
        unit=unit(name, stage.kind),
        hint=meanings.hint(name, stage.kind),
    )


def unit(name: str, kind: str = "") -> str:
    """Returns the unit of a metric; "" if it is not known."""
    meaning = meanings.find(name, kind)
    if meaning is None:
        return ""
    return meaning.unit.removeprefix("share ") if name in PERCENT else meaning.unit


def _intervals(
    name: str, metrics: Mapping[str, float], models: Mapping[str, str]
) -> str:
    """Returns `Wilson 95 %: LOW to HIGH`, or `BCa 95 %: SFT LOW to HIGH, PPO LOW to HIGH`."""
    if single := _interval(name, metrics, name in PERCENT):
        return _named_interval(*single)
    found: dict[str, list[str]] = {}
    for role in names.ROLES:
        if interval := _interval(f"{name}_{role}", metrics, name in PERCENT):
            method, ends = interval
            found.setdefault(method, []).append(f"{models[role]} {ends}")
    return "; ".join(
        _named_interval(method, ", ".join(ends)) for method, ends in found.items()
    )


def _named_interval(label: str, ends: str) -> str:
    return f"{label} 95 %: {ends}"


def _interval(
    name: str, metrics: Mapping[str, float], percent: bool
) -> tuple[str, str] | None:
    """Returns the method and `LOW to HIGH`; None if the metric has no interval."""
    for method, label in INTERVALS.items():
        low, high = _ends(name, method)
        if low in metrics and high in metrics:
            ends = [number(metrics[end], percent) for end in (low, high)]
            return label, " to ".join(ends)
    return None


@dataclasses.dataclass(frozen=True)
class TaxRow:
    """A row of the table of losses on held-out text."""

    label: str
    unit: str
    values: dict[str, str]  # by role
    change: str  # policy minus baseline
    hint: str


def tax_rows(run: Run) -> list[TaxRow]:
    """Returns the losses of the last comparison's models on held-out text; [] if not measured."""
    rows = []
    for name, label in TAX.items() if run.comparisons else ():
        metrics, kind = run.comparisons[-1].last, run.comparisons[-1].kind
        measured = {
            role: metrics[f"{name}_{role}"]
            for role in ("pretrained", "baseline", "policy")
            if f"{name}_{role}" in metrics
        }
        if not {"baseline", "policy"} <= measured.keys():
            continue
        change = measured["policy"] - measured["baseline"]
        row = TaxRow(
            label=label,
            unit=unit(name, kind),
            values={role: number(value) for role, value in measured.items()},
            change=f"{'+' if change >= 0 else ''}{number(change)}",
            hint=meanings.hint(name, kind),
        )
        rows.append(row)
    return rows


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
    metrics = [
        f"{name} {value} {unit}".rstrip() for name, value, unit, _ in last_values(stage)
    ]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": stage.status,
        "steps": steps,
        "time": "" if stage.seconds is None else duration(stage.seconds),
        "speed": speeds[0] if speeds else "",
        "metrics": ", ".join(metrics),
    }


def last_values(stage: Stage) -> list[tuple[str, str, str, str]]:
    """Returns name, value, unit and meaning of the metrics that best tell how a stage went.

    Shares and other pure numbers have no unit here.
    """
    return [
        (
            name,
            number(stage.last[name]),
            _short_unit(name, stage.kind),
            meanings.hint(name, stage.kind),
        )
        for name in telling(stage)
    ]


def _short_unit(name: str, kind: str) -> str:
    text = unit(name, kind)
    pure = ("share", "of ", "norm", "ratio", "kappa", "loss")
    is_pure = text.startswith(pure)
    # The name says it: words_policy, nats_per_byte.
    is_named = text.partition(" ")[0] in name
    return "" if is_pure or is_named else text.replace(" per ", "/")


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
    others = [name for name in sorted(stage.last) if not name.startswith("data_")]
    return known[:most] or others[:most]
