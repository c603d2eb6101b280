"""Files that are not what a source expects: one line says where and what is accepted."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import socket
import time

import pytest

from rlhfjax import network, paths
from rlhfjax.data import corpora
from rlhfjax.data.config import open_preferences
from rlhfjax.data.preferences import read_preferences, write_preferences
from rlhfjax.data.rows import MOST_COMPLETIONS, BadRow, normalize
from rlhfjax.data.sources import open_source
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.rewards.feedback import read_lines
from rlhfjax.rewards.rankings import read_rankings
from rlhfjax.rewards.rules import read_metadata

ROW = b'{"text": "a cat"}\n'
PAIR = {"prompt": "q", "completions": ["a", "b"], "scores": [1, 0]}
STORED = {**PAIR, "prompt_tokens": [1], "completion_tokens": [[2], [3]]}
RANKING = {"prompt": "q", "completions": ["a", "b"], "ranking": [1, 2]}
NOT_IDS = [[-1], [2**31], [10**300], [1.0], [True], [1, True], [[1]], [[1], [2, 3]]]
NOT_IDS += [["1"], 1, None, {}, [None], "12", [[]]]
JSON = {
    "a number of 400 digits": (b"9" * 400, "beyond the range of float64"),
    "a number of 5,000 digits": (b"9" * 5000, "number out of range"),
    "an exponent": (b"1e400", "beyond the range of float64"),
    "lists": (b"[" * 200_000, "recursion limit"),
    "objects": (b'{"a":' * 200_000, "recursion limit"),
    "NaN": (b"NaN", "JSON has no NaN"),
    "-Infinity": (b"-Infinity", "not a JSON object"),
    "half a pair": (b'"\\ud800"', "lone surrogate"),
    "half a pair, raw": (b'"\xed\xa0\x80"', "invalid UTF-8 at byte 10"),
    "latin-1": (b'"caf\xe9"', "invalid UTF-8 at byte 13"),
    "a NUL byte": (b'"a\0b"', "control character"),
    "half": (b'"a', "EOF while parsing"),
    "a bool": (b"true", "must be text, got bool"),
}


@pytest.mark.parametrize("name", JSON)
def test_every_json_that_is_not_strict_is_named_by_line_or_skipped(tmp_path, name):
    value, why = JSON[name]
    file = tmp_path / "r.jsonl"
    file.write_bytes(ROW + b'{"text": ' + value + b"}\n" + ROW)
    with pytest.raises(DataError, match=why) as error:
        open_source(f"jsonl:{file}", split="all")
    message = str(error.value)
    assert message.startswith(f"{file}:2: ") and len(message.splitlines()) == 1
    assert len(message) < len(str(file)) + 300
    source = open_source(f"jsonl:{file}", split="all", on_bad_row="skip")
    assert (len(source), source.skipped) == (2, 1)


@pytest.mark.parametrize("column", ["prompt_tokens", "token_counts", "tokens", "ranks"])
@pytest.mark.parametrize("ids", NOT_IDS, ids=str)
def test_ids_are_whole_numbers_of_32_bits(column, ids):
    packed = {"prompt_tokens": [1], "tokens": [1, 2], "token_counts": [1, 1]}
    assert len(normalize("preferences", PAIR | packed, {})["completion_tokens"]) == 2
    with pytest.raises(BadRow, match=f"column {column!r} must"):
        normalize("preferences", PAIR | packed | {column: ids}, {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"token_counts": [1, 2], "tokens": [1, 2]}, "add up to 3 of 2 tokens"),
        ({"token_counts": [1], "tokens": [1]}, "2 completions but 1"),
        ({"token_counts": [1, 1]}, "go together"),
        ({"scores": [1e300, 0]}, "in the range of float32, got 1e\\+300"),
        ({"scores": [10**300, 0]}, "in the range of float32"),
        ({"scores": ["1", "0"]}, "got '1'"),
        ({"ranks": [0, 1]}, "2 whole numbers from 1"),
        ({"ranks": [1, 2, 3]}, "2 whole numbers from 1"),
        ({"labeler": 3}, "column 'labeler' must be text"),
        ({"completions": {"a": 1}}, "must be a list, got dict"),
        (
            {"completions": ["a"] * (MOST_COMPLETIONS + 1)},
            f"at most {MOST_COMPLETIONS}",
        ),
        ({"prompt": {"role": ["user"], "content": []}}, "1 roles for 0 contents"),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "'role' must be text"),
    ],
)
def test_a_row_of_preferences_that_means_nothing_is_refused(change, why):
    with pytest.raises(BadRow, match=why):
        normalize("preferences", PAIR | {"prompt_tokens": [1]} | change, {})


@pytest.mark.parametrize("text", ['[{"role": "user", "content": ', '[{"role":NaN}]'])
def test_a_conversation_as_damaged_json_is_not_a_prompt(text):
    with pytest.raises(BadRow, match="neither a list of messages nor its JSON"):
        normalize("prompt", {"prompt": text}, {})


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"": "text"}, "text"),
        ({"chosen": "a", "scores": "b"}, "preferences"),
        ({"messages": "a"}, "prompt"),
    ],
)
def test_columns_that_mean_nothing_are_config_errors(tmp_path, columns, kind):
    (tmp_path / "a.jsonl").write_bytes(ROW)
    with pytest.raises(ConfigError, match="source: columns"):
        open_source(f"jsonl:{tmp_path}/a.jsonl", kind=kind, columns=columns)


@pytest.mark.parametrize("scheme", ["jsonl", "text"])
@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (gzip.compress(ROW, mtime=0), "gunzip"),
        (bz2.compress(ROW), "bunzip2"),
        (lzma.compress(ROW), "unxz"),
        (b"\x28\xb5\x2f\xfd\x04\x58", "unzstd"),
        (b"PK\x03\x04\x14\0", "unzip"),
        (b"PAR1\x15\0", "read_parquet"),
        (b"ARROW1\0\0", "read_feather"),
        (ROW.decode().encode("utf-16"), "iconv -f UTF-16"),
        (ROW.decode().encode("utf-32"), "iconv -f UTF-32"),
    ],
)
def test_other_formats_name_the_file_and_the_tool(tmp_path, scheme, content, remedy):
    (tmp_path / "a").write_bytes(content)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=f"{tmp_path}/a: it is .*{remedy}"):
            open_source(f"{scheme}:{tmp_path}/a", split="all", on_bad_row=on_bad_row)


@pytest.mark.parametrize("text", ["PARIS", "PK", "BZh is a name", "%PDF- is a mark"])
def test_text_may_begin_as_another_format_does(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert open_source(f"text:{tmp_path}/a", split="all")[0] == {"text": text}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (json.dumps([{"text": "a"}]).encode(), "got list; one object per line"),
        (json.dumps({"text": "a"}, indent=1).encode(), "expected one object per line"),
        (ROW.replace(b"\n", b"\r") * 2, "lines end in CR, expected LF"),
        (b"\n" + codecs.BOM_UTF8 + ROW, "byte-order mark in the middle"),
    ],
)
def test_files_without_one_object_per_line_say_so(tmp_path, content, why):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    for read in (lambda: open_source(f"jsonl:{file}", split="all"),
                 lambda: read_rankings(str(file)), lambda: read_metadata(str(file))):  # fmt: skip
        with pytest.raises(DataError, match=why):
            read()


def test_a_byte_order_mark_may_begin_a_file_and_a_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "a").write_bytes(codecs.BOM_UTF8 + ROW + ROW[:-1])
    assert len(open_source(f"jsonl:{tmp_path}/a", split="all")) == 2


@pytest.mark.parametrize("documents", ["line", "paragraph"])
def test_text_with_cr_or_nul_is_refused(tmp_path, documents):
    for content, why in ((b"a\rb\r", "lines end in CR"), (b"a\0b", "a NUL byte")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(DataError, match=f"a:1: {why}"):
            open_source(f"text:{tmp_path}/a", split="all", documents=documents)


def test_a_file_that_changes_is_an_error_and_one_that_grows_is_not(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(ROW * 3)
    source = open_source(f"jsonl:{file}", split="all")
    file.write_bytes(ROW * 4)
    assert source[2] == {"text": "a cat"}
    for content in (ROW * 2, ROW.replace(b"cat", b"dog") * 3):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl:3: the file has changed"):
            source[2]
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl:3: No such file"):
        source[2]


NAMES = ["fifo", "loop", "folder", "x" * 300, "a\0b", "none"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:6])
def test_what_is_no_file_is_one_line_for_every_reader(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    file = f"{tmp_path}/{name}"
    for read in (lambda: open_source(f"jsonl:{file}"), lambda: open_source(f"text:{file}"),
                 lambda: open_source(f"tfds:{file}"), lambda: read_rankings(file),
                 lambda: read_metadata(file), lambda: read_lines(file),
                 lambda: load_tokenizer(file)):  # fmt: skip
        with pytest.raises((ConfigError, DataError)) as error:
            read()
        assert len(str(error.value).splitlines()) == 1


FOLDERS = ["runs[1]", "2026-11-29T10:00:00", "a+b & c, d", "{split}", "what?", "*"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_exists_is_taken_literally(tmp_path, folder):
    for name in (folder, "runs1", "whatx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": name}))
    files = ["*.jsonl", "train.jsonl"] if folder != "{split}" else ["train.jsonl"]
    for file in files:
        source = open_source(f"jsonl:{tmp_path}/{folder}/{file}", split="all")
        assert [source[i]["text"] for i in range(len(source))] == [folder]


def test_loops_and_chains_of_links_end(tmp_path):
    chain = [tmp_path / str(i) for i in range(40)]
    for folder, following in zip(chain, [*chain[1:], tmp_path], strict=True):
        folder.mkdir()
        for name in ("x", "y"):
            os.symlink(following, folder / name)
    (chain[-1] / "f").write_text("a")
    found = paths.glob(f"{tmp_path}/**/**/f")
    assert chain[-1] / "f" in found and len(found) < 100


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "2026-11-29T10:00:00"
    write_preferences(folder, {"train": [STORED] * 3}, labeler="a")
    return folder


def test_a_folder_of_preferences_may_have_a_colon(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(open_preferences((folder.name,), "train")) == 3


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 200_000, b'{"a": NaN}'])
def test_a_damaged_description_of_a_dataset_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_preferences(folder)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name"])
def test_a_dataset_imports_no_module_of_others(key, folder, tmp_path, monkeypatch):
    """TFDS imports the module of every class that a dataset names."""
    (tmp_path / "wicked.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    text = (folder / "features.json").read_text()
    name = '"tensorflow_datasets.core.features.text_feature.Text"'
    assert f'"pythonClassName": {name}' in text
    text = text.replace(f'"pythonClassName": {name}', f'"{key}": "wicked.Text"', 1)
    (folder / "features.json").write_text(text)
    with pytest.raises(DataError, match=f"{key} is 'wicked.Text': accepted are"):
        read_preferences(folder)
    # Nor one of TFDS itself that nothing has imported.
    text = text.replace("wicked.Text", "tensorflow_datasets.core.features.wicked.Text")
    (folder / "features.json").write_text(text)
    with pytest.raises(DataError, match="accepted are classes of"):
        read_preferences(folder)


def test_a_missing_shard_is_missing_and_a_cut_one_is_not_whole(folder):
    (shard,) = folder.glob("preferences-train*")
    content = shard.read_bytes()
    for cut in (b"", content[:1000], content[:-1]):
        shard.write_bytes(cut)
        with pytest.raises(DataError, match="not a whole file"):
            read_preferences(folder)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard} is missing"):
        read_preferences(folder)


def test_a_dataset_of_the_catalogue_fails_in_seconds_without_a_network(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(network, "SECONDS", 0.2)
    monkeypatch.setattr(network, "_connect", lambda *arguments: time.sleep(5))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(DataError, match=r"www\.statmt\.org does not answer") as error:
        open_source("tfds:lm1b", data_dir=tmp_path)
    assert time.monotonic() - start < 5 and corpora.OFFLINE in str(error.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("ranking", [True, 1]),
        ("ranking", [10**300, 1]),
        ("ranking", [1001, 1]),
        ("time", 5),
        ("time", "yesterday"),
        ("labeler", []),
        ("prompt", [{"role": ["user"], "content": "x"}]),
        ("prompt", [{"role": "assistant", "content": "x"}]),
        ("completions", ["a"] * 1001),
    ],
)
def test_a_ranking_that_means_nothing_is_named_by_line(tmp_path, column, value):
    row = RANKING | {column: value}
    if column == "completions":
        row["ranking"] = [1] * len(value)
    (tmp_path / "a").write_text(json.dumps(RANKING) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match=f"^{tmp_path}/a:2: "):
        read_rankings(f"{tmp_path}/a")
