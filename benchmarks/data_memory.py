"""Measures how much memory a large file of data takes: opening, converting, reading and batching.

    python -m benchmarks.data_memory [--gb=2] [--row_bytes=1000] [FORMAT...]
    python -m benchmarks.data_memory --stage=pretrain [--gb=2] [--small_gb=0.02] [FORMAT...]
    python -m benchmarks.data_memory --stage=prepare [--gb=0.2] [--small_gb=0.02] [FORMAT...]
    python -m benchmarks.data_memory --stage=tokenizer [--gb=0.2] [--small_gb=0.02] [FORMAT...]

prints a line of a Markdown table per format (by default all of FORMATS). Each file has --gb
gigabytes on disk and lies, with its index, in a temporary folder that is removed (--folder says
where: up to four times the size is needed). A separate process opens the file twice, reads 20,000
rows at random and makes 8 pretraining batches of 16 rows of 512 tokens. The growth is its peak of
resident memory less what it holds after its imports.

With --stage, `rlhfjax train` runs a stage on a file of --small_gb gigabytes and on one of --gb,
twice on each with an empty workdir: the second start finds the index. `tokenizer` trains 8,000
pieces, `pretrain` a tiny model for --steps steps; `prepare` removes equal and nearly equal rows.
Printed are the peaks of resident memory of the whole process, and its seconds.
"""

import argparse
import contextlib
import csv
import gzip
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from rlhfjax import json_text

READS, BATCHES, ROWS, LENGTH = 20_000, 8, 16, 512
_BLOCK = 2_000  # rows that are written at a time


def texts(row_bytes: int) -> Iterator[str]:
    """Yields texts of random words, without end."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    for number in iter(int, 1):
        count = round(row_bytes / 6.5 * rng.uniform(0.5, 1.5)) + 1
        yield f"{number} {' '.join(rng.choices(words, k=count))}"


def _blocks(row_bytes: int) -> Iterator[list[str]]:
    source = texts(row_bytes)
    while True:
        yield [next(source) for _ in range(_BLOCK)]


def _lines(block: list[str]) -> bytes:
    return b"".join(
        json_text.encode({"text": text}, "row").encode() + b"\n" for text in block
    )


def _csv(block: list[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([text, len(text)] for text in block)
    return out.getvalue().encode()


def _write(
    file: Path, size: int, row_bytes: int, encode: Callable, head: bytes = b""
) -> None:
    with contextlib.ExitStack() as stack:
        out: Any = stack.enter_context(file.open("wb"))
        if file.suffix == ".gz":
            out = stack.enter_context(gzip.GzipFile("", "wb", 1, out))
        out.write(head)
        for block in _blocks(row_bytes):
            out.write(encode(block))
            if file.stat().st_size >= size:
                return


def _write_jsonl(file: Path, size: int, row_bytes: int) -> None:
    _write(file, size, row_bytes, _lines)


def _write_csv(file: Path, size: int, row_bytes: int) -> None:
    _write(file, size, row_bytes, _csv, b"text,n\r\n")


def _write_parquet(file: Path, size: int, row_bytes: int) -> None:
    schema = pa.schema([("text", pa.string())])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for block in _blocks(row_bytes):
            writer.write_table(pa.table({"text": block}), row_group_size=_BLOCK)
            if file.stat().st_size >= size:
                return


FORMATS = {
    "jsonl": _write_jsonl,
    "jsonl.gz": _write_jsonl,
    "csv": _write_csv,
    "parquet": _write_parquet,
}


def resident(field: str = "VmRSS") -> float:
    """Returns this process's resident memory in MB; "VmHWM": its peak."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1000


def measure(file: str, tokenizer_file: str) -> dict[str, float]:
    """Opens a file twice, reads rows at random and makes batches; returns seconds and MB."""
    from rlhfjax.data.loader import pretrain_batches
    from rlhfjax.data.sources import open_source
    from rlhfjax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_file)
    before = resident()
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        source = open_source(file, split="train")
        seconds.append(time.monotonic() - start)
    rng = random.Random(0)
    start = time.monotonic()
    for _ in range(READS):
        source[rng.randrange(len(source))]
    per_row = (time.monotonic() - start) / READS
    options = {"batch_size": ROWS, "length": LENGTH, "seed": 0}
    batches = pretrain_batches(source, tokenizer, **options)
    for _ in range(BATCHES):
        next(batches)
    return {
        "rows": len(source),
        "first open, s": seconds[0],
        "second open, s": seconds[1],
        "a row, us": 1e6 * per_row,
        "growth, MB": resident("VmHWM") - before,
    }


