"""How far labelers agree with each other and with known rankings, and what each has done.

The measures are those of `rewards.agreement`: a tie against a preference counts 1/2, and Fleiss'
kappa is over pairs of responses that at least two labelers ranked.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np

from rlhfjax.labeling.store import Label
from rlhfjax.labeling.tables import CALIBRATION, SCREENING, SUBMIT, WORK
from rlhfjax.labeling.tasks import RANKED
from rlhfjax.rewards.agreement import agreement_of, opinions, pair_agreement

Pair = tuple[str, int]
"""An item, and the number of one of its pairs i < j of responses."""


def opinions_of(label: Label) -> dict[Pair, float]:
    """Returns a label's opinion of every pair of responses: +1, 0 or -1; {} of other tasks."""
    if label.task not in RANKED or label.action != SUBMIT:
        return {}
    return _by_pair(label.item, label.value["ranks"])


def known_opinions(label: Label) -> dict[Pair, float]:
    """Returns the opinions that are known to be right about a label's item."""
    if label.known is None:
        return {}
    return _by_pair(label.item, label.known["ranks"])


def _by_pair(item: str, ranks: Sequence[int]) -> dict[Pair, float]:
    scores = -np.array([ranks], np.float64)
    signs = opinions(scores).tolist()
    return {(item, pair): sign for pair, sign in enumerate(signs)}


def with_known(labels: Iterable[Label]) -> tuple[float, float]:
    """Returns (agreements, pairs) of labels with the rankings that are known to be right.

    An item that was skipped counts as a disagreement about each of its pairs.
    """
    agreements = pairs = 0.0
    for label in labels:
        known = known_opinions(label)
        own = opinions_of(label)
        pairs += len(known)
        judged = [pair for pair in known if pair in own]
        first, second = ([table[pair] for pair in judged] for table in (known, own))
        agreements += pair_agreement(np.array(first), np.array(second))[0]
    return agreements, pairs


def between(labels: Iterable[Label]) -> dict[str, float]:
    """Returns the agreement of labelers with each other, as `rewards.agreement.agreement_of`."""
    table = _by_labeler(labels)
    if len(table) < 2:
        return {}
    judged = sorted({pair for own in table.values() for pair in own})
    rows = [
        np.array([own.get(pair, np.nan) for pair in judged]) for own in table.values()
    ]
    return agreement_of(rows) if judged else {}


def with_others(labels: Sequence[Label], who: str) -> tuple[float, float]:
    """Returns (agreements, pairs) of one labeler with each of the others."""
    table = _by_labeler(labels)
    own = table.pop(who, {})
    agreements = pairs = 0.0
    for other in table.values():
        both = sorted(own.keys() & other.keys())
        first, second = ([one[pair] for pair in both] for one in (own, other))
        counted, weight = pair_agreement(np.array(first), np.array(second))
        agreements += counted
        pairs += weight
    return agreements, pairs


def _by_labeler(labels: Iterable[Label]) -> dict[str, dict[Pair, float]]:
    """Returns the opinions of every labeler who has one."""
    table: dict[str, dict[Pair, float]] = defaultdict(dict)
    for label in labels:
        if own := opinions_of(label):
            table[label.who] |= own
    return dict(table)


def summary(labels: Sequence[Label], who: str) -> dict[str, Any]:
    """Returns what one labeler has done; a share is null where there is nothing to compare.

    Returns:
      labels, skipped: of work; seconds: the median per label, and hours: their sum; with_others,
      calibration, screening: shares of pairs of responses; pairs: number behind each share.
    """
    own = [label for label in labels if label.who == who]
    work = [label for label in own if label.kind == WORK]
    submitted = [label for label in work if label.action == SUBMIT]
    seconds = [label.seconds for label in submitted]
    compared = {
        "with_others": with_others([x for x in labels if x.kind == WORK], who),
        "calibration": with_known(x for x in own if x.kind == CALIBRATION),
        "screening": with_known(x for x in own if x.kind == SCREENING),
    }
    return {
        "labels": len(submitted),
        "skipped": len(work) - len(submitted),
        "seconds": median(seconds) if seconds else None,
        "hours": sum(seconds) / 3600,
        **{name: share(*counts) for name, counts in compared.items()},
        "pairs": {name: pairs for name, (_, pairs) in compared.items()},
    }


def share(agreements: float, pairs: float) -> float | None:
    """Returns the share of agreements, None without pairs."""
    return agreements / pairs if pairs else None
