"""Formats of files: each is written by an independent writer and read with and without columns=."""

import csv
import gzip
import io
import json
import typing

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from rlhfjax.data import formats
from rlhfjax.data.sources import open_source
from rlhfjax.errors import ConfigError, DataError

TEXTS = ["the cat sat", 'a "quoted", word', "two\nlines", "é🙂 x", "1.50"]
ROWS = [{"text": text, "body": f"{text}!"} for text in TEXTS]


def as_csv(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_arrow(rows, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(rows)
    out = pa.BufferOutputStream()
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue().to_pybytes()


def as_parquet(rows):
    out = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), out, row_group_size=3)
    return out.getvalue().to_pybytes()


def as_zst(content):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


WRITERS = {
    "jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "parquet": as_parquet,
    "arrow": as_arrow,
    "feather": lambda rows: as_arrow(rows, pa.ipc.new_stream),
}
COMPRESSED = {"": lambda content: content, ".gz": gzip.compress, ".zst": as_zst}


def texts(source):
    return [source[i]["text"] for i in range(len(source))]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", WRITERS)
def test_a_format_is_read_with_and_without_columns(tmp_path, name, compression):
    file = tmp_path / f"rows.{name}{compression}"
    file.write_bytes(COMPRESSED[compression](WRITERS[name](ROWS)))
    assert texts(open_source(str(file), split="all")) == TEXTS
    columns = {"text": "body", "short": "text"}
    source = open_source(str(file), split="all", columns=columns)
    assert [source[i] for i in range(len(source))] == [
        {"text": f"{text}!", "short": text} for text in TEXTS
    ]


@pytest.mark.parametrize("compression", COMPRESSED)
def test_text_is_read_compressed_too(tmp_path, compression):
    file = tmp_path / f"a.txt{compression}"
    content = "\ufeffone\ntwo\n\nthré\n".encode()
    file.write_bytes(COMPRESSED[compression](content))
    source = open_source(str(file), documents="paragraph", split="all")
    assert texts(source) == ["one\ntwo", "thré"]
    assert source.locate(1) == f"{file}:4"


@pytest.mark.parametrize("name", ["csv", "json", "parquet", "jsonl"])
def test_every_format_gives_the_splits_of_json_lines(tmp_path, name):
    rows = [{"text": f"row {i % 250}"} for i in range(300)]
    for other in ("jsonl", name):
        (tmp_path / f"x.{other}").write_bytes(WRITERS[other](rows))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(WRITERS["jsonl"](rows)))
    for split in ("train", "validation", "test"):
        expected = texts(open_source(f"jsonl:{tmp_path}/x.jsonl", split=split))
        for file in (f"x.{name}", "x.jsonl.gz"):
            assert texts(open_source(f"{tmp_path}/{file}", split=split)) == expected


def test_messages_and_preferences_keep_their_structure_in_parquet_and_arrow(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns}, {"messages": [turns[0]]}]
    pairs = [{"prompt": "q", "completions": ["a", "b", "c"], "scores": [1.5, -2, 0]}]
    for name in ("parquet", "arrow", "json"):
        (tmp_path / f"m.{name}").write_bytes(WRITERS[name](rows))
        source = open_source(f"{tmp_path}/m.{name}", kind="messages", split="all")
        assert [source[0], source[1]] == rows
        (tmp_path / f"p.{name}").write_bytes(WRITERS[name](pairs))
        source = open_source(f"{tmp_path}/p.{name}", kind="preferences", split="all")
        assert source[0] == pairs[0]
    encoded = [{"messages": json.dumps(turns), "id": "7"}]
    (tmp_path / "m.csv").write_bytes(as_csv(encoded))
    columns = {"messages": "messages", "number": "id"}
    source = open_source(
        f"{tmp_path}/m.csv", kind="messages", split="all", columns=columns
    )
    assert source[0] == {"messages": turns, "number": "7"}


def test_several_files_and_a_split_in_their_names(tmp_path):
    for split in ("train", "test"):
        for part in "ab":
            rows = [{"text": f"{split} {part} {i}"} for i in range(2)]
            (tmp_path / f"{split}-{part}.csv").write_bytes(as_csv(rows))
    source = open_source(f"csv:{tmp_path}/{{split}}-*.csv", split="test")
    assert texts(source) == ["test a 0", "test a 1", "test b 0", "test b 1"]
    assert source.locate(3) == f"{tmp_path}/test-b.csv:3"
    (tmp_path / "more.csv.gz").write_bytes(gzip.compress(as_csv([{"text": "more"}])))
    assert len(open_source(f"{tmp_path}/*.csv*", format="csv", split="all")) == 9


