"""The rows that are written, read by the stages that train on them."""

import json

import jax
import numpy as np
import pytest

from rlhfjax import paths
from rlhfjax.data.config import SourceConfig
from rlhfjax.data.preferences import read_preferences, write_preferences
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.labeling import export, preferences, sources
from rlhfjax.labeling.store import Item
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.rankings import read_rankings
from rlhfjax.stages import import_rankings, tamer
from tests.labeling.label_world import compare, label, new_store, rank, skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(finished):
    return load_tokenizer(str(finished / "00_tokenizer"))


def test_rankings_with_ratings_and_a_column_per_flag(tmp_path, finished):
    store = new_store(tmp_path, "ann", "bob")
    store.add([rank(i, overlap=2) for i in range(6)])
    flags = [["harmful"], [], ["hallucination", "harmful"]]
    for who in ("ann", "bob"):
        for _ in range(6):
            value = {"ranks": [1, 1, 3], "ratings": [7, None, 1], "flags": flags}
            label(store, who, value)
    counts = export.write(store, paths.path(tmp_path), 0.3)
    assert counts == {
        "rankings": 12,
        "demonstrations": 0,
        "feedback": 0,
        "skipped": 0,
        "events": 24,
    }
    row = lines(tmp_path / "rankings.jsonl")[0]
    assert row["ranking"] == [1, 1, 2]  # without a gap
    assert row["ratings"] == [7, None, 1]
    assert row["harmful"] == [True, False, True]
    assert row["hallucination"] == [False, False, True]
    assert row["fails_instruction"] == [False] * 3
    assert (row["labeler"], row["seconds"], len(row["shown"])) == ("ann", 2.0, 3)
    read = read_rankings(str(tmp_path / "rankings.jsonl"))
    assert read[0].ranks == (1, 1, 2) and read[0].completions == (
        "r0.0",
        "r0.1",
        "r0.2",
    )
    config = import_rankings.Config(
        rankings=str(tmp_path / "rankings.jsonl"),
        tokenizer=str(finished / "00_tokenizer"),
        validation=0.4,
    )
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    metrics = import_rankings.run(config, paths.path(tmp_path / "imported"), layout)
    assert metrics["import_rankings/rankings"] == 12
    assert metrics["import_rankings/agreement"] == 1.0


def test_sampled_responses_keep_their_token_ids(tmp_path, tokenizer):
    """`answers` are ids that no tokenizer would give for these texts."""
    row = {
        "prompt": "<|user|>Hi<|assistant|>",
        "prompt_tokens": np.array([7, 8]),
        "completions": ["tea", "rain"],
        "completion_tokens": [np.array([9, 9]), np.array([9, 8, 7])],
    }
    store = new_store(tmp_path, "ann")
    other = {**row, "prompt": "<|user|>Yo<|assistant|>"}
    store.add(sources.items_of(row, "compare") + sources.items_of(other, "compare"))
    label(store, "ann", {"ranks": [2, 1]})
    label(store, "ann", {"ranks": [2, 1]})
    rows = preferences.rows(store.labels(), None)
    splits = export.both_splits(rows, 0.5)
    write_preferences(tmp_path / "preferences", splits, labeler="unnamed")
    read = read_preferences(tmp_path / "preferences", "train")[0]
    assert read["prompt_tokens"].tolist() == [7, 8]
    assert [ids.tolist() for ids in read["completion_tokens"]] == [[9, 9], [9, 8, 7]]
    assert list(read["scores"]) == [-2.0, -1.0]
    assert read["labeler"] == "ann"


def test_an_edit_is_a_demonstration_and_better_than_what_it_was(tmp_path, tokenizer):
    store = new_store(tmp_path, "ann")
    item = Item("edit", {"prompt": "I like tea", "response": "bad rain"})
    store.add([item])
    label(store, "ann", {"text": "good tea"})
    export.write(store, paths.path(tmp_path), 0.3)
    (row,) = lines(tmp_path / "rankings.jsonl")
    assert row["completions"] == ["good tea", "bad rain"] and row["ranking"] == [1, 2]
    ((key, preference),) = preferences.rows(store.labels(), tokenizer)
    assert key == "I like tea" and preference["scores"] == [-1.0, -2.0]
    assert preferences.rows(store.labels(), None) == []  # nothing encodes the texts
    demonstrations = tmp_path / "demonstrations" / "train.jsonl"
    source = SourceConfig(spec=f"jsonl:{demonstrations}", kind="messages").open()
    assert source[0]["messages"] == [
        {"role": "user", "content": "I like tea"},
        {"role": "assistant", "content": "good tea"},
    ]


