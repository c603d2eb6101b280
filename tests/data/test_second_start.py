"""A second start reads two rows of an index: the first for the form, a refused one to say why."""

import hashlib
import json

import numpy as np
import pytest

from rlhfjax.data import loader, mismatched, verdicts
from rlhfjax.data.accepted import accepted, refusals, validate_prompt
from rlhfjax.data.config import SourceConfig
from rlhfjax.data.mixture import Mixed, mixed_like
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import Concatenated, Rows
from rlhfjax.data.unpaired import AsPreferences
from rlhfjax.stages import direct
from tests.data.test_templates import CUE, TURN, make

REFUSAL = "{% if 'bad' in m.content %}{{ raise_exception('no bad') }}{% endif %}"
SEED = 1
USERS = (3, 1, 2, 0, 4, 1)  # user turns of each conversation


@pytest.fixture(scope="module")
def strict():
    """A tokenizer whose template refuses a word; it has to see every row once."""
    loop = "{% for m in messages %}" + REFUSAL + TURN + "{% endfor %}" + CUE
    return make("chatml", loop)


def talk(number: int, users: int) -> dict:
    turns = [{"role": "system", "content": f"s {number}"}]
    for i in range(users):
        word = "bad" if (number, i) == (4, 2) else "q"
        turns.append({"role": "user", "content": f"{word} {number} {i}"})
        turns.append({"role": "assistant", "content": "a"})
    return {"messages": turns}


def ranking(number: int) -> dict:
    prompt = f"{'bad' if number == 2 else 'q'} {number % 4}"
    completions = ["a", "b", "c"][: 2 + number % 2]
    return {
        "prompt": prompt,
        "completions": completions,
        "scores": [*range(len(completions))],
    }


def judged(number: int) -> dict:
    prompt = f"{'bad' if number == 2 else 'q'} {number}"
    return {"prompt": prompt, "completion": "a", "label": bool(number % 2)}


@pytest.fixture
def spec(tmp_path, cache):
    """Writes rows into a file; returns the options of a source of it."""

    def write(rows, **options) -> SourceConfig:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"split": "all", "on_bad_row": "skip", **options}
        return SourceConfig(spec=f"jsonl:{file}", **options)

    return write


def prompts_of(users, per_conversation, seed):
    """Returns (row, user turn) of every prompt, by a plain loop."""
    chosen = []
    for row, count in enumerate(users):
        turns = list(range(count))
        key = {
            i: hashlib.sha256(f"{seed}/{row}/{2 * i + 2}".encode()).digest()
            for i in turns
        }
        turns.sort(key=key.__getitem__)
        chosen += [(row, i) for i in sorted(turns[:per_conversation])]
    return chosen


@pytest.mark.parametrize("per_conversation", [1, 2, None])
def test_prompts_of_conversations(spec, strict, reads, per_conversation):
    config = spec(map(talk, range(len(USERS)), USERS), kind="messages")

    def start():
        source = Prompts(config.open(), per_conversation=per_conversation, seed=SEED)
        return source, accepted(source, strict, validate_prompt)

    every, left = start()
    chosen = prompts_of(USERS, per_conversation, SEED)
    assert [
        every[i]["messages"][-1]["content"].split()[1:] for i in range(len(every))
    ] == [[str(row), str(turn)] for row, turn in chosen]
    is_bad = ["bad" in str(every[i]["messages"]) for i in range(len(every))]
    assert len(left) == len(every) - sum(is_bad) and left.skipped == sum(is_bad)
    assert every.locate(0).endswith(f":1, first {len(every[0]['messages'])} turns")
    with pytest.raises(IndexError):
        every[len(every)]
    reads.clear()
    again, left_again = start()
    assert set(reads) <= {0, 4}
    assert len(again) == len(every) and len(left_again) == len(left)
    assert left_again[len(left) - 1] == left[len(left) - 1]


def test_prompts_of_several_sources_are_told_apart(spec, strict):
    config = spec(map(talk, range(len(USERS)), USERS), kind="messages")
    both = Concatenated([config.open(), config.open()])
    prompts = Prompts(both, seed=SEED)
    chosen = prompts_of(USERS * 2, 1, SEED)
    found = [prompts[i]["messages"][-1]["content"] for i in range(len(prompts))]
    assert [text.split()[1:] for text in found] == [
        [str(row % len(USERS)), str(turn)] for row, turn in chosen
    ]
    is_bad = ["bad" in str(prompts[i]) for i in range(len(prompts))]
    assert sum(is_bad) == 1  # the two prompts of that conversation differ
    assert refusals(prompts, strict, validate_prompt).tolist() == is_bad


def kto():
    return direct.Config(
        init_from="x",
        preferences=("x",),
        length=64,
        batch_size=2,
        steps=1,
        loss=direct.LossConfig(name="kto"),
    )


@pytest.mark.parametrize("kind", ["preferences", "unpaired"])
def test_rankings_and_their_mismatched_prompts(spec, strict, reads, kind):
    config = spec(
        map(ranking if kind == "preferences" else judged, range(8)), kind=kind
    )

    def start():
        source = config.open()
        source = AsPreferences(source) if kind == "unpaired" else source
        mixed = Mixed([source, source], [1.0, 2.0])
        return [direct.direct_batches(kto(), strict, one) for one in (source, mixed)]

    first = [next(batches) for batches in start()]
    reads.clear()
    again = start()
    assert set(reads) == {0, 2}
    for batch, batches in zip(first, again, strict=True):
        other = next(batches)
        np.testing.assert_array_equal(other.mismatched.tokens, batch.mismatched.tokens)


def test_rows_of_a_limit(spec, strict, reads):
    config = spec(map(ranking, range(8)), kind="preferences", limit=5)
    options = {"batch_size": 2, "length": 32}
    loader.preference_batches(config.open(), strict, **options)
    reads.clear()
    batches = loader.preference_batches(config.open(), strict, **options)
    assert set(reads) == {0, 2} and batches.skipped == 1


def test_parts_of_a_mixture_have_the_numbers_of_their_rows():
    rows = [ranking(number) for number in range(8)]
    parts = Mixed(
        [Rows(rows[:3], "preferences"), Rows(rows[3:], "preferences")], [1.0, 1.0]
    )
    whole = mixed_like(parts, Rows(rows, "preferences"))
    counts = verdicts.per_row(whole, "completions", np.int32, loader.completions)
    assert counts.tolist() == [2, 3] * 4
    chosen = np.array([1, 1, 2, 4, 7])

    def measure(k, row):
        return 10 * k + len(row["completions"])

    some = verdicts.of_chosen(whole, chosen, "place", np.int32, measure)
    assert some.tolist() == [3, 13, 22, 32, 43]


def test_donors_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for size in range(2, 60):
        keys = rng.integers(0, max(2, size // 3), size).astype(np.uint64)
        keys[:2] = 0, 1
        groups: dict[int, list[int]] = {}
        for row, key in enumerate(keys.tolist()):
            groups.setdefault(key, []).append(row)
        lists = list(groups.values())
        expected = [0] * size
        for number, rows in enumerate(lists):
            others = lists[(number + len(lists) // 2) % len(lists)]
            for i, row in enumerate(rows):
                expected[row] = others[i % len(others)]
        assert mismatched._donors(keys).tolist() == expected