def test_times_bytes_and_nan_of_parquet_are_what_json_can_hold(tmp_path, caplog):
    import datetime

    rows = {
        "text": pa.array([b"a", b"b"]),
        "time": pa.array([datetime.datetime(2024, 1, 2), None]),
        "score": pa.array([float("nan"), 1.0]),
        "image": pa.array([b"\xff\xd8", b"c"]),
    }
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "x.parquet")
    columns = {"text": "text", "time": "time", "score": "score"}
    source = open_source(f"{tmp_path}/x.parquet", split="all", columns=columns)
    assert [source[0], source[1]] == [
        {"text": "a", "time": "2024-01-02T00:00:00", "score": None},
        {"text": "b", "time": None, "score": 1.0},
    ]
    assert "column 'image' is left out of rows" in caplog.text
    with pytest.raises(DataError, match=r"x\.parquet: row 1: no column 'image', found"):
        open_source(f"{tmp_path}/x.parquet", split="all", columns={"text": "image"})


# ------------------------------------------------------------------ names


def test_the_table_is_what_the_option_and_the_error_name():
    assert set(formats.FORMATS) == set(typing.get_args(formats.FormatName))
    for name in formats.FORMATS:
        assert f"{name}:GLOB" in formats.SPECS


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("csv:x", ("csv", "x")),
        ("a/b.jsonl.zst", ("jsonl", "a/b.jsonl.zst")),
        ("*.tsv.gz", ("tsv", "*.tsv.gz")),
        ("hf-dataset:a/b/c", ("hf-dataset", "a/b/c")),
        ("x:y.json", ("json", "x:y.json")),
        ("text:x.csv", ("text", "x.csv")),
        ("gs://bucket/x.parquet", ("parquet", "gs://bucket/x.parquet")),
    ],
)
def test_a_spec_is_a_scheme_or_a_name_with_an_ending(spec, expected):
    assert formats.parse(spec) == expected


def test_format_names_that_of_files_whose_names_do_not(tmp_path):
    file = tmp_path / "rows"
    file.write_bytes(WRITERS["csv"](ROWS))
    assert texts(open_source(str(file), format="csv", split="all")) == TEXTS
    with pytest.raises(ConfigError, match="expected tfds:NAME"):
        open_source(str(file), split="all")
    with pytest.raises(ConfigError, match="format='csv' contradicts jsonl:"):
        open_source(f"jsonl:{file}", format="csv")
    with pytest.raises(ConfigError, match="format 'xml' is none of jsonl, json"):
        open_source(str(file), format="xml")
    (tmp_path / "rows.csv").write_bytes(WRITERS["csv"](ROWS))
    file.unlink()
    assert texts(open_source(f"{tmp_path}/*", split="all")) == TEXTS


# ------------------------------------------------------------------ what is wrong with a file


def check(file, kind_of_row, good, **options):
    """One bad row: an error with its place, or one row less."""
    place, why = kind_of_row
    with pytest.raises(DataError) as error:
        open_source(str(file), split="all", **options)
    message = str(error.value)
    assert message.startswith(f"{file}{place}: ") and why in message
    assert len(message.splitlines()) == 1
    source = open_source(str(file), split="all", on_bad_row="skip", **options)
    assert (texts(source), source.skipped) == (good, 1)


@pytest.mark.parametrize(
    ("row", "place", "why"),
    [
        ("b,2,3", ":4", "3 fields for the 2 columns of the first row"),
        ("b", ":4", "1 fields for the 2 columns"),
        ('"b"x,2', ":4", "',' expected after '\"'"),
        ('"b\ncc",2,3', ":4", "3 fields for the 2 columns"),
        (" ,2", ":4", "column 'text' is empty"),
        ("b\udcff,2", ":4", "column 'text': invalid UTF-8"),
    ],
)
def test_a_bad_row_of_csv_has_its_line(tmp_path, row, place, why):
    file = tmp_path / "x.csv"
    text = f'text,n\n"a\na",1\n{row}\nc,3\n'
    file.write_bytes(text.encode(errors="surrogateescape"))
    check(file, (place, why), ["a\na", "c"])


@pytest.mark.parametrize(
    ("element", "why"),
    [
        ('{"text": NaN}', "JSON has no NaN"),
        ('{"text" "a"}', "expected `:`"),
        ('"just text"', "expected a JSON object, got str"),
        ('{"text": ["a"}', "not a JSON object"),
        ("", "not a JSON object"),
        ('{"body": "a"}', "no column 'text', found body"),
    ],
)
def test_a_bad_element_of_a_json_array_has_its_number(tmp_path, element, why):
    file = tmp_path / "x.json"
    if element == '{"text": ["a"}':  # brackets that do not match
        element = '{"text": [}]'
    file.write_text(f'[ {{"text": "a,]"}},\n{element}, {{"text": "c"}}\n]\n')
    check(file, (": row 2", why), ["a,]", "c"])


