"""Votes of the page: rows that the readers of `reward` and `direct` take."""

import concurrent.futures

import httpx
import pytest

from rlhfjax import jsonl, paths
from rlhfjax.data.chat import render_prompt
from rlhfjax.data.examples import preference_ids
from rlhfjax.data.sources import open_source
from rlhfjax.serve.comparisons import Comparisons

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi <|user|>"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "the cat"},
]
VOTE = {
    "messages": MESSAGES,
    "completions": ["ran\nfar", "sat"],
    "models": ["a", "b"],
    "preferred": "second",
}


@pytest.fixture
def file(tmp_path):
    return paths.path(tmp_path / "votes" / "comparisons.jsonl")


def test_a_vote_is_a_row_that_the_stages_read(served, serve, words, file):
    url = serve(served(), comparisons=Comparisons(file)) + "/v1/comparisons"
    for i, preferred in enumerate(("second", "first", "tie"), start=1):
        reply = httpx.post(url, json=VOTE | {"preferred": preferred})
        assert (reply.status_code, reply.json()["stored"]) == (201, i)
    source = open_source(f"jsonl:{file}", kind="preferences", split="all")
    rows = [source[i] for i in range(len(source))]
    assert [row["scores"] for row in rows] == [[0, 1], [1, 0], [0.5, 0.5]]
    for row in rows:
        assert row["completions"] == VOTE["completions"]
        assert row["messages"] == MESSAGES
        assert row["labeler"] == "chat page"
        prompt, completions = preference_ids(words, row)
        assert prompt == render_prompt(words, MESSAGES).tolist()
        ends = [[*words.encode(text), words.eos_id] for text in VOTE["completions"]]
        assert completions == ends


def test_votes_of_several_pages_are_whole_lines(file):
    from rlhfjax.serve.fields import ComparisonFields

    comparisons = Comparisons(file)
    fields = ComparisonFields.model_validate(VOTE)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: comparisons.add(MESSAGES, fields), range(50)))
    assert sorted(counts) == list(range(1, 51))
    rows = [row for _, row in jsonl.located_rows(file)]
    assert len(rows) == 50 and all(row["models"] == ["a", "b"] for row in rows)


def test_votes_are_added_to_those_of_before(file):
    from rlhfjax.serve.fields import ComparisonFields

    fields = ComparisonFields.model_validate(VOTE)
    for _ in range(2):
        Comparisons(file).add(MESSAGES, fields)
    assert len(list(jsonl.located_rows(file))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferred": "third"}, "preferred: input should be 'first', 'second' or"),
        ({"completions": ["a"]}, "completions: list should have at least 2 items"),
        ({"messages": MESSAGES[:3]}, "prompt must end with a user turn"),
        ({"x": 1}, "unknown field 'x'"),
    ],
)
def test_a_vote_that_no_stage_could_read_is_refused(
    served, serve, file, change, message
):
    url = serve(served(), comparisons=Comparisons(file)) + "/v1/comparisons"
    reply = httpx.post(url, json=VOTE | change)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)
    assert not file.exists()


def test_without_a_file_there_are_no_votes(served, serve):
    url = serve(served())
    assert httpx.post(f"{url}/v1/comparisons", json=VOTE).status_code == 404
    assert httpx.get(f"{url}/settings").json()["stores_comparisons"] is False
