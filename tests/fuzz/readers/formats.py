"""Readers of sources in formats that are copied or indexed, and of folders of `save_to_disk`."""

import functools
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from tests.fuzz.inputs import binary_bytes, json_bytes, text_bytes
from tests.fuzz.readers.rows import ROWS, read_twice
from tests.fuzz.readers.table import Strategy, Table, dumped, file_reader, lines

TABLE: Table = {}
_MESSAGES = pa.Table.from_pylist([{"messages": ROWS["messages"][0]["messages"]}] * 3)


def _stream(new: Callable = pa.ipc.new_stream) -> bytes:
    out = pa.BufferOutputStream()
    with new(out, _MESSAGES.schema) as writer:
        writer.write_table(_MESSAGES, max_chunksize=2)
    return out.getvalue().to_pybytes()


def _parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(_MESSAGES, out, row_group_size=2)
    return out.getvalue()


def _zst(content: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


def _file(
    name: str, seeds: list[bytes], kind: str, folder: Path
) -> tuple[Path, list[bytes], Callable]:
    file = folder / name
    return file, seeds, lambda: read_twice(str(file), kind=kind)


def _texts(seeds: list[bytes]) -> Strategy:
    return text_bytes([seed.decode() for seed in seeds], (",", '"', '""', "\t", "\r"))


_CSV = 'text,n\nthe cat,1\n"a ""b"", c",2\n"two\nlines",3\né🙂,4\n'.encode()
_LINES = lines(*ROWS["text"])
FILES: dict[str, tuple[str, Strategy, list[bytes], str, int]] = {
    "json_array": ("x.json", json_bytes, dumped(ROWS["messages"]), "messages", 60),
    "csv": ("x.csv", _texts, [_CSV], "text", 60),
    "tsv": ("x.tsv", _texts, [_CSV.replace(b",", b"\t")], "text", 30),
    "parquet": ("x.parquet", binary_bytes, [_parquet()], "messages", 30),
    "arrow_file": ("x.arrow", binary_bytes, [_stream(pa.ipc.new_file)], "messages", 30),
    "arrow_stream": ("x.arrow", binary_bytes, [_stream()], "messages", 30),
    "jsonl_gz": ("x.jsonl.gz", binary_bytes, [gzip.compress(_LINES)], "text", 30),
    "jsonl_zst": ("x.jsonl.zst", binary_bytes, [_zst(_LINES)], "text", 30),
}
for _name, (_title, _strategy, _seeds, _kind, _count) in FILES.items():
    _read = functools.partial(_file, _title, _seeds, _kind)
    file_reader(TABLE, f"format_{_name}", _strategy, _read, examples=_count)


def _saved(name: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    """A folder of `save_to_disk`, of which one description is bad."""
    inner = folder / "d" / "train"
    inner.mkdir(parents=True)
    (inner / "data-0.arrow").write_bytes(_stream())
    files = [{"filename": "data-0.arrow"}]
    contents = {
        "train/state.json": {"_data_files": files, "_split": None},
        "dataset_dict.json": {"splits": ["train"]},
    }
    for title, value in contents.items():
        (folder / "d" / title).write_text(json.dumps(value))
    file = folder / "d" / name
    seeds = [file.read_bytes()]
    return file, seeds, lambda: read_twice(f"{folder}/d", kind="messages")


for _name in ("train/state.json", "dataset_dict.json"):
    _read = functools.partial(_saved, _name)
    _key = f"saved_{Path(_name).stem}"
    file_reader(TABLE, _key, json_bytes, _read, examples=30)
