"""One point of `benchmarks.scaling`: opening and reading an indexed file of many rows."""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data_memory import resident

BATCHES, ROWS, LENGTH = 8, 16, 128
_BLOCK = 10**4  # rows that are written at a time
_WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def write(file: Path, rows: int) -> None:
    """Writes rows of different short texts as CSV, which is indexed at every size."""
    with file.open("w") as out:
        out.write("text\n")
        for start in range(0, rows, _BLOCK):
            block = range(start, min(start + _BLOCK, rows))
            lines = [f"{i} {_WORDS[i % 8]} {_WORDS[i // 8 % 8]}\n" for i in block]
            out.write("".join(lines))


def measure(rows: int) -> dict[str, float]:
    """Opens a file of `rows` rows twice and makes shuffled batches; returns seconds and MB."""
    from rlhfjax.data.loader import pretrain_batches
    from rlhfjax.data.sources import open_source
    from rlhfjax.data.tokenizer import train_sentencepiece

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["RLHFJAX_DATA_CACHE"] = str(folder / "cache")
        with contextlib.redirect_stdout(sys.stderr):
            texts = [f"{i} {word}" for i in range(1000) for word in _WORDS]
            tokenizer = train_sentencepiece(texts, folder / "tokenizer", vocab_size=300)
        file = folder / "data.csv"
        write(file, rows)
        before = resident()
        opened = []
        for _ in range(2):
            start = time.perf_counter()
            source = open_source(str(file), split="train")
            opened.append(time.perf_counter() - start)
        start = time.perf_counter()
        batches = pretrain_batches(source, tokenizer, batch_size=ROWS, length=LENGTH)
        next(batches)
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        per_batch = (time.perf_counter() - start) / BATCHES
        return {
            "index_seconds": opened[0],
            "open_seconds": opened[1] + first,
            "batch_seconds": per_batch,
            "resident_mb": resident("VmHWM") - before,
        }
