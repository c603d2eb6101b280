"""The tokenizer: SentencePiece trained on the corpus, with the chat markers as symbols of their own."""

import dataclasses
from typing import Literal

from rlhfjax.data.config import SourceConfig, open_sources
from rlhfjax.data.sources import texts
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.ranges import Tokens

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "tokenizer"
    sources: tuple[SourceConfig, ...] = ()
    vocab_size: Tokens
    model_type: Literal["bpe", "unigram"] = "bpe"
    mesh: MeshConfig = MeshConfig()


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes workdir/tokenizer.model; returns its size and how many bytes a token stands for on the corpus' start."""
    source = open_sources(config.sources, "tokenizer.sources")
    tokenizer = train_sentencepiece(
        texts(source),
        workdir,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
    )
    sample = [text for _, text in zip(range(2000), texts(source), strict=False)]
    tokens = sum(len(tokenizer.encode(text)) for text in sample)
    metrics = {
        "tokenizer/vocab_size": float(tokenizer.vocab_size),
        "tokenizer/bytes_per_token": sum(len(text.encode()) for text in sample)
        / tokens,
    }
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
