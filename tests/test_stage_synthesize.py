"""The stage `synthesize`, with an endpoint of this process and with one of our models."""

import json
import random

import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.data.config import SourceConfig
from rlhfjax.data.sources import open_source
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.stages import stage_config, synthesize
from tests.fake_endpoint import FakeEndpoint
from tests.test_stage_prepare import stop_after, write_rows

VERBS = ("Name", "Describe", "Compare", "List", "Explain", "Count", "Rank", "Draw")
NOUNS = ("rivers", "poems", "engines", "birds", "laws", "fruits", "songs", "wars")


def speak(request):
    """Writes two tasks and one that is too short, or responds to a task."""
    text = request["messages"][-1]["content"]
    if not text.startswith("Come up"):
        return "" if "birds" in text else f"Answer to: {text}"
    rng = random.Random(request["seed"])
    tasks = []
    for _ in range(2):
        places = rng.sample(range(10_000), 3)
        verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
        tasks.append(f"{verb} {noun} of {places[0]} {places[1]} and {places[2]}.")
    return f" {tasks[0]}\nTask 99: Stop.\nTask 100: {tasks[1]}"


@pytest.fixture
def server():
    with FakeEndpoint(speak) as fake:
        yield fake


@pytest.fixture
def seeds(tmp_path):
    rows = [
        {"prompt": f"Seed task number {i} about {noun}"} for i, noun in enumerate(NOUNS)
    ]
    return write_rows(tmp_path / "seeds.jsonl", rows)


def source(path, kind="prompt"):
    return {"spec": f"jsonl:{path}", "kind": kind, "split": "all"}


def values(seeds, **changes):
    options = {
        "seeds": (source(seeds),),
        "count": 24,
        "batch_size": 4,
        "max_new_tokens": 16,
        "length": 64,
        "validation": 0.3,
    }
    return to_dict(stage_config("synthesize", **(options | changes)))


def of_endpoint(seeds, server, **changes):
    endpoint = {"url": server.url, "model": "some-model", "retries": 0}
    return values(seeds, endpoint=endpoint, **changes)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def output(workdir):
    files = [*workdir.glob("*.jsonl"), *workdir.glob("prompts/*")]
    names = {"train.jsonl", "validation.jsonl"}
    files = [file for file in files if file.name in names]
    return {str(file.relative_to(workdir)): file.read_text() for file in files}


def test_instructions_and_responses_of_an_endpoint(seeds, server, tmp_path):
    workdir = tmp_path / "run"
    metrics = recipe.run_stage(of_endpoint(seeds, server), workdir)
    prompts = read(workdir / "prompts" / "train.jsonl")
    prompts += read(workdir / "prompts" / "validation.jsonl")
    assert len(prompts) == len({row["prompt"] for row in prompts}) == 24
    assert metrics["synthesize/instructions"] == 24
    assert metrics["synthesize/refused_words"] > 0  # Stop.
    assert not any("Draw graph" in row["prompt"] for row in prompts)
    chats = read(workdir / "train.jsonl") + read(workdir / "validation.jsonl")
    for row in chats:
        user, assistant = row["messages"]
        assert assistant["content"] == f"Answer to: {user['content']}"
    silent = sum("birds" in row["prompt"] for row in prompts)
    assert len(chats) == 24 - silent == metrics["synthesize/responses"]
    assert metrics["synthesize/responses_refused"] == silent


def test_provenance_leads_back_to_the_examples(seeds, server, tmp_path):
    recipe.run_stage(of_endpoint(seeds, server), tmp_path / "run")
    prompts = read(tmp_path / "run" / "prompts" / "train.jsonl")
    prompts += read(tmp_path / "run" / "prompts" / "validation.jsonl")
    by_id = {row["id"]: row for row in prompts}
    questions = [
        one["messages"][0]["content"]
        for one in server.requests
        if one["messages"][0]["content"].startswith("Come up")
    ]
    texts = {row["id"]: row["prompt"] for row in prompts}
    texts |= {
        f"seed-{i}": f"Seed task number {i} about {n}" for i, n in enumerate(NOUNS)
    }
    for row in prompts:
        assert set(row) == {
            *("prompt", "id", "model", "seed", "round", "examples", "nearest"),
            "similarity",
        }
        assert row["model"] == "fake-1"
        assert len(row["examples"]) == 8
        assert any(
            all(texts[name] in question for name in row["examples"])
            for question in questions
        )
        generated = [name for name in row["examples"] if name in by_id]
        assert all(by_id[name]["round"] < row["round"] for name in generated)
        assert len(generated) == (2 if row["round"] else 0)
        assert row["similarity"] < 0.7


