"""Indexes on disk: the rows of today, read once, kept until a file changes."""

import gzip
import itertools
import json
import logging
import os

import jax
import numpy as np
import pytest

from rlhfjax import paths
from rlhfjax.data import indexed, kept, tfds_records
from rlhfjax.data.accepted import accepted
from rlhfjax.data.loader import preference_batches, pretrain_batches
from rlhfjax.data.sources import Concatenated, open_source
from rlhfjax.errors import ConfigError, DataError
from tests.data.test_formats import as_csv, texts


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{file}"


def folders(cache):
    return sorted(file.name for file in cache.iterdir() if file.name[0] != ".")


LINES = (
    b'\xef\xbb\xbf{"text": "first"}\n\n'
    + b"".join(b'{"text": "row %d"}\n' % (i % 90) for i in range(120))
    + b'  {"text": ""} \n{"body": 1}\n{"text": "\xff"}\r\n[]\n{"text": "last"}'
)
PLAIN = b"\xef\xbb\xbfone\ntwo\n\n\n" + b"".join(b"row %d\n\n" % i for i in range(120))


def outcomes(spec, **options):
    """All rows with their places, and the number of bad rows, or the error; of every split."""
    found = []
    for split, bad in itertools.product(
        ("train", "validation", "test", "all"), ("error", "skip")
    ):
        try:
            source = open_source(spec, split=split, on_bad_row=bad, **options)
        except DataError as error:
            found.append(str(error))
        else:
            rows = [(source[i], source.locate(i)) for i in range(len(source))]
            found.append((source.skipped, rows))
    return found


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("content", "scheme", "options"),
    [
        (LINES, "jsonl", {}),
        (LINES, "jsonl", {"columns": {"text": "body"}}),
        (PLAIN, "text", {"documents": "line"}),
        (PLAIN, "text", {"documents": "paragraph"}),
        (PLAIN + b"a\0b\n\nc\xff\n", "text", {"documents": "paragraph"}),
    ],
)
def test_an_index_changes_no_row_no_order_no_split_and_no_error(
    tmp_path, monkeypatch, content, scheme, options, compress
):
    names = [tmp_path / "a", tmp_path / "b"]
    for name in names:
        name.write_bytes(content)
    expected = outcomes(f"{scheme}:{tmp_path}/[ab]", **options)
    monkeypatch.setattr(kept, "SMALL", -1)
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "cache"))
    pattern = f"{tmp_path}/[ab]"
    if compress:
        for name in names:
            name.with_suffix(".gz").write_bytes(gzip.compress(name.read_bytes()))
        pattern += ".gz"
    found = json.dumps(outcomes(f"{scheme}:{pattern}", **options))
    found = json.loads(found.replace(".gz", ""))
    assert found == json.loads(json.dumps(expected))


def test_conversations_have_the_same_splits_and_short_ones_are_left_out(
    tmp_path, cache
):
    rows = []
    for i in range(80):
        turns = [
            {"role": ("user", "assistant")[t % 2], "content": f"{i} {t}"}
            for t in range(1 + i % 4)
        ]
        rows.append({"messages": turns})
    spec = write(tmp_path / "x.jsonl", rows)
    options = {"kind": "messages", "min_turns": 3, "split": "train"}
    found = open_source(spec, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "SMALL", 2**20)
        expected = open_source(spec, **options)
    assert isinstance(found._records, indexed.Indexed)
    assert not isinstance(expected._records, indexed.Indexed)
    assert [found[i] for i in range(len(found))] == [
        expected[i] for i in range(len(expected))
    ]
    assert (found.skipped, 0) == (expected.skipped, 0)


