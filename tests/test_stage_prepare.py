"""The stage `prepare`: filters in their order, any number of workers, killed and continued."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.corpus import write
from rlhfjax.data.sources import open_source
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.report import write_report
from rlhfjax.stages import prepare, stage_config

ENGLISH = (
    "the weather in the north of the country was cold and wet for most of the year",
    "she opened the letter slowly and read what her brother had written about the war",
    "a good teacher knows when to speak and when to let the children find the answer",
)
GERMAN = "das wetter im norden des landes war den größten teil des jahres kalt und nass"
QUESTION = "how many apples are left if I had seven apples and ate two of them today"


def document(rng, extra=""):
    words = " ".join(ENGLISH).split()
    return " ".join(rng.choices(words, k=60)) + extra


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Documents of which it is known what is wrong with each."""
    folder = tmp_path_factory.mktemp("raw")
    rng = random.Random(0)
    good = [document(rng, f" number {i}") for i in range(120)]
    before, after = (document(rng) + document(rng) for _ in range(2))
    rows = [
        *good[:60],
        GERMAN,
        good[3],  # equal
        f"{good[5]} again",  # nearly equal
        f"{before} {QUESTION} {after}",
        *good[60:],
        good[100],
        QUESTION,
    ]
    lines = [json.dumps({"text": text}) + "\n" for text in rows]
    (folder / "raw.jsonl").write_text("".join(lines))
    (folder / "other.jsonl").write_text(json.dumps({"text": good[7]}) + "\n")
    (folder / "exam.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n")
    return folder


def source(path, kind="text", **changes):
    return {"spec": f"jsonl:{path}", "kind": kind, "split": "all"} | changes


def values(raw, **changes):
    options = {
        "sources": (source(raw / "raw.jsonl"), source(raw / "other.jsonl")),
        "language": {"keep": ("en",)},
        "near": {"threshold": 0.8, "ngram": 2},
        "evaluation": {"sources": (source(raw / "exam.jsonl"),)},
        "rows_per_file": 16,
        "validation": 0.2,
        "test": 0.2,
    }
    return to_dict(stage_config("prepare", **(options | changes)))


