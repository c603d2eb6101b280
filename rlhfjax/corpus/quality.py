"""Quality of a document: how much it looks like a reference corpus, as GPT-3's data was filtered.

A logistic regression on hashed counts of words is trained to tell documents of the reference from
raw ones. With its probability s that a document is of the reference, the document is kept if

    X > 1 - s,   X ~ Pareto(alpha) as numpy has it (Lomax):   P(kept) = (2 - s)^-alpha

so that documents unlike the reference are kept too, but rarely: with alpha = 9, 0.2 % of those with
s = 0 and all of those with s = 1. X is drawn by a hash of the document and the seed.

Source: Brown et al. 2020 (GPT-3), appendix A: Spark's tokenizer (words in lower case, separated by
blanks) and HashingTF (2^18 features by default); alpha = 9. The regularization and the number of
documents are unpublished; C = 1 and equal weights of both classes are ours.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

FEATURES = 2**18
HELD_OUT = 10  # every tenth document measures the classifier
_ITERATIONS = 1000  # of L-BFGS, at most


class Classifier(NamedTuple):
    """A trained classifier."""

    weights: np.ndarray  # float64 [FEATURES]
    intercept: float
    auc: float  # on held-out documents


def train(reference: Sequence[str], raw: Sequence[str]) -> Classifier:
    """Returns a classifier that tells reference documents from raw ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    features = _vectorizer().transform([*reference, *raw])
    labels = np.repeat([1, 0], [len(reference), len(raw)])
    order = np.concatenate([np.arange(len(reference)), np.arange(len(raw))])
    is_held_out = order % HELD_OUT == HELD_OUT - 1
    model = LogisticRegression(class_weight="balanced", max_iter=_ITERATIONS)
    model.fit(features[~is_held_out], labels[~is_held_out])
    scores = model.decision_function(features[is_held_out])
    auc = roc_auc_score(labels[is_held_out], scores)
    return Classifier(
        weights=model.coef_[0],
        intercept=float(np.ravel(model.intercept_)[0]),
        auc=float(auc),
    )


def score(classifier: Classifier, text: str) -> float:
    """Returns the probability that a document is of the reference."""
    features = _vectorizer().transform([text])
    logit = float((features @ classifier.weights)[0]) + classifier.intercept
    return float(scipy.special.expit(logit))


def is_kept(text: str, probability: float, alpha: float, seed: int) -> bool:
    """Returns whether a document of this score is kept."""
    return lomax(text, alpha, seed) > 1 - probability


def lomax(text: str, alpha: float, seed: int) -> float:
    """Returns a draw of numpy's Pareto distribution, by a hash of the text and the seed.

    P(X > x) = (1 + x)^-alpha for x >= 0.
    """
    key = f"{seed}\0{text}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    uniform = ((number >> 11) + 0.5) / 2**53  # strictly between 0 and 1
    return uniform ** (-1 / alpha) - 1


def spread(count: int, most: int) -> Iterator[int]:
    """Yields at most `most` of `count` indices, evenly spread and in order."""
    chosen = min(count, most)
    for i in range(chosen):
        yield i * count // chosen


@functools.cache
def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    counts: Any = {"alternate_sign": False, "norm": None}
    return HashingVectorizer(n_features=FEATURES, token_pattern=r"\S+", **counts)