def test_a_second_start_reads_no_row_and_another_question_reads_all(
    tmp_path, cache, reads
):
    rows = [{"text": f"row {i}", "body": f"b {i}"} for i in range(50)]
    (tmp_path / "x.csv").write_bytes(as_csv(rows))
    spec = f"{tmp_path}/x.csv"
    first = texts(open_source(spec))
    assert len(reads) == 1 + 50 + len(first)
    reads.clear()
    source = open_source(spec)
    assert reads == [0] and texts(source) == first  # the first row tells the form
    reads.clear()
    assert len(open_source(spec, split="all")) == 50 and reads == [0]
    reads.clear()
    open_source(spec, columns={"text": "body"})
    assert len(reads) == 1 + 50
    reads.clear()
    assert len(open_source(spec, split="all", validate=False)) == 50 and reads == [0]


def test_a_changed_file_is_indexed_anew_even_with_its_old_time(tmp_path, cache):
    file = tmp_path / "x.csv"
    file.write_bytes(b"text\ncat\n")
    status = file.stat()
    assert texts(open_source(str(file), split="all")) == ["cat"]
    file.write_bytes(b"text\ndog\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert texts(open_source(str(file), split="all")) == ["dog"]
    assert len(folders(cache)) == 2
    # What is read in place says so while it is read.
    spec = write(tmp_path / "y.jsonl", [{"text": "a cat"}] * 3)
    source = open_source(spec, split="all")
    write(tmp_path / "y.jsonl", [{"text": "a dog"}] * 3)
    with pytest.raises(DataError, match=r"y\.jsonl:2: the file has changed"):
        source[1]


def test_an_index_is_complete_or_absent(tmp_path, cache, monkeypatch):
    file = tmp_path / "x.json"
    file.write_text('[{"text": "a"}, {"text": "b"}')
    with pytest.raises(DataError, match="does not end"):
        open_source(str(file), split="all")
    assert folders(cache) == []
    file.write_text('[{"text": "a"}, {"text": "b"}]')

    def killed(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(paths, "remove", lambda folder: None)  # a killed process removes
        patch.setattr(indexed._Writer, "add", killed)  # nothing
        with pytest.raises(KeyboardInterrupt):
            open_source(str(file), split="all")
    assert any(".tmp-" in name.name for name in cache.iterdir())
    assert texts(open_source(str(file), split="all")) == ["a", "b"]
    assert not any(".tmp-" in name.name for name in cache.iterdir())


def test_the_folder_is_that_of_the_option_the_variable_or_the_home(
    tmp_path, cache, monkeypatch
):
    spec = write(tmp_path / "x.jsonl", [{"text": "a"}])
    open_source(spec, split="all", data_dir=tmp_path / "mine")
    assert len(folders(tmp_path / "mine")) == 1 and not cache.exists()
    monkeypatch.delenv(kept.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kept.cache_folder() == tmp_path / "xdg" / "rlhfjax" / "data"
    with pytest.raises(ConfigError, match="needs a folder on a local disk"):
        open_source(spec, split="all", data_dir="gs://bucket/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"RLHFJAX_DATA_CACHE or data_dir chooses"):
        open_source(spec, split="all", data_dir=tmp_path / "file")


def test_the_log_says_what_is_converted_how_large_it_is_and_where(
    tmp_path, cache, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "rlhfjax")
    monkeypatch.setattr(kept, "EVERY", 0.0)
    (tmp_path / "x.csv").write_bytes(as_csv([{"text": f"{i}"} for i in range(20)]))
    open_source(f"{tmp_path}/x.csv")
    assert f"converting {tmp_path}/x.csv (0.0 GB) in {cache}/" in caplog.text
    assert f"data: converting {tmp_path}/x.csv: 20 rows" in caplog.text
    assert f"reading 20 rows of {tmp_path}/x.csv, once: 50 %, 5s left" in caplog.text
    caplog.clear()
    open_source(f"{tmp_path}/x.csv")
    assert not caplog.text


def test_small_files_leave_nothing_behind(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(kept, "SMALL", 2**20)
    (tmp_path / "x.csv").write_bytes(as_csv([{"text": "a"}]))
    assert texts(open_source(f"{tmp_path}/x.csv", split="all")) == ["a"]
    assert not cache.exists()


def test_progress_tells_the_time_that_is_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "rlhfjax")
    times = iter([100.0, 105.0, 130.0, 131.0])
    monkeypatch.setattr(kept.time, "monotonic", lambda: next(times))
    progress = kept.Progress("work", 200)
    for done in (10, 50, 51):
        progress.at(done)
    assert [record.message for record in caplog.records] == [
        "data: work: 25 %, 1m30s left"
    ]


# ------------------------------------------------------------------ loaders


def test_batches_are_those_of_the_rows_in_memory_and_resume(
    tmp_path, cache, tokenizer, monkeypatch
):
    rows = [{"text": f"the cat {i} sat on the mat"} for i in range(60)]
    spec = write(tmp_path / "x.jsonl", rows)
    (tmp_path / "y.jsonl.gz").write_bytes(
        gzip.compress((tmp_path / "x.jsonl").read_bytes())
    )
    options = {"batch_size": 4, "length": 16, "seed": 3}

    def batches(spec):
        return pretrain_batches(open_source(spec, split="all"), tokenizer, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kept, "SMALL", 2**20)
        expected = list(itertools.islice(batches(spec), 9))
    loader = batches(spec)
    found = list(itertools.islice(loader, 5))
    again = batches(f"{tmp_path}/y.jsonl.gz")
    again.set_state(loader.get_state())
    found += itertools.islice(again, 4)
    for ours, theirs in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_largest_number_of_completions_is_read_once(
    tmp_path, cache, tokenizer, reads
):
    rows = [
        {"prompt": f"q {i}", "completions": ["a"] * k, "scores": [0] * k}
        for i, k in enumerate((2, 5, 3))
    ]
    write(tmp_path / "x.jsonl", rows)
    spec = f"{tmp_path}/x.jsonl"

    source = open_source(spec, kind="preferences", split="all")
    both = Concatenated([source, source])
    batches = preference_batches(both, tokenizer, batch_size=2, length=8)
    assert next(batches).tokens.shape == (2, 5, 8)
    reads.clear()
    source = open_source(spec, kind="preferences", split="all")
    preference_batches(source, tokenizer, batch_size=2, length=8)
    assert reads == [0]  # it tells the form


def test_a_large_dataset_of_tfds_is_read_once(data_dir, cache, monkeypatch, reads):
    read = []
    get = tfds_records.TfdsRecords.__getitem__

    def counted(records, index):
        read.append(index)
        return get(records, index)

    monkeypatch.setattr(tfds_records.TfdsRecords, "__getitem__", counted)
    options = {"split": "test", "data_dir": data_dir, "min_turns": 6}
    first = open_source("tfds:chitchat", **options)
    rows = [first[i] for i in range(3)]
    assert len(read) > len(first) > 3
    read.clear()
    again = open_source("tfds:chitchat", **options)
    assert read == [] or set(read) == {0}  # the first row tells the form
    assert len(again) == len(first)
    assert [again[i] for i in range(3)] == rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "SMALL", 2**40)
        small = open_source("tfds:chitchat", **options)
    assert len(small) == len(first) and small.locate(2) == first.locate(2)


def test_what_a_chat_template_refuses_is_found_once(
    tmp_path, cache, tokenizer, monkeypatch
):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
    system = {"role": "system", "content": "be brief"}
    rows = [{"messages": [system, *turns] if i == 2 else turns} for i in range(4)]
    spec = write(tmp_path / "x.jsonl", rows)
    monkeypatch.setattr(tokenizer.template, "source", "other than ours")
    calls = []

    def refuse(tokenizer, row):
        calls.append(row)
        if row["messages"][0]["role"] == "system":
            raise DataError("no system turns")

    def opened(on_bad_row):
        source = open_source(spec, kind="messages", split="all", on_bad_row=on_bad_row)
        return accepted(source, tokenizer, refuse)

    left = opened("skip")
    assert [left.locate(i)[-1] for i in range(3)] == ["1", "2", "4"]
    assert (len(left), left.skipped) == (3, 1)
    calls.clear()
    assert len(opened("skip")) == 3 and len(calls) == 1  # the reason, for the log
    with pytest.raises(DataError, match=r"x\.jsonl:3: no system turns"):
        opened("error")
