"""Measures a host's cost per batch if it makes one of eight data streams, or all of them.

    python -m benchmarks.shards             prints a Markdown table

The data are Chitchat's conversations (the `quickstart` extra), with a SentencePiece tokenizer of
4,096 pieces, in batches of 64 rows of 512 tokens. The table has milliseconds of one CPU core per
batch, over 16 batches (one shuffling window in pretraining), for a loader that has encoded nothing
yet. The numbers are medians of rounds that run each variant in turn.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rlhfjax.data.loader import Shards, pretrain_batches, sft_batches
from rlhfjax.data.sources import open_source
from rlhfjax.data.tokenizer import train_sentencepiece

ROWS, LENGTH, BATCHES, ROUNDS, STREAMS = 64, 512, 16, 5, 8
WAYS = {
    "one stream, all rows": Shards(),
    "8 streams, all of them": Shards(STREAMS, tuple(range(STREAMS))),
    "8 streams, one of them": Shards(STREAMS, (0,)),
}


def main() -> None:
    source = open_source("tfds:chitchat", kind="messages")
    texts = [
        turn["content"] for i in range(len(source)) for turn in source[i]["messages"]
    ]
    tokenizer = train_sentencepiece(texts, Path(tempfile.mkdtemp()), vocab_size=4096)

    def milliseconds(load, shards: Shards) -> float:
        batches = load(source, tokenizer, batch_size=ROWS, length=LENGTH, shards=shards)
        begun = time.process_time()
        for _ in range(BATCHES):
            next(batches)
        return 1000 * (time.process_time() - begun) / BATCHES

    loaders = {"pretrain": pretrain_batches, "sft": sft_batches}
    rounds = [
        {(k, w): milliseconds(loaders[k], WAYS[w]) for k in loaders for w in WAYS}
        for _ in range(ROUNDS)
    ]
    print("| ms a batch | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for kind in loaders:
        medians = (statistics.median(one[kind, way] for one in rounds) for way in WAYS)
        print(
            f"| {kind} | " + " | ".join(f"{x:.0f}" for x in medians) + " |", flush=True
        )


if __name__ == "__main__":
    main()