def output(workdir):
    """The content of every file that the stage writes for others."""
    files = [
        *workdir.glob("train/*"),
        *workdir.glob("validation/*"),
        *workdir.glob("test/*"),
        workdir / "corpus.json",
    ]
    return {str(file.relative_to(workdir)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepared") / "run"
    return workdir, recipe.run_stage(values(raw), workdir)


def test_each_filter_removes_what_it_should(prepared):
    workdir, metrics = prepared
    assert metrics["prepare/rows"] == 127
    removed = {
        name.removeprefix("prepare/removed_"): value
        for name, value in metrics.items()
        if name.startswith("prepare/removed_")
    }
    # exact: two copies, and the row of the other source
    assert removed == {"language": 1, "exact": 3, "near": 1, "evaluation": 1}
    assert metrics["prepare/documents_cut"] == 1
    assert metrics["prepare/left"] == pytest.approx(121 / 127)
    assert not (workdir / "parts").exists()


def test_later_stages_read_what_is_left_in_order(raw, prepared):
    workdir, metrics = prepared
    texts = []
    for split in ("train", "validation", "test"):
        rows = open_source(f"jsonl:{workdir}/{{split}}/*.jsonl", split=split)
        own = [rows[i]["text"] for i in range(len(rows))]
        assert len(own) == metrics[f"prepare/rows_{split}"]
        texts.append(own)
    lines = (raw / "raw.jsonl").read_text().splitlines()
    order = [json.loads(line)["text"] for line in lines]
    for own in texts:
        whole = [text for text in own if text in order]
        assert whole == sorted(whole, key=order.index)
    everything = [text for own in texts for text in own]
    # The document with the question is in two pieces; 200 letters beside it are gone.
    assert len(everything) == 122
    assert len(set(everything)) == 122
    assert not any(QUESTION in text or text == GERMAN for text in everything)


def test_corpus_json_counts_and_shows_what_was_removed(prepared):
    workdir, _ = prepared
    done = json.loads((workdir / "corpus.json").read_text())
    assert [one["name"] for one in done["filters"]] == [
        *("language", "exact", "near", "evaluation"),
    ]
    assert [one["left"] for one in done["filters"]] == [126, 123, 122, 121]
    assert [one["rows"] for one in done["sources"]] == [126, 1]
    assert [one["left"] for one in done["sources"]] == [121, 0]
    (german,) = done["examples"]["language"]
    assert german["text"] == GERMAN and german["why"].startswith("de, probability")
    assert german["place"].endswith("raw.jsonl:61")
    (near,) = done["examples"]["near"]
    assert near["text"] == f"{near['like']} again"
    why = {one["why"] for one in done["examples"]["evaluation"]}
    assert why == {"", f"has {QUESTION!r}"} or f"has {QUESTION!r}" in why
    assert sum(done["lengths"]["before"]) == 127
    assert sum(done["lengths"]["after"]) == 122


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(raw, prepared, tmp_path):
    recipe.run_stage(values(raw, workers=2), tmp_path / "run")
    assert output(tmp_path / "run") == output(prepared[0])


def test_the_report_shows_the_corpus(prepared):
    page = write_report(prepared[0]).read_text()
    assert 'id="corpus"' in page
    assert "another language, or an improbable one" in page
    assert GERMAN in page and "raw.jsonl:61" in page


def test_a_run_that_stops_in_the_middle_continues(raw, prepared, tmp_path, monkeypatch):
    """It stops while it measures, and again while it writes; nothing is done twice."""
    config, workdir = values(raw), tmp_path / "run"
    stop_after(monkeypatch, prepare.measure, "write", 3)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_stage(config, workdir)
    assert len(list((workdir / "parts").glob("measured-*"))) == 3
    monkeypatch.undo()
    stop_after(monkeypatch, write.Writer, "write", 4)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_stage(config, workdir)
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*-000001.jsonl")}
    assert before and len(list((workdir / "parts").glob("written-*"))) == 4
    monkeypatch.undo()
    metrics = recipe.run_stage(config, workdir)
    assert output(workdir) == output(prepared[0])
    assert metrics == prepared[1]
    assert before == {file: file.stat().st_mtime_ns for file in before}


def stop_after(monkeypatch, owner, name, times):
    """Makes a function raise KeyboardInterrupt after so many calls."""
    real, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        if len(calls) == times:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def test_sources_that_changed_in_between_are_an_error(raw, tmp_path, monkeypatch):
    path = tmp_path / "raw.jsonl"
    path.write_text((raw / "raw.jsonl").read_text())
    config = values(raw, sources=(source(path),))
    stop_after(monkeypatch, write.Writer, "write", 1)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_stage(config, tmp_path / "run")
    monkeypatch.undo()
    text = path.read_text()
    path.write_text(text.replace("number 70", "number 07"))
    with pytest.raises(DataError, match=r"raw.jsonl:75: the row has changed"):
        recipe.run_stage(config, tmp_path / "run")
    path.write_text(text + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(DataError, match=r"plan.json: the sources have changed"):
        recipe.run_stage(config, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_process_leaves_no_worker_and_continues(raw, prepared, tmp_path):
    workdir = tmp_path / "run"
    config = tmp_path / "config.py"
    config.write_text(
        "from rlhfjax.stages import stage_config\n"
        "def get_config(arg=None):\n"
        f"    return stage_config(**{values(raw, workers=2)!r})\n"
    )
    command = [sys.executable, "-m", "rlhfjax", "train", f"--config={config}"]
    command.append(f"--workdir={workdir}")
    process = subprocess.Popen(command, start_new_session=True)
    while not list(workdir.glob("parts/measured-*")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not members(process.pid)
    subprocess.run(command, check=True)
    assert output(workdir) == output(prepared[0])


def members(session):
    """The processes of a session that are alive."""
    found = subprocess.run(
        ["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True
    )
    return [line for line in found.stdout.split() if not line.startswith("Z")]


# ------------------------------------------------------------------ prompts and quality


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_of_a_user_are_limited_and_in_one_split(tmp_path):
    """InstructGPT: at most a fixed number per user, and no user in two splits."""
    rows = [
        {"prompt": f"{kind} number {i}", "id": user}
        for user in range(30)
        for i, kind in enumerate(("Write", "Explain", "Sum up", "Name"))
    ]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    config = to_dict(
        stage_config(
            "prepare",
            sources=(source(path, "prompt", columns={"user": "id"}),),
            exact=False,
            prompts={"per_user": 3},
            validation=0.3,
            test=0.3,
        )
    )
    metrics = recipe.run_stage(config, tmp_path / "run")
    assert metrics["prepare/removed_user"] == 30
    splits_of = {}
    for split in ("train", "validation", "test"):
        rows = open_source(
            f"jsonl:{tmp_path}/run/{{split}}/*.jsonl",
            kind="prompt",
            split=split,
            columns={"user": "user"},
        )
        for i in range(len(rows)):
            splits_of.setdefault(rows[i]["user"], []).append(split)
            assert not rows[i]["messages"][0]["content"].startswith("Name")
    assert len(splits_of) == 30
    assert all(len(own) == 3 and len(set(own)) == 1 for own in splits_of.values())


def test_conversations_are_told_by_their_prompts(tmp_path):
    """A system message that all share is no common beginning."""
    system = {"role": "system", "content": "You are a helpful assistant. " * 5}

    def chat(prompt, response):
        turns = [("user", prompt), ("assistant", response)]
        return [system, *({"role": role, "content": text} for role, text in turns)]

    prompts = [f"{i} is a number; is it even?" for i in range(40)]
    rows = [{"messages": chat(prompt, "Yes.")} for prompt in prompts]
    rows.append({"messages": chat(f"{prompts[0]} And odd?", "No.")})
    path = write_rows(tmp_path / "chats.jsonl", rows)
    config = to_dict(
        stage_config(
            "prepare",
            sources=(source(path, "messages"),),
            prompts={"prefix": 20},
            validation=0.2,
            test=0.0,
        )
    )
    metrics = recipe.run_stage(config, tmp_path / "run")
    assert metrics["prepare/removed_prefix"] == 1
    train = open_source(
        f"jsonl:{tmp_path}/run/train/*.jsonl", kind="messages", split="all"
    )
    assert train[0]["messages"][0] == system


@pytest.mark.slow
def test_quality_keeps_documents_like_the_reference(tmp_path):
    rng = random.Random(0)
    good = ["proof", "theorem", "lemma", "integral", "the", "of"]
    bad = ["click", "buy", "now", "cheap", "the", "of"]

    def rows(words, n):
        return [{"text": " ".join(rng.choices(words, k=30))} for _ in range(n)]

    reference = write_rows(tmp_path / "reference.jsonl", rows(good, 100))
    mixed = rows(good, 60) + rows(bad, 140)
    config = to_dict(
        stage_config(
            "prepare",
            sources=(source(write_rows(tmp_path / "raw.jsonl", mixed)),),
            quality={"reference": (source(reference),), "alpha": 6.0},
            validation=0.3,
            test=0.0,
        )
    )
    metrics = recipe.run_stage(config, tmp_path / "run")
    assert 0.7 < metrics["prepare/quality_auc"] <= 1
    kept = [
        json.loads(line)["text"]
        for file in (tmp_path / "run").glob("*/00-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    bad_kept = sum("click" in text or "buy" in text for text in kept)
    good_kept = len(kept) - bad_kept
    # With equal weights of both classes, documents like the reference have the score
    # 1 / (1 + 60 / 200) = 0.77 and are kept with probability (2 - 0.77)^-6 = 0.29; others with
    # 2^-6 = 0.016. Bounds: four standard deviations.
    assert abs(good_kept - 60 * 0.29) < 4 * np.sqrt(60 * 0.29 * 0.71)
    assert bad_kept < 140 * 0.016 + 4 * np.sqrt(140 * 0.016)


# ------------------------------------------------------------------ errors


def test_errors_name_the_option(raw, tmp_path):
    def refused(error, message, **changes):
        workdir = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(error, match=message):
            recipe.run_stage(values(raw, **changes), workdir)

    refused(ConfigError, r"prepare.sources: at least one", sources=())
    refused(
        ConfigError,
        r"prepare.language.keep='english': expected one of .*en, ",
        language={"keep": ("english",)},
    )
    refused(
        ConfigError,
        "prefix and per_user are for rows of kind prompt or messages",
        prompts={"prefix": 10},
    )
    few = (source(raw / "exam.jsonl"),)
    refused(
        DataError, r"reference: 1 documents; .* needs 20", quality={"reference": few}
    )
    refused(
        DataError,
        r"prepare.evaluation.ngram=40: no evaluation text has that many words",
        evaluation={"sources": few, "ngram": 40},
    )
    refused(DataError, "no row is left for train of 1 that were read", sources=few)


def test_a_missing_user_and_another_kind_are_errors(tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "hi"}])
    pairs = {"prompt": "hi", "completions": ["a", "b"], "scores": [0, 1]}
    rankings = write_rows(tmp_path / "pairs.jsonl", [pairs])
    first, second = source(prompts, "prompt"), source(rankings, "preferences")
    for sources, message in (
        ((first,), "have no column 'user'; columns="),
        ((first, second), "rows of kind preferences; expected prompt"),
    ):
        config = stage_config("prepare", sources=sources, prompts={"per_user": 2})
        with pytest.raises((ConfigError, DataError), match=message):
            recipe.run_stage(to_dict(config), tmp_path / "run")


JUDGED = {
    "preferences": {"completions": ["blue", "red"], "scores": [1.0, 0.0]},
    "unpaired": {"response": "blue", "desirable": True},
    "steps": {"steps": ["it is sky", "blue"], "labels": [0.0, 1.0]},
}


@pytest.mark.parametrize("kind", JUDGED)
def test_rows_with_judged_responses_are_filtered_whole_and_read_back(kind, tmp_path):
    def row(text, **changes):
        prompt = "prompt" if kind == "preferences" else "messages"
        turns = [{"role": "user", "content": text}]
        return {prompt: turns, **JUDGED[kind], **changes}

    rng = random.Random(0)
    long = document(rng)
    name, other = list(JUDGED[kind].items())[1]
    other = [*other][::-1] if isinstance(other, list) else not other
    rows = [
        row(long),
        row("two"),
        row(long),  # equal
        row(f"{long} again"),  # nearly equal
        row("two", **{name: other}),  # judged in another way
        row(QUESTION),  # evaluation text
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n")
    options = values(
        tmp_path,
        sources=(source(tmp_path / "raw.jsonl", kind),),
        language={"keep": ()},
        validation=0.0,
        test=0.0,
    )
    metrics = recipe.run_stage(options, tmp_path / "run")
    removed = [metrics[f"prepare/removed_{n}"] for n in ("exact", "near", "evaluation")]
    # Two rows that differ only in the scores of their responses have the same text.
    assert removed == [1, 2, 1]
    spec = f"jsonl:{tmp_path}/run/train/*.jsonl"
    left = open_source(spec, kind=kind, split="all")
    raw = open_source(f"jsonl:{tmp_path}/raw.jsonl", kind=kind, split="all")
    assert [left[i] for i in range(len(left))] == [raw[0], raw[1]]
