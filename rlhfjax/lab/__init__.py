"""The laboratory: studies, whose pass rule is written before they run.

An experiment file declares a study beside its sweep (docs/studies.md):

    STUDY = Study(claim=…, conditions=…, seeds=5, primary=(Comparison(…),), …)
"""

from rlhfjax.lab.card import Comparison, Figure, Shape, Study
from rlhfjax.lab.outcomes import Across, Outcome, fall_from, fall_from_peak

__all__ = [
    "Across",
    "Comparison",
    "Figure",
    "Outcome",
    "Shape",
    "Study",
    "fall_from",
    "fall_from_peak",
]