def test_other_stages_read_what_is_written(seeds, server, tmp_path):
    recipe.run_stage(of_endpoint(seeds, server), tmp_path / "run")
    for split in ("train", "validation"):
        chats = open_source(
            f"jsonl:{tmp_path}/run/{{split}}.jsonl", kind="messages", split=split
        )
        prompts = open_source(
            f"jsonl:{tmp_path}/run/prompts/{{split}}.jsonl", kind="prompt", split=split
        )
        assert [turn["role"] for turn in chats[0]["messages"]] == ["user", "assistant"]
        assert len(prompts) >= len(chats)


def test_a_run_that_stops_continues_and_pays_for_nothing_twice(
    seeds, server, tmp_path, monkeypatch
):
    config = of_endpoint(seeds, server)
    recipe.run_stage(config, tmp_path / "whole")
    asked = sorted(map(json.dumps, server.requests))
    server.requests.clear()
    for writes in (2, 4):  # two rounds; then the third, and a batch of responses
        stop_after(monkeypatch, synthesize, "_keep", writes)
        with pytest.raises(KeyboardInterrupt):
            recipe.run_stage(config, tmp_path / "run")
        monkeypatch.undo()
    recipe.run_stage(config, tmp_path / "run")
    assert output(tmp_path / "run") == output(tmp_path / "whole")
    # What was asked when the run stopped is asked again: a batch of four, twice.
    assert set(map(json.dumps, server.requests)) == set(asked)
    assert len(server.requests) <= len(asked) + 8
    server.requests.clear()
    recipe.run_stage(config, tmp_path / "run")
    assert server.requests == []
    assert not (tmp_path / "run" / "parts").exists()


def test_a_model_that_repeats_itself_ends_with_the_rounds(seeds, tmp_path):
    with FakeEndpoint(lambda _: "Seed task number 3 about rivers") as server:
        config = of_endpoint(seeds, server, rounds=2, responses=False)
        with pytest.raises(DataError, match=r"taken in 2 rounds \(similar: 8\)"):
            recipe.run_stage(config, tmp_path / "run")


def test_prompts_alone_need_no_responses(seeds, server, tmp_path):
    config = of_endpoint(seeds, server, count=5, responses=False)
    metrics = recipe.run_stage(config, tmp_path / "run")
    assert metrics["synthesize/instructions"] == 5
    assert "synthesize/responses" not in metrics
    assert not (tmp_path / "run" / "train.jsonl").exists()


def test_a_model_of_ours_gives_the_same_bytes_again(finished, seeds, tmp_path):
    """Its instructions are letters; whatever it writes, two runs write the same."""
    config = values(
        seeds,
        init_from=str(finished / "02_sft"),
        count=6,
        rounds=4,
        examples=2,
        min_words=1,
        similarity=1.0,
        length=32,
        max_new_tokens=8,
        temperature=1.0,
        template="{examples}",
    )
    metrics = recipe.run_stage(config, tmp_path / "a")
    recipe.run_stage(config, tmp_path / "b")
    assert output(tmp_path / "a") == output(tmp_path / "b")
    prompts = read(tmp_path / "a" / "prompts" / "train.jsonl")
    assert {row["model"] for row in prompts} == {"02_sft"}
    assert metrics["synthesize/instructions"] >= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "give either init_from or endpoint"),
        (
            {"init_from": "x", "examples": 1},
            r"generated_examples=2: must be <= examples=1",
        ),
        (
            {"init_from": "x", "template": "Write!"},
            r"synthesize.template: it has no {examples}",
        ),
    ],
)
def test_errors_name_the_option(seeds, changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe.check(values(seeds, **changes), "synthesize")


def test_rows_without_a_prompt_are_no_seeds(tmp_path):
    path = write_rows(tmp_path / "text.jsonl", [{"text": "hi"}])
    config = SourceConfig(f"jsonl:{path}", kind="text", split="all")
    with pytest.raises(ConfigError, match="is a row of kind text; expected prompt"):
        synthesize.read_seeds([config])
