"""`rlhfjax data`: what is recognized, the example with its loss mask, and the counts."""

import io
import json
import sys

import numpy as np
import pytest

from rlhfjax import show_data
from rlhfjax.data import examples, survey
from rlhfjax.data.chat import render
from rlhfjax.data.sources import open_source
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.tokenize_text import open_tokenizer
from tests.data.row_forms import GOLDEN
from tests.test_main import call, refused


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns the folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["Name a bird. A wren. An oak."], folder, vocab_size=290)
    return str(folder)


def lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{file}"


def printed(out):
    """Returns the values of the table by their names."""
    rows = [line.partition(" ") for line in out.splitlines()]
    return {name: value.strip() for name, _, value in rows if name}


@pytest.mark.parametrize("form", GOLDEN)
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_every_form_is_recognized_and_shown(
    form, with_tokenizer, tmp_path, model, capsys
):
    golden = GOLDEN[form]
    spec = lines(tmp_path / "x.jsonl", golden.raw)
    flags = [f"--tokenizer={model}", "--length=16"] if with_tokenizer else []
    code, out, err = call(capsys, "data", f"--source={spec}", "--split=all", *flags)
    assert code == 0, err
    values = printed(out)
    assert (values["form"], values["kind"], values["format"]) == (
        *(form, golden.kind, "jsonl"),
    )
    assert values["columns"] == ", ".join(golden.raw)
    assert (values["rows"], values["skipped"], values["duplicates"]) == ("1", "0", "0")
    learned = "".join(part.partition("⟧")[0] for part in out.split("⟦")[1:])
    for text in learned_texts(golden):
        assert text in learned
    asked = golden.row.get("messages") or [{"content": golden.row.get("prompt", "")}]
    assert asked[0]["content"] in out
    assert ("cut" in values) == with_tokenizer


def learned_texts(golden):
    """Returns the texts of a golden row that count in the loss."""
    row = golden.row
    answers = [turn for turn in row.get("messages", ()) if turn["role"] == "assistant"]
    return [
        *(turn["content"] for turn in answers),
        *row.get("completions", ()),
        *row.get("steps", ()),
        *filter(None, [row.get("response"), row.get("text")]),
    ]


def test_the_mask_is_that_of_the_template(model):
    tokenizer = open_tokenizer(model)
    messages = GOLDEN["messages"].row["messages"]
    tokens, mask = render(tokenizer, messages)
    text = show_data.marked(
        show_data.colored(tokenizer, tokens.tolist(), mask.tolist())
    )
    assert text == (
        "<s><|system|>Be brief.</s><|user|>Name a bird.</s><|assistant|>⟦A wren.</s>⟧"
    )


