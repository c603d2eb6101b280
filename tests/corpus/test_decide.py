"""What is decided by all rows together, on rows that are written down."""

import numpy as np

from rlhfjax.corpus.decide import decide
from rlhfjax.corpus.measure import Signatures, Tools, concatenated, measure, write
from rlhfjax.corpus.options import (
    REMOVED_BY,
    EvaluationConfig,
    Filters,
    LanguageConfig,
    NearConfig,
    QualityConfig,
    RepeatedPromptConfig,
)
from rlhfjax.corpus.rows import Item


def filters(**changes):
    options = {
        "language": LanguageConfig(),
        "quality": QualityConfig(),
        "exact": False,
        "near": NearConfig(),
        "prompts": RepeatedPromptConfig(),
        "evaluation": EvaluationConfig(),
        "seed": 0,
    }
    return Filters(**(options | changes))


def items(*texts, users=None):
    users = users or [""] * len(texts)
    pairs = zip(texts, users, strict=True)
    return [Item(text=t, identity=t, prompt=t, user=user) for t, user in pairs]


def decided(own, rows, table=()):
    tools = Tools(own, None, np.sort(np.array(table, np.uint64)))
    halves = [measure(tools, part) for part in (rows[:2], rows[2:])]
    signatures = np.concatenate([half["signature"] for half in halves])
    measured = concatenated(halves, own.near.threshold)
    return decide(measured, own, signatures.__getitem__)


def names(decision):
    return [REMOVED_BY[number] for number in decision.removed]


def test_equal_rows_after_the_first_are_removed():
    decision = decided(filters(exact=True), items("a", "b", "a", "B", "a"))
    assert names(decision) == ["", "", "exact", "", "exact"]
    assert decision.like.tolist() == [-1, -1, 0, -1, 0]


def test_signatures_are_read_from_the_parts_that_have_them(tmp_path):
    tools = Tools(filters(near=NearConfig(threshold=0.5)), None, np.zeros(0, np.uint64))
    rows = items(*(f"w{i} w{i + 1}" for i in range(7)))
    parts = [measure(tools, part) for part in (rows[:2], rows[2:5], rows[5:])]
    files = [tmp_path / f"{i}.npz" for i in range(3)]
    for file, part in zip(files, parts, strict=True):
        write(file, part)
    every = np.concatenate([part["signature"] for part in parts])
    signatures = Signatures(files, [2, 5, 7])
    for chosen in ([], [0], [2, 4], [1, 2, 6], range(7)):
        chosen = np.array(chosen, np.int64)
        np.testing.assert_array_equal(signatures(chosen), every[chosen])
    files[1].unlink()
    assert len(signatures(np.array([1, 5]))) == 2


def test_prompts_that_begin_alike_are_one():
    """Five characters: a prompt of fewer repeats only an equal one."""
    own = filters(prompts=RepeatedPromptConfig(prefix=5))
    rows = items("Write a poem", "Write", "Writ", "Write two", "Writ", "write a")
    assert names(decided(own, rows)) == ["", "prefix", "", "prefix", "prefix", ""]
    assert decided(own, rows).like.tolist() == [-1, 0, -1, 0, 2, -1]


def test_a_user_has_the_first_prompts_up_to_the_limit():
    own = filters(prompts=RepeatedPromptConfig(per_user=2))
    rows = items("1", "2", "3", "4", "5", "6", users=["x", "y", "x", "x", "y", "x"])
    assert names(decided(own, rows)) == ["", "", "", "user", "", "user"]


def test_rows_that_another_filter_removed_neither_count_nor_repeat():
    own = filters(exact=True, prompts=RepeatedPromptConfig(per_user=2))
    rows = items("1", "1", "2", "3", users=["x", "x", "x", "x"])
    assert names(decided(own, rows)) == ["", "exact", "", "user"]


def test_ngrams_that_many_documents_have_are_ignored():
    """abc is in three documents, bcd in two: with common = 2, abc is a phrase."""
    from rlhfjax.corpus.evaluation import table_of

    own = filters(evaluation=EvaluationConfig(ngram=3, common=2))
    table = table_of(["a b c d"], 3)
    rows = items("a b c d", "a b c", "x y", "a b c d e")
    decision = decided(own, rows, table)
    (bcd,) = table_of(["b c d"], 3)
    assert decision.ignored == 1
    found = [table[decision.hits_of(row)].tolist() for row in range(4)]
    assert found == [[bcd], [], [], [bcd]]
    assert names(decision) == [""] * 4


def test_removed_rows_do_not_make_an_ngram_common():
    from rlhfjax.corpus.evaluation import table_of

    own = filters(exact=True, evaluation=EvaluationConfig(ngram=3, common=1))
    table = table_of(["a b c"], 3)
    decision = decided(own, items("a b c", "a b c", "a b c"), table)
    assert decision.ignored == 0
    assert [len(decision.hits_of(row)) for row in range(3)] == [1, 0, 0]


def test_a_near_duplicate_repeats_a_row_that_is_left():
    own = filters(exact=True, near=NearConfig(threshold=0.5, ngram=1))
    text = "one two three four five six seven eight nine"
    rows = items(text, text, f"{text} ten", "something else entirely")
    decision = decided(own, rows)
    assert names(decision) == ["", "exact", "near", ""]
    assert decision.like.tolist() == [-1, 0, 0, -1]
