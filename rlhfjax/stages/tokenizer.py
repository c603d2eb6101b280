"""Trains a SentencePiece tokenizer on the corpus, with the chat markers as symbols of their own.

workdir/tokenizer.model    the tokenizer
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Literal

from rlhfjax import sums
from rlhfjax.data.config import SourceConfig, open_sources
from rlhfjax.data.counted import data_metrics
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source, texts
from rlhfjax.data.tokenizer import MODEL_FILE, train_sentencepiece
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.ranges import CharacterCoverage, Count, Tokens

log = logging.getLogger("rlhfjax")
ON_ONE_HOST = True
_GOLDEN = (math.sqrt(5) - 1) / 2
MEASURED_TEXTS = 2000  # of which bytes per token are counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The corpus, and the size and type of the tokenizer."""

    stage: str = "tokenizer"
    """Name of the stage."""
    sources: tuple[SourceConfig, ...] = ()
    """texts to train on"""
    vocab_size: Tokens
    """number of token ids, chat markers included"""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm"""
    character_coverage: CharacterCoverage | None = None
    """share of the characters that get ids of their own, the rest is spelled in bytes; None:
    SentencePiece's, 0.9995. A script of thousands of characters needs a large vocabulary or less"""
    megabytes: Count = 100
    """megabytes of text to train on at most, of rows spread evenly over all sources; 0: all of it,
    in memory"""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the tokenizer; returns its size and the bytes per token of the first texts."""
    source = open_sources(config.sources, "tokenizer.sources")
    log.info("tokenizer: reading %s rows", f"{len(source):,}")
    tokenizer = train_sentencepiece(
        taken_texts(source, config.megabytes * 1e6 or math.inf, config),
        workdir,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        character_coverage=config.character_coverage,
    )
    sums.write(workdir, [MODEL_FILE])
    sample = list(itertools.islice(texts(source), MEASURED_TEXTS))
    n_bytes = sum(len(text.encode()) for text in sample)
    n_tokens = sum(len(tokenizer.encode(text)) for text in sample)
    metrics = {
        "tokenizer/vocab_size": float(tokenizer.vocab_size),
        "tokenizer/bytes_per_token": n_bytes / n_tokens,
    }
    metrics |= data_metrics(source, "tokenizer")
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def taken_texts(source: Source, most: float, config: Config) -> Iterator[str]:
    """Yields the texts of a source, or, if it has more than `most` bytes, of rows spread over it.

    Logs their size after the last one, because training begins then.
    """
    size = _size(source, most)
    if size <= most:
        yield from texts(source)
        _log(f"{size / 1e6:.1f} MB of text", config)
        return
    room = int(most)
    for text in texts(Spread(source)):
        content = text.encode()
        yield content[:room].decode(errors="ignore")
        room -= len(content)
        if room <= 0:
            break
    _log(f"{most / 1e6:.1f} MB of text, of rows spread evenly over all", config)


def _size(source: Source, most: float) -> int:
    """Returns the number of bytes of a source's texts, or one that is greater than `most`."""
    n_bytes = 0
    for text in texts(source):
        n_bytes += len(text.encode())
        if n_bytes > most:
            break
    return n_bytes


def _log(size: str, config: Config) -> None:
    pieces = f"{config.vocab_size:,} pieces, {config.model_type}"
    log.info("tokenizer: training SentencePiece on %s (%s)", size, pieces)


class Spread:
    """The rows of a source, each once, so that those of any beginning are spread evenly over it."""

    skipped = merged = 0  # the source counts them

    def __init__(self, source: Source):
        self.kind = source.kind
        self._source = source
        # Multiples of the golden ratio, modulo 1, are spread evenly.
        self._step = max(1, round(len(source) * _GOLDEN))
        while math.gcd(self._step, len(source)) > 1:
            self._step += 1

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        return self._source[self._place(index)]

    def locate(self, index: int) -> str:
        return self._source.locate(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index * self._step % len(self)