_PRETRAIN = """
from rlhfjax.stages import stage_config

def get_config():
    model = dict(vocab_size=1000, d_model=32, n_layers=1, n_heads=1, d_ff=64, max_length=512)
    return stage_config(
        "pretrain",
        tokenizer="{tokenizer}",
        model=model,
        sources=({{"spec": "{file}"}},),
        eval_sources=({{"spec": "{file}", "split": "validation", "limit": 100}},),
        length={length},
        batch_size={rows},
        steps={steps},
    )
"""
_PREPARE = """
from rlhfjax.stages import stage_config

def get_config():
    sources = ({{"spec": "{file}", "split": "all"}},)
    return stage_config("prepare", sources=sources, near={{"threshold": 0.8}})
"""
_TOKENIZER = """
from rlhfjax.stages import stage_config

def get_config():
    sources = ({{"spec": "{file}"}},)
    return stage_config("tokenizer", sources=sources, vocab_size=8000)
"""
STAGES = {"tokenizer": _TOKENIZER, "pretrain": _PRETRAIN, "prepare": _PREPARE}


def run_stage(folder: Path, experiment: str) -> list[float]:
    """Runs an experiment in a separate process; returns its peak in MB, and its seconds."""
    file = folder / "experiment.py"
    file.write_text(experiment)
    workdir = folder / "run"
    command = [sys.executable, "-m", "rlhfjax", "train", f"--config={file}"]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"], env=_variables(folder), stdout=sys.stderr
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    shutil.rmtree(workdir, ignore_errors=True)
    if status:
        raise SystemExit(f"{command}: exit status {status}")
    return [usage.ru_maxrss * 1024 / 1e6, seconds]


def _variables(folder: Path) -> dict[str, str]:
    cache = str(folder / "cache")
    return os.environ | {"JAX_PLATFORMS": "cpu", "RLHFJAX_DATA_CACHE": cache}


def _measure_apart(folder: Path, file: Path, tokenizer: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_memory", "--child", str(file)]
    result = subprocess.run(
        [*command, str(tokenizer)],
        env=_variables(folder),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json_text.parse(result.stdout.splitlines()[-1])


def _make(folder: Path, name: str, gb: float, row_bytes: int) -> tuple[Path, Path]:
    """Writes a file and a tokenizer for it; returns both."""
    from rlhfjax.data.tokenizer import train_sentencepiece

    source = texts(row_bytes)
    sample = [next(source) for _ in range(2000)]
    with contextlib.redirect_stdout(sys.stderr):
        train_sentencepiece(sample, folder / "tokenizer", vocab_size=1000)
    file = folder / f"data.{name}"
    FORMATS[name](file, round(gb * 1e9), row_bytes)
    return file, folder / "tokenizer"


def _print_row(*values: str | float) -> None:
    cells = [value if isinstance(value, str) else f"{value:,.0f}" for value in values]
    print("|", " | ".join(cells), "|", flush=True)


def _print_head(*names: str) -> None:
    _print_row(*names)
    print("|---" * len(names) + "|")


def _measure_reading(options: argparse.Namespace) -> None:
    is_first = True
    for name in options.formats or FORMATS:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            file, tokenizer = _make(folder, name, options.gb, options.row_bytes)
            size = file.stat().st_size / 1e9
            measured = _measure_apart(folder, file, tokenizer)
        if is_first:
            _print_head("format", "GB", *measured)
        is_first = False
        _print_row(name, f"{size:.2f}", *measured.values())


def _measure_stage(options: argparse.Namespace) -> None:
    starts = "first start, MB", "s", "second start, MB", "s"
    _print_head("format", "GB", *starts)
    for name in options.formats or FORMATS:
        for gb in (options.small_gb, options.gb):
            with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
                folder = Path(temporary)
                file, tokenizer = _make(folder, name, gb, options.row_bytes)
                size = file.stat().st_size / 1e9
                experiment = STAGES[options.stage].format(
                    file=file,
                    tokenizer=tokenizer,
                    length=LENGTH,
                    rows=ROWS,
                    steps=options.steps,
                )
                values = run_stage(folder, experiment)
                values += run_stage(folder, experiment)
            _print_row(name, f"{size:.2f}", *values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_memory")
    parser.add_argument("formats", nargs="*", metavar="FORMAT")
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--row_bytes", type=int, default=1000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--small_gb", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json_text.encode(measure(*options.formats), "what was measured"))
    elif options.stage:
        _measure_stage(options)
    else:
        _measure_reading(options)


if __name__ == "__main__":
    main()
