"""Readers of data: sources of every kind, rankings, feedback, metadata."""

import contextlib
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhfjax.data import chat, chinese, forms
from rlhfjax.data.preferences import read_preferences, write_preferences
from rlhfjax.data.rows import COLUMNS, BadRow, normalize
from rlhfjax.data.sources import Source, open_source
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.errors import UserError
from rlhfjax.json_text import NotJson, parse
from rlhfjax.rewards.feedback import read_lines
from rlhfjax.rewards.rankings import read_rankings
from rlhfjax.rewards.rules import read_metadata
from rlhfjax.stages import import_rankings
from rlhfjax.stages.tamer import read_feedback
from tests import jionlp
from tests.data import test_tools
from tests.data.row_forms import GOLDEN
from tests.fuzz.inputs import binary_bytes, json_bytes, lines_bytes, text_bytes
from tests.fuzz.readers.ours import TEXTS
from tests.fuzz.readers.table import (
    Reader,
    Strategy,
    Table,
    Trial,
    dumped,
    file_reader,
    files_reader,
    lines,
)

TABLE: Table = {}
USER = {"role": "user", "content": "who sat on the mat?"}
TURNS = [USER, {"role": "assistant", "content": "the cat sat."}]
PAIR = {name: name for name in ("chosen", "rejected")}  # columns of a preference
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"x": {"type": "number"}, "y": None}},
}
ROWS = {
    "text": [{"text": "the cat sat"}, {"text": "é🙂"}],
    "messages": [
        {"messages": TURNS},
        {"messages": '[{"role": "user", "content": "hi"}]'},
        {"messages": TURNS, "prompt_tokens": [1, 2], "response_tokens": [3]},
        {"messages": test_tools.RAW},
        {"messages": test_tools.RAW, "tools": [TOOL, {"name": "f"}]},
    ],
    "prompt": [{"prompt": "who?"}, {"prompt": [USER]}, {"prompt": "[1] who?"}],
    "preferences": [
        {"prompt": "who?", "completions": ["a", "b"], "scores": [1.5, -2]},
        {"prompt": [USER], "completions": ["a", ""], "scores": [1, 1], "x": None},
        {
            "prompt": "x",
            "completions": ["a", "b"],
            "scores": [0, 1],
            "prompt_tokens": [5, 6],
            "completion_tokens": [[7], [8, 9]],
        },
    ],
    "unpaired": [GOLDEN["unpaired"].raw],
    "steps": [
        GOLDEN["steps"].raw,
        {"messages": [USER], "steps": ["a", "b"], "labels": [1, 0.5]},
        {"messages": "who?", "steps": ["a"], "labels": [True]},
    ],
}


def read_all(source: Source) -> None:
    for i in range(len(source)):
        source[i]
        source.locate(i)


def read_twice(spec: str, **options: Any) -> None:
    """Reads all rows of a source, leaving bad ones out, and then up to the first bad one."""
    with contextlib.suppress(UserError):
        read_all(open_source(spec, split="all", on_bad_row="skip", **options))
    read_all(open_source(spec, split="all", **options))


