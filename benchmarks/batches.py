"""Random batches of full sequences, for every workload of workloads.json.

A maker takes the sizes of a workload and a vocabulary, and returns a function of a NumPy generator.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhfjax.data.batches import (
    PolicyBatch,
    PreferenceBatch,
    PromptBatch,
    TokenBatch,
)

Make = Callable[[np.random.Generator], Any]


def words(rng: np.random.Generator, vocab: int, *shape: int) -> np.ndarray:
    """Returns random ids other than pad, bos, eos and unk."""
    return rng.integers(4, vocab, shape, dtype=np.int32)


def packed(w: dict[str, Any], vocab: int) -> Make:
    """Returns pretraining batches; the first `prompt` targets do not count in the loss."""

    def make(rng: np.random.Generator) -> Any:
        rows = words(rng, vocab, w["batch"], w["seq"] + 1)
        positions = np.tile(np.arange(w["seq"], dtype=np.int32), (w["batch"], 1))
        mask = (positions >= w.get("prompt", 0)).astype(np.float32)
        segment_ids = np.ones_like(positions)
        return TokenBatch(
            tokens=rows[:, :-1],
            targets=rows[:, 1:],
            mask=mask,
            segment_ids=segment_ids,
            positions=positions,
        )

    return make


def examples(w: dict[str, Any], vocab: int) -> Make:
    """Batches of fine-tuning: `packed`, and that no example lost tokens."""
    make = packed(w, vocab)
    cut = np.zeros(w["batch"], np.float32)
    return lambda rng: dataclasses.replace(make(rng), cut=cut)


def pairs(w: dict[str, Any], vocab: int) -> Make:
    def make(rng: np.random.Generator) -> Any:
        shape = (w["pairs"], 2, w["seq"])
        scores = np.tile(np.array([1.0, 0.0], np.float32), (w["pairs"], 1))
        return PreferenceBatch(
            tokens=words(rng, vocab, *shape),
            attention_mask=np.ones(shape, np.int32),
            scores=scores,
            valid=np.ones_like(scores),
            lengths=np.full(scores.shape, w["seq"], np.int32),
            cut=np.zeros_like(scores),
            same=np.tile(np.arange(2, dtype=np.int32), (w["pairs"], 1)),
            index=np.zeros(w["pairs"], np.int32),
        )

    return make


def prompts(w: dict[str, Any], vocab: int) -> Make:
    def make(rng: np.random.Generator) -> Any:
        tokens = np.repeat(
            words(rng, vocab, w.get("prompts", w["batch"]), w["prompt"]),
            w.get("group", 1),
            axis=0,
        )
        prompts = PromptBatch(
            tokens=tokens,
            attention_mask=np.ones_like(tokens),
            index=np.zeros(w["batch"], np.int32),
            cut=np.zeros(w["batch"], np.float32),
        )
        return PolicyBatch(prompts=prompts)

    return make


MAKERS: dict[str, Callable[[dict[str, Any], int], Make]] = {
    "pretrain": packed,
    "sft": examples,
    "rm": pairs,
    "generate": prompts,
    "ppo": prompts,
    "grpo": prompts,
}
