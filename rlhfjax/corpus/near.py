"""Near-duplicates by MinHash and locality-sensitive hashing.

The share of equal numbers in the signatures of two documents estimates the Jaccard similarity J of
their sets of word n-grams, with a standard deviation of sqrt(J (1 - J) / permutations). Signatures
are cut into bands; documents that share a band are compared. In source order, a document is removed
if an earlier one that was kept is at least as similar as the threshold.

datasketch computes signatures and chooses the bands. Its index holds Python objects, kilobytes per
document; the one here holds a number per band, and the signatures of documents that share one.

Source: Broder 1997; Brown et al. 2020 (GPT-3), appendix A (Spark's MinHashLSH with 10 hashes; its
threshold is unpublished); Lee et al. 2022, "Deduplicating training data makes language models
better", section 4.2 (5-grams of words, threshold 0.8).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.corpus.words import MULTIPLIER, ngram_hashes, words

Signatures = Callable[[np.ndarray], np.ndarray]
"""Takes indices of documents, int [d], and returns their signatures, uint32 [d, permutations]."""
_SEED = 1  # of the permutations
_BATCH = 4096  # n-grams that are permuted at a time
# Candidates are compared by their signatures, so that a false one only costs time.
_WEIGHTS = (0.1, 0.9)  # of false candidates and of missed ones


def signature(text: str, ngram: int, permutations: int) -> np.ndarray:
    """Returns the MinHash signature of a document, uint32 [permutations].

    A document of fewer than `ngram` words is one n-gram; one without words has a signature of
    zeros, which `duplicates_of` compares with nothing.
    """
    tokens = words(text)
    if not tokens:
        return np.zeros(permutations, np.uint32)
    hashes = ngram_hashes(tokens, min(ngram, len(tokens)))
    shingles = np.unique(hashes >> np.uint64(32)).tolist()
    minhash = _minhash(permutations)
    minhash.clear()
    for start in range(0, len(shingles), _BATCH):
        minhash.update_batch(shingles[start : start + _BATCH])
    return np.array(minhash.hashvalues, np.uint32)


@functools.cache
def _minhash(permutations: int) -> Any:
    from datasketch import MinHash

    # Hashes of 32 bits are permuted as they are.
    return MinHash(permutations, seed=_SEED, hashfunc=int, scheme="affine32")


def bands_of(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Returns a hash of each band of some signatures, uint64 [n, bands].

    Without words it is 0 in every band. Candidates are compared by their signatures, so that equal
    hashes of different bands only cost time.

    Args:
      signatures: uint32 [n, permutations].
    """
    n, permutations = signatures.shape
    bands, width = banding(threshold, permutations)
    parts = signatures[:, : bands * width].reshape(n, bands, width)
    hashes = np.zeros((n, bands), np.uint64)
    for i in range(width):
        hashes = hashes * MULTIPLIER + parts[:, :, i]
    return hashes


class Repeats(NamedTuple):
    """Which of n documents repeat an earlier one."""

    of: np.ndarray  # int64 [n], the earlier one; -1: none
    similarity: np.ndarray  # float32 [n], estimated, with that one; NaN: none


def duplicates_of(
    bands: np.ndarray, signatures: Signatures, threshold: float
) -> Repeats:
    """Returns, for each document, the earlier one that it repeats.

    Args:
      bands: see `bands_of`, in source order.
      signatures: takes indices of documents and returns their signatures.
      threshold: Jaccard similarity from which documents are duplicates, estimated by signatures.
    """
    repeats = Repeats(
        of=np.full(len(bands), -1, np.int64),
        similarity=np.full(len(bands), np.nan, np.float32),
    )
    documents, buckets = _shared_buckets(bands)
    own = signatures(documents)
    kept: dict[int, list[int]] = {}  # documents in each bucket, those that were kept
    for i in range(len(documents)):
        mine = [bucket for bucket in buckets[i].tolist() if bucket >= 0]
        candidates = sorted({j for bucket in mine for j in kept.get(bucket, ())})
        if candidates:
            similarity = (own[candidates] == own[i]).mean(axis=1)
            similar = np.flatnonzero(similarity >= threshold)
            if len(similar):
                repeats.of[documents[i]] = documents[candidates[similar[0]]]
                repeats.similarity[documents[i]] = similarity[similar[0]]
                continue
        for bucket in mine:
            kept.setdefault(bucket, []).append(i)
    return repeats


def _shared_buckets(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents that share a band, and their buckets.

    Returns:
      int64 [d], and int64 [d, bands]: the bucket of each in each band, -1 if it is alone.
    """
    is_shared = np.zeros(len(bands), bool)
    for band in bands.T:
        is_shared |= _in_company(band)[0]
    documents = np.flatnonzero(is_shared)
    n_bands = bands.shape[1]
    buckets = np.full((len(documents), n_bands), -1, np.int64)
    for i, band in enumerate(bands[documents].T):
        shared, number = _in_company(band)
        buckets[shared, i] = number[shared] * n_bands + i
    return documents, buckets


def _in_company(band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which documents share their hash with another one, and the hashes' numbers: [n]."""
    _, number, count = np.unique(band, return_inverse=True, return_counts=True)
    return (count[number] > 1) & (band > 0), number


@functools.cache
def banding(threshold: float, permutations: int) -> tuple[int, int]:
    """Returns the number of bands and the rows of each, as datasketch chooses them."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold, permutations, weights=_WEIGHTS)
    return index.b, index.r
