"""MinHash against the Jaccard similarity of all pairs, and against datasketch's own index."""

import itertools
import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from rlhfjax.corpus import near
from rlhfjax.corpus.words import words

NGRAM, PERMUTATIONS, THRESHOLD = 3, 256, 0.6


def shingles(text):
    tokens = words(text)
    size = min(NGRAM, len(tokens))
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


@pytest.fixture(scope="module")
def texts():
    """Documents of random words, and copies of them with more and more words replaced."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(500)]
    found = []
    for _ in range(12):
        document = rng.choices(vocabulary, k=120)
        for replaced in (0, 1, 2, 3, 25, 60):
            copy = list(document)
            for place in rng.sample(range(120), replaced):
                copy[place] = rng.choice(vocabulary)
            found.append(" ".join(copy))
    rng.shuffle(found)
    return found


@pytest.fixture(scope="module")
def signatures(texts):
    return np.array([near.signature(text, NGRAM, PERMUTATIONS) for text in texts])


def repeats(signatures, threshold=THRESHOLD):
    bands = near.bands_of(signatures, threshold)
    return near.duplicates_of(bands, signatures.__getitem__, threshold)


def test_equal_numbers_estimate_the_jaccard_similarity(texts, signatures):
    """Within 4.5 standard deviations, sqrt(J (1 - J) / 256), for all 2,556 pairs."""
    for i, j in itertools.combinations(range(len(texts)), 2):
        true = jaccard(texts[i], texts[j])
        estimate = (signatures[i] == signatures[j]).mean()
        spread = np.sqrt(true * (1 - true) / PERMUTATIONS)
        assert abs(estimate - true) <= 4.5 * spread + 1e-9, (true, estimate)


def brute_force(texts):
    """The documents that repeat an earlier one that is kept, by all pairs' true similarities."""
    kept, repeats = [], []
    for i, text in enumerate(texts):
        similar = [j for j in kept if jaccard(text, texts[j]) >= THRESHOLD]
        repeats.append(min(similar, default=-1))
        if not similar:
            kept.append(i)
    return repeats


def test_duplicates_are_those_of_all_pairs_compared(texts, signatures):
    """No similarity of the set is within 0.06, two standard deviations, of the threshold."""
    pairs = itertools.combinations(texts, 2)
    assert all(abs(jaccard(a, b) - THRESHOLD) > 0.06 for a, b in pairs)
    expected = brute_force(texts)
    assert repeats(signatures).of.tolist() == expected
    assert 12 < sum(j >= 0 for j in expected) < 60


def test_candidates_are_those_of_datasketchs_index(texts, signatures):
    """Documents share a bucket exactly if datasketch's index finds one from the other."""
    bands, width = near.banding(THRESHOLD, PERMUTATIONS)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(bands, width))
    hashes = [
        MinHash(hashvalues=row, hashfunc=int, scheme="affine32") for row in signatures
    ]
    for i, minhash in enumerate(hashes):
        index.insert(i, minhash)
    documents, found = near._shared_buckets(near.bands_of(signatures, THRESHOLD))
    buckets = np.full((len(texts), bands), -1)
    buckets[documents] = found
    for i, minhash in enumerate(hashes):
        shared = (buckets == buckets[i]) & (buckets[i] >= 0)
        ours = set(np.flatnonzero(shared.any(axis=1)).tolist()) | {i}
        assert ours == set(index.query(minhash))


def test_the_first_in_source_order_stays(signatures):
    """A copy comes after its document, wherever others stand."""
    twice = np.concatenate([signatures[:6], signatures[:6]])
    found = repeats(twice)
    first = found.of[:6]
    assert np.array_equal(found.of[6:], np.where(first >= 0, first, np.arange(6)))
    assert (found.similarity[6:] >= THRESHOLD).all() and 1 in found.similarity


def test_texts_without_words_repeat_nothing_and_short_ones_are_one_ngram():
    rows = [near.signature(text, 5, 16) for text in ("!", "?", "ab", "Ab!", "cd")]
    assert repeats(np.array(rows), 0.8).of.tolist() == [-1, -1, -1, 2, -1]


def test_a_document_longer_than_a_batch_has_the_minimum_of_all_its_ngrams(monkeypatch):
    text = " ".join(f"w{i}" for i in range(50))
    whole = near.signature(text, 2, 16)
    monkeypatch.setattr(near, "_BATCH", 7)
    assert np.array_equal(near.signature(text, 2, 16), whole)