def test_a_terminal_gets_colors_and_no_marks(tmp_path, model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    tokenizer = open_tokenizer(model)
    show_data.print_example(tokenizer, "messages", GOLDEN["messages"].row)
    assert "⟦" not in out.getvalue() and "\x1b[" in out.getvalue()


def test_bad_rows_merged_turns_and_duplicates_are_counted(tmp_path, capsys):
    user = {"from": "human", "value": "Name"}
    merged = {"conversations": [user, user, {"from": "gpt", "value": "A wren."}]}
    rows = [{"x": 1}, GOLDEN["sharegpt"].raw, merged, {"conversations": []}, merged]
    spec = lines(tmp_path / "x.jsonl", *rows)
    _, out, _ = call(capsys, "data", f"--source={spec}", "--split=all")
    values = printed(out)
    assert (values["rows"], values["skipped"]) == ("3", "2")
    assert "x.jsonl:1: no column 'conversations', found x" in out
    assert "x.jsonl:4: column 'conversations' has no messages" in out
    assert values["merged"].startswith("2 turns") and values["duplicates"] == "1"


def test_rows_of_other_splits_are_compared(tmp_path, capsys):
    texts = {"train": "abca", "validation": "xb", "test": "ca"}
    for split, letters in texts.items():
        lines(tmp_path / f"{split}.jsonl", *({"text": letter} for letter in letters))
    spec = f"jsonl:{tmp_path}/{{split}}.jsonl"
    _, out, _ = call(capsys, "data", f"--source={spec}")
    assert printed(out)["duplicates"] == "1"
    assert "in validation 1 of 2 rows are here too" in out
    assert "in test      2 of 2 rows are here too" in out
    (tmp_path / "test.jsonl").unlink()
    _, out, _ = call(capsys, "data", f"--source={spec}", "--split=validation")
    assert "in train      1 of 4 rows" in out.replace("train     ", "train      ")
    assert "in test" not in out


def test_lengths_and_cuts_are_those_of_training(tmp_path, model):
    """Percentiles by a plain loop, and the share of cut examples as fine-tuning has it."""
    tokenizer = open_tokenizer(model)
    rows = []
    for i in range(20):
        turns = [{"role": "user", "content": "Name a bird. " * (i + 1)}]
        rows.append({"messages": [*turns, {"role": "assistant", "content": "A wren."}]})
    source = open_source(
        lines(tmp_path / "x.jsonl", *rows), kind="messages", split="all"
    )
    counts = survey.Survey(source, tokenizer, 60)
    lengths = sorted(len(render(tokenizer, row["messages"])[0]) for row in rows)
    assert (
        counts.percentiles()[0] == lengths[0]
        and counts.percentiles()[-1] == lengths[-1]
    )
    assert counts.percentiles()[3] in lengths[9:11]
    cut = total = 0
    for row in rows:
        for example in examples.fine_tuning(tokenizer, row, 60):
            cut += int(example[0, 3])
            total += 1
    assert (counts.cut, counts.examples) == (cut, total) and 0 < cut < total


def test_a_limit_and_memory_of_twelve_bytes_per_row(tmp_path, model):
    rows = [{"text": f"A wren {i} " * 50} for i in range(300)]
    source = open_source(lines(tmp_path / "x.jsonl", *rows), split="all")
    counts = survey.Survey(source, open_tokenizer(model), 16, limit=200)
    assert counts.rows == 200 and len(counts.hashes) == 200
    assert counts._hashes.itemsize * len(counts._hashes) == 1600
    assert counts._lengths.itemsize * len(counts._lengths) == 800


def test_hashes_are_of_what_is_in_a_row():
    row = GOLDEN["preferences"].row
    same = row | {"labeler": "x", "prompt_tokens": np.array([1])}
    assert survey.content_hash("preferences", row) == survey.content_hash(
        "preferences", same
    )
    other = row | {"scores": [2.0, -1.5]}
    assert survey.content_hash("preferences", row) != survey.content_hash(
        "preferences", other
    )


def test_columns_are_mapped_by_flags(tmp_path, capsys):
    spec = lines(tmp_path / "x.jsonl", {"q": "Who?", "good": "A wren.", "bad": "No."})
    names = ("prompt", "q"), ("chosen", "good"), ("rejected", "bad")
    flags = [f"--columns.{ours}={column}" for ours, column in names]
    code, out, _ = call(capsys, "data", f"--source={spec}", "--split=all", *flags)
    values = printed(out)
    assert code == 0 and (values["form"], values["kind"]) == ("pair", "preferences")
    assert values["columns"].endswith("prompt = q, chosen = good, rejected = bad")


def test_mistakes_are_one_line(tmp_path, capsys):
    spec = lines(tmp_path / "x.jsonl", {"a": 1})
    assert "--source is required" in refused(capsys, "data")
    wrong = refused(capsys, "data", f"--source={spec}", "--columns.text=")
    assert "expected --columns.NAME=COLUMN" in wrong
    kind = refused(capsys, "data", f"--source={spec}", "--kind=texts")
    assert "--kind=texts: expected" in kind


def test_a_source_without_a_row_that_can_be_read(tmp_path, capsys):
    spec = lines(tmp_path / "x.jsonl", {"a": 1}, {"b": 1})
    code, _, err = call(capsys, "data", f"--source={spec}", "--split=all")
    assert code != 0 and "x.jsonl:1: no column 'text', found a" in err


def test_definitions_and_calls_of_tools_are_shown():
    turns = [
        {"role": "system", "content": "Be brief.", "tools": "[1]"},
        {"role": "assistant", "content": "", "tool_calls": "[2]"},
    ]
    assert list(show_data.parts_of("messages", {"messages": turns})) == [
        ("system", "Be brief.\n[1]", False),
        ("assistant", "[2]", True),
    ]
