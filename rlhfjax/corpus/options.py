"""Options of the filters that prepare a corpus."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Interval

from rlhfjax.data.config import SourceConfig
from rlhfjax.ranges import (
    WIDEST,
    Count,
    Positive,
    PositiveCount,
    Several,
    Share,
)

# More permutations than datasketch's hashes can tell apart make no better estimate.
Permutations = Annotated[int, Interval(ge=2, le=4096)]
Words = Annotated[int, Interval(ge=1, le=WIDEST)]


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Which languages are kept."""

    keep: tuple[str, ...] = ()
    """ISO 639 codes such as "en"; empty is off."""
    probability: Share = 0.5
    """Least probability of the language (CCNet: 0.5)."""


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """A classifier of documents that are like a reference corpus (GPT-3, appendix A)."""

    reference: tuple[SourceConfig, ...] = ()
    """Documents of the quality that is wanted; empty is off."""
    alpha: Positive = 9.0
    """Keep if Pareto(alpha) > 1 - score (GPT-3: 9); larger keeps fewer."""
    documents: Several = 20_000
    """Documents of the reference, and of the sources, to train on at most."""


@dataclasses.dataclass(frozen=True)
class NearConfig:
    """Near-duplicates by MinHash; see `corpus.near`."""

    threshold: Share = 0.0
    """Jaccard similarity from which a document repeats an earlier one, such as 0.8; 0 is off."""
    ngram: Words = 5
    """Words of an n-gram (Lee et al. 2022: 5)."""
    permutations: Permutations = 128
    """Numbers per signature, 4 bytes each (GPT-3: 10 hashes)."""


@dataclasses.dataclass(frozen=True)
class RepeatedPromptConfig:
    """Repeated prompts, and prompts of one user (InstructGPT, section 3.2 and appendix A.3)."""

    prefix: Count = 0
    """Characters from which a common beginning makes two prompts one; 0 is off."""
    per_user: Count = 0
    """Most prompts per user (InstructGPT: 200); 0 is off. Needs a column `user`."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Removal of evaluation text (GPT-3, appendix C); see `corpus.evaluation`."""

    sources: tuple[SourceConfig, ...] = ()
    """Evaluation text; empty is off."""
    ngram: Words = 13
    """Words of an n-gram that both texts have."""
    common: PositiveCount = 10
    """An n-gram that more documents have is ignored."""
    remove: Literal["window", "row"] = "window"
    """Cut the n-gram and its surroundings out of a text, or remove the row, as in other kinds."""
    window: PositiveCount = 200
    """Characters on both sides that are cut out, and the shortest piece that is kept."""
    most_pieces: PositiveCount = 10
    """A document that falls into more pieces is removed."""


@dataclasses.dataclass(frozen=True)
class Filters:
    """All filters, in their order."""

    language: LanguageConfig
    quality: QualityConfig
    exact: bool
    near: NearConfig
    prompts: RepeatedPromptConfig
    evaluation: EvaluationConfig
    seed: int


# What removed a row; 0 is a row that is left.
REMOVED_BY = (
    "",
    "language",
    "quality",
    "exact",
    "near",
    "prefix",
    "user",
    "evaluation",
)
MEANINGS: dict[str, str] = {
    "language": "another language, or an improbable one",
    "quality": "unlike the reference",
    "exact": "equal to an earlier row",
    "near": "nearly equal to an earlier row",
    "prefix": "begins as an earlier prompt",
    "user": "more prompts of one user than the limit",
    "evaluation": "has evaluation text",
}
