"""Trains a SentencePiece tokenizer on the corpus, with the chat markers as symbols of their own.

workdir/tokenizer.model    the tokenizer
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Literal

from rlhfjax import sums
from rlhfjax.data.config import SourceConfig, open_sources
from rlhfjax.data.sources import texts
from rlhfjax.data.tokenizer import MODEL_FILE, train_sentencepiece
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.ranges import Tokens

log = logging.getLogger("rlhfjax")
ON_ONE_HOST = True
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
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the tokenizer; returns its size and the bytes per token of the first texts."""
    source = open_sources(config.sources, "tokenizer.sources")
    log.info("tokenizer: reading %s rows", f"{len(source):,}")
    tokenizer = train_sentencepiece(
        _counted(texts(source), config),
        workdir,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
    )
    sums.write(workdir, [MODEL_FILE])
    sample = list(itertools.islice(texts(source), MEASURED_TEXTS))
    n_bytes = sum(len(text.encode()) for text in sample)
    n_tokens = sum(len(tokenizer.encode(text)) for text in sample)
    metrics = {
        "tokenizer/vocab_size": float(tokenizer.vocab_size),
        "tokenizer/bytes_per_token": n_bytes / n_tokens,
    }
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _counted(texts: Iterable[str], config: Config) -> Iterator[str]:
    """Yields the texts; then logs their size, because training begins after the last one."""
    n_bytes = 0
    for text in texts:
        n_bytes += len(text.encode())
        yield text
    size = f"{n_bytes / 1e6:.1f} MB of text"
    pieces = f"{config.vocab_size:,} pieces, {config.model_type}"
    log.info("tokenizer: training SentencePiece on %s (%s)", size, pieces)