def test_a_bad_row_of_parquet_has_its_number(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(as_parquet([{"text": "a"}, {"text": None}, {"text": "c"}]))
    check(file, (": row 2", "column 'text' must be text"), ["a", "c"])
    table = pa.table({"text": pa.array([b"a", b"\xff", b"c"]).cast(pa.binary())})
    invalid = table.column(0).chunk(0).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": invalid}), file)
    check(file, (": row 2", "invalid UTF-8"), ["a", "c"])


DAMAGED = {
    "a.jsonl.gz": (gzip.compress(WRITERS["jsonl"](ROWS * 99))[:-30], "not a whole comp"),
    "b.jsonl.gz": (b"no gzip", "not a whole compressed file"),
    "c.csv.zst": (as_zst(as_csv(ROWS * 99))[:-9], "not a whole compressed file"),
    "d.txt.zst": (b"no zstd at all", "not a whole compressed file"),
    "e.parquet": (as_parquet(ROWS)[:-20], "not a whole Parquet file"),
    "f.parquet": (b"", "not a whole Parquet file"),
    "g.arrow": (as_arrow(ROWS)[:-20], "not a whole Arrow file"),
    "h.arrow": (as_arrow(ROWS, pa.ipc.new_stream)[:-8], "the stream has no end"),
    "i.arrow": (b"", "not a whole Arrow file"),
    "j.json": (b'[{"text": "a"}, {"text": "b"}', "the array does not end"),
    "k.json": (b'[{"text": "a"}] x', "byte 16: text after the end"),
    "l.json": (b'{"text": "a"}\n', "jsonl:FILE reads one object per line"),
    "m.json": (b" ", "it begins with an empty file"),
    "n.json": (b'[{"text": "a}]', "a quote or a bracket is missing"),
    "o.csv": (b'text\na\n"b\nc\n', "o.csv:3: a quoted field without an end"),
    "p.csv": (b"text,text\na,b\n", "p.csv:1: 'text' names no column, or two"),
    "q.csv": (b"PAR1\0\0\x15", "q.csv: it is Parquet"),
    "r.tsv": ("text\na\n".encode("utf-16"), "r.tsv: it is UTF-16"),
    "s.parquet.gz": (gzip.compress(as_parquet(ROWS))[:-9], "not a whole compressed"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_also_where_rows_may_be_skipped(tmp_path, name):
    content, why = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError) as error:
            open_source(f"{tmp_path}/{name}", split="all", on_bad_row=on_bad_row)
        message = str(error.value)
        assert why in message and str(tmp_path / name) in message
        assert len(message.splitlines()) == 1


def test_elements_larger_than_what_is_read_at_a_time(tmp_path, monkeypatch):
    from rlhfjax.data import json_array

    monkeypatch.setattr(json_array, "_PART", 3)
    rows = [{"text": "x" * n + '\\"],{' + "é" * n} for n in range(12)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        content = text.encode()
        found = list(json_array.elements(io.BytesIO(content)))
        assert [json.loads(element) for _, element in found] == rows
        for start, element in found:
            assert content[start : start + len(element)] == element
    assert list(json_array.elements(io.BytesIO(b" [ ] "))) == []
    monkeypatch.setattr(json_array, "LARGEST", 20)
    with pytest.raises(json_array.Damaged, match="row 2 is larger than 0 MB"):
        list(json_array.elements(io.BytesIO(b'[1, "' + b"x" * 99)))


def test_an_empty_table_has_no_rows(tmp_path):
    for name, content in (("a.csv", b"text\n"), ("b.json", b"[]"), ("c.csv", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="no rows are left of 0"):
            open_source(f"{tmp_path}/{name}", split="all")


CSV_OF_KINDS = {  # the fields of a CSV row -> the same row as JSON has it
    "preferences": (
        {"prompt": "Hi", "completions": '["a", "b"]', "scores": "[2, -1.5]"},
        {"prompt": "Hi", "completions": ["a", "b"], "scores": [2, -1.5]},
    ),
    "pair": (
        {"prompt": "12", "chosen": "true", "rejected": "[1]", "margin": "0.5"},
        {"prompt": "12", "chosen": "true", "rejected": "[1]", "margin": 0.5},
    ),
    "kto": (
        {"prompt": "Hi", "completion": "5", "label": "False"},
        {"prompt": "Hi", "completion": "5", "label": False},
    ),
    "stepwise": (
        {"prompt": "Hi", "completions": '["a", "b"]', "labels": "[1, 0]"},
        {"prompt": "Hi", "completions": ["a", "b"], "labels": [1, 0]},
    ),
}


@pytest.mark.parametrize("form", CSV_OF_KINDS)
def test_fields_of_csv_that_are_no_text_hold_json(form, tmp_path):
    """What is a text stays one, also where it looks like a number or a list."""
    fields, row = CSV_OF_KINDS[form]
    (tmp_path / "x.csv").write_bytes(as_csv([fields]))
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    read, expected = (
        open_source(f"{tmp_path}/x.{ending}", form=form, split="all")[0]
        for ending in ("csv", "jsonl")
    )
    assert read == expected