def _json_lines(kind: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    def read() -> None:
        read_twice(f"jsonl:{folder}/x.jsonl", kind=kind)

    return folder / "x.jsonl", [lines(*ROWS[kind])], read


def _row(kind: str, folder: Path) -> Trial:
    def call(content: bytes) -> None:
        value = parse(content)
        if isinstance(value, dict):
            columns = PAIR if kind == "preferences" and "chosen" in value else {}
            normalize(kind, value, columns)

    seeds = dumped(*ROWS[kind])
    if kind == "preferences":
        seeds += dumped({"prompt": [USER], "chosen": "a", "rejected": "b"})
    return Trial(seeds, json_bytes(seeds), call)


def _form(form: str, folder: Path) -> Trial:
    """A row of one form, which is read as its kind and as a prompt."""

    def call(content: bytes) -> None:
        value = parse(content)
        if isinstance(value, dict):
            forms.Reader(None, {})(value)
            with contextlib.suppress(BadRow):
                forms.Reader(None, {}, form)(value)
            forms.Reader("prompt", {}, form)(value)

    seeds = dumped(GOLDEN[form].raw)
    return Trial(seeds, json_bytes(seeds), call)


def _texts(documents: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    def read() -> None:
        read_twice(f"text:{folder}/x.txt", kind="text", documents=documents)

    return folder / "x.txt", ["The cat.\nIt sat é.\n\n\nWho?\n".encode()], read


for _kind in COLUMNS:
    _read = functools.partial(_json_lines, _kind)
    file_reader(TABLE, f"jsonl_source_{_kind}", lines_bytes, _read, examples=60)
    TABLE[f"row_{_kind}"] = Reader(
        functools.partial(_row, _kind), 200, (BadRow, NotJson)
    )
for _name in GOLDEN:
    if _name not in COLUMNS:
        _read = functools.partial(_form, _name)
        TABLE[f"form_{_name}"] = Reader(_read, 60, (BadRow, NotJson))
for _documents in ("file", "paragraph", "line"):
    _read = functools.partial(_texts, _documents)
    file_reader(TABLE, f"text_source_{_documents}", binary_bytes, _read, examples=30)


@functools.cache
def tokenizer(folder: Path) -> Any:
    return train_sentencepiece(TEXTS, folder / "tokenizer.model", vocab_size=330)


# ------------------------------------------------------------------ people's labels


def _preferences(folder: Path) -> tuple[dict[Path, Strategy], Callable]:
    """A folder that the collect stage wrote."""
    rng = random.Random(0)
    rows = []
    for i in range(3):
        texts = [f"a{i}", f"b{rng.random()}"]
        rows.append(
            {
                "prompt": f"<|user|>{i}",
                "prompt_tokens": [1, 2],
                "completions": texts,
                "completion_tokens": [[3], [4, 5]],
                "scores": [1.0, float(i)],
            }
        )
    target = folder / "preferences"
    write_preferences(target, {"train": rows}, labeler="x")

    def read() -> None:
        read_all(read_preferences(target, "train"))

    files = {}
    for file in sorted(target.rglob("*")):
        if file.suffix == ".json":
            files[file] = json_bytes
        elif "array_record" in file.name:
            files[file] = binary_bytes
    return files, read


def _rankings(folder: Path) -> tuple[Path, list[bytes], Callable]:
    rows = [
        {"prompt": "who?", "completions": ["a", "b"], "ranking": [1, 2]},
        {
            "prompt": [USER],
            "completions": ["a", "b", "c"],
            "ranking": [2, 1, 2],
            "labeler": "p",
            "time": "2025-03-01T10:00",
        },
    ]

    def read() -> None:
        import_rankings.ranking_metrics(read_rankings(f"{folder}/x.jsonl"))

    return folder / "x.jsonl", [lines(*rows)], read


def _feedback(folder: Path) -> tuple[Path, list[bytes], Callable]:
    rows = [
        {"prompt": "who?", "response": "the cat", "feedback": [[0.5, 1.0], [2, -1]]},
        {"prompt": TURNS[:1], "response": "é", "feedback": [[0.0, 1.0]]},
    ]
    model = tokenizer(folder)

    def read() -> None:
        read_feedback(str(folder / "x.jsonl"), model, 32)

    return folder / "x.jsonl", [lines(*rows)], read


def _metadata(folder: Path) -> tuple[Path, list[bytes], Callable]:
    rows = [
        {"prompt": "1 + 1", "answer": 2},
        {"prompt": [USER], "answer": None},
        {"prompt": "x", "size": 3, "seed": [1]},
    ]
    return (
        folder / "x.jsonl",
        [lines(*rows)],
        lambda: read_metadata(f"{folder}/x.jsonl"),
    )


def _principles(folder: Path) -> tuple[Path, list[bytes], Callable]:
    text = "Which is kinder?\n\nWhich is é?\n".encode()
    return folder / "x.txt", [text], lambda: read_lines(str(folder / "x.txt"))


def _conversations(rows: list[Any], room: int, folder: Path) -> Trial:
    """Rows of messages, rendered with our own template and cut to a length."""
    model = tokenizer(folder)

    def call(content: bytes) -> None:
        value = parse(content)
        if not isinstance(value, dict):
            return
        row = normalize("messages", value, {})
        chat.render(model, row["messages"])
        chat.render_prompt(model, row["messages"], room)

    seeds = dumped(*rows)
    return Trial(seeds, json_bytes(seeds), call)


def _package_table(folder: Path) -> tuple[Path, list[bytes], Callable]:
    """A table of jionlp, which is text in a ZIP file."""
    jionlp.write_table(folder, "x", [("高兴", "1.愉快。"), ("边境", "é")])
    file = folder / "x.zip"
    return file, [file.read_bytes()], lambda: list(chinese.rows_of(file, "x"))


file_reader(
    TABLE, "package_table", binary_bytes, _package_table, accepted=(ValueError,)
)
files_reader(TABLE, "preferences_folder", _preferences, examples=30)
file_reader(TABLE, "rankings", lines_bytes, _rankings)
file_reader(TABLE, "tamer_feedback", lines_bytes, _feedback)
file_reader(TABLE, "rule_metadata", lines_bytes, _metadata)
file_reader(
    TABLE,
    "principles",
    lambda seeds: text_bytes([s.decode() for s in seeds]),
    _principles,
)
_plain, _with_tools = ROWS["messages"][:-2], ROWS["messages"][-2:]
for _name, _rows, _room in (
    ("conversations", _plain, 24),
    ("conversations_with_tools", _with_tools, 1000),
):
    _read = functools.partial(_conversations, _rows, _room)
    TABLE[_name] = Reader(_read, 150, (BadRow, NotJson))