def test_demonstrations_are_read_as_messages_in_both_splits(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([Item("demonstrate", {"prompt": f"prompt {i}"}) for i in range(8)])
    for i in range(8):
        label(store, "ann", {"text": f"answer {i}"})
    export.write(store, paths.path(tmp_path), 0.25)
    spec = f"jsonl:{tmp_path}/demonstrations/{{split}}.jsonl"
    sizes = []
    for split in ("train", "validation"):
        source = SourceConfig(spec=spec, kind="messages", split=split).open()
        sizes.append(len(source))
        assert source[0]["messages"][-1]["content"].startswith("answer")
    assert sum(sizes) == 8


def test_feedback_is_read_by_tamer_which_checks_the_pace(tmp_path, tokenizer):
    row = {"prompt": "I like", "completions": ["tea and rain", "music"]}
    items = sources.items_of(row, "feedback", tokenizer, seconds_per_token=0.5)
    assert len(items) == 2
    pieces = items[0].content["pieces"]
    assert "".join(pieces) == "tea and rain"
    assert len(pieces) == len(tamer.chat.response_tokens(tokenizer, "tea and rain"))
    store = new_store(tmp_path, "ann")
    store.add(items[:1])
    label(store, "ann", {"feedback": [[0.7, 1], [1.25, -1]]})
    export.write(store, paths.path(tmp_path), 0.3)
    file = str(tmp_path / "feedback" / "train.jsonl")
    (batch,) = tamer.read_feedback(file, tokenizer, 32, 0.5)
    np.testing.assert_allclose(batch.times, [0.7, 1.25], rtol=1e-6)
    assert batch.values.tolist() == [1.0, -1.0]
    assert batch.response_length == len(pieces)
    with pytest.raises(
        DataError, match=r"seconds_per_token is 0\.5; expected .*=0\.25"
    ):
        tamer.read_feedback(file, tokenizer, 32, 0.25)


def test_skips_and_events_are_written_and_what_is_undone_is_no_row(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add(
        [
            compare(0),
            compare(1),
            compare(2, kind="calibration", known={"ranks": [1, 2]}),
        ]
    )
    label(store, "ann", {"ranks": [1, 2]})
    store.undo("ann")
    skip(store, "ann")
    counts = export.write(store, paths.path(tmp_path), 0.3)
    assert counts == {
        "rankings": 0,
        "demonstrations": 0,
        "feedback": 0,
        "skipped": 1,
        "events": 5,
    }
    assert not (tmp_path / "rankings.jsonl").exists()
    (skipped,) = lines(tmp_path / "skipped.jsonl")
    assert (skipped["reason"], skipped["task"]) == ("unclear", "compare")
    events = lines(tmp_path / "events.jsonl")
    assert [row["action"] for row in events] == [
        "show",
        "submit",
        "undo",
        "show",
        "skip",
    ]
    assert events[1]["at"].endswith("+00:00") and events[1]["who"] == "ann"


def test_both_splits_have_rows_and_a_prompt_is_in_one():
    keyed = [(f"prompt {i // 2}", {"n": i}) for i in range(40)]
    splits = export.both_splits(keyed, 0.3)
    assert sorted(row["n"] for rows in splits.values() for row in rows) == list(
        range(40)
    )
    of = {name: {row["n"] // 2 for row in rows} for name, rows in splits.items()}
    assert not of["train"] & of["validation"]
    tiny = export.both_splits(keyed[:4], 1e-9)
    assert {name: len(rows) for name, rows in tiny.items()} == {
        "train": 2,
        "validation": 2,
    }
    assert export.both_splits(keyed[:2], 0.3) == {}


def test_items_of_rows(tmp_path):
    row = {"prompt": "p", "completions": ["a", "b", "c", "d", "e"]}
    pairs = [item.content["responses"] for item in sources.items_of(row, "compare")]
    assert pairs == [["a", "b"], ["c", "d"]]
    (ranked,) = sources.items_of(row, "rank")
    assert ranked.content["responses"] == ["a", "b", "c", "d", "e"]
    assert sources.items_of({"prompt": "p", "completions": ["a", "a"]}, "rank") == []
    assert len(sources.items_of(row, "edit")) == 5
    with pytest.raises(DataError, match="10 completions: rank needs 2 to 9"):
        sources.items_of({"prompt": "p", "completions": list("abcdefghij")}, "rank")
    with pytest.raises(ConfigError, match=r"needs label\.tokenizer"):
        sources.items_of(row, "feedback")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "completions": ["a", "b"]}\n{"prompt": "q"}\n')
    given = sources.lines(str(file))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 0 completions"):
        sources.located_items(given, "rank", None, 0.25)
    file.write_text('{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        list(sources.lines(str(file)))


def test_known_rankings_become_tests(tmp_path):
    file = tmp_path / "known.jsonl"
    file.write_text(
        '{"prompt": "p", "completions": ["a", "b"], "ranking": [2, 1]}\n'
        '{"prompt": "q", "completions": ["a", "b", "c"], "ranking": [1, 2, 2]}\n'
    )
    first, second = sources.known_items(str(file), "screening")
    assert (first.task, first.kind, first.known) == (
        "compare",
        "screening",
        {"ranks": [2, 1]},
    )
    assert second.task == "rank" and second.content["responses"] == ["a", "b", "c"]
