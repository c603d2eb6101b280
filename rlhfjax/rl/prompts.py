"""Prompts for the stages that sample responses, and the text beside them that PPO-ptx trains on."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.config import Limited, SourceConfig, open_sources, own_shards
from rlhfjax.data.examples import Prompts
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.programs import small
from rlhfjax.ranges import Count, NonNegative, Size, TokensOrNone
from rlhfjax.stage import Batches, Shapes, row_shapes
from rlhfjax.streams import PRETRAINING_MIX
from rlhfjax.supervised import language_shapes
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompts: rows of kind prompt as they are, or prefixes of conversations (kind messages) that end with a user."""

    source: SourceConfig | None = None
    per_conversation: Count = 1  # prefixes of one conversation, 0: all
    limit: Count = 0  # prompts, 0: all


def open_prompts(config: PromptConfig, what: str, seed: int = 0) -> Source:
    if config.source is None:
        raise ConfigError(f"{what}.source: prompts are needed")
    source = config.source.open()
    if source.kind == "messages":
        most = config.per_conversation if config.per_conversation > 0 else None
        source = Prompts(source, per_conversation=most, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.Batches:
    """Endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    source = open_prompts(config, f"{stage.stage}.prompts")
    options = {
        "batch_size": stage.batch_size,
        "length": stage.prompt_length,
        "seed": stage.seed,
    }
    return loader.prompt_batches(source, tokenizer, train=True, **options)


class Repeated:
    """Every row of a stream of batches `times` times, one after the other: a group of answers to each prompt."""

    def __init__(self, batches: Batches, times: int):
        self._batches, self._times = batches, times

    def __next__(self) -> dict[str, np.ndarray]:
        return {
            name: np.repeat(rows, self._times, axis=0)
            for name, rows in next(self._batches).items()
        }

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


def held_out_prompts(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.Batches:
    """One pass over held-out prompts, in order."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts")
    size = stage.episodes
    if len(source) < size:
        size = min(size, -(-len(source) // 8) * 8)
    return loader.prompt_batches(
        source, tokenizer, train=False, batch_size=size, length=stage.prompt_length
    )


def prompt_shapes(size: int, length: int) -> Shapes:
    """Returns the shapes of a batch of prompts."""
    row = (length,)
    return row_shapes(
        size,
        prompts=(row, np.int32),
        segments=(row, np.int32),
        index=((), np.int32),
        cut=((), np.float32),
    )


def prompt_metrics(batch: Mapping[str, Any]) -> Metrics:
    """Returns the share of an iteration's prompts that lost tokens."""
    return {
        "prompts_cut": small(lambda cut: (cut.sum(), jnp.float32(cut.size)))(
            batch["cut"]
        )
    }


# ------------------------------------------------------------------ PPO-ptx: text beside the prompts


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """gamma E[log pi(x)] over pretraining text, its gradient added to PPO's in every minibatch.

    The paper's gamma, 27.8, comes without a unit; here it multiplies nats per token or nats per sequence: see `unit`.
    """

    coefficient: NonNegative = 0.0  # 0: off
    unit: Literal["token", "sequence"] = "token"
    ratio: Size = (
        8  # sequences of text for every episode, over an iteration (InstructGPT C.4: 8)
    )
    length: TokensOrNone = 0  # tokens of a sequence
    data_shards: Size = 1  # streams that the text comes in, as of a StreamConfig
    sources: tuple[SourceConfig, ...] = ()


class Together:
    """Several streams of batches as one, `{name}/` before the arrays of each but the first."""

    def __init__(self, first: Batches, **others: Batches):
        self._streams = {
            "": first,
            **{f"{name}/": stream for name, stream in others.items()},
        }

    def __next__(self) -> dict[str, np.ndarray]:
        return {
            prefix + k: v
            for prefix, stream in self._streams.items()
            for k, v in next(stream).items()
        }

    def __iter__(self) -> "Together":
        return self

    def restart(self) -> "Together":
        """Back to the first batch of each; see `loader.Batches.restart`."""
        for stream in self._streams.values():
            stream.restart()
        return self

    def get_state(self) -> dict[str, Any]:
        return {prefix: stream.get_state() for prefix, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for prefix, stream in self._streams.items():
            stream.set_state(state[prefix])


def with_ptx(
    config: PtxConfig,
    prompts: Batches,
    tokenizer: Tokenizer,
    stage: Any,
    layout: Layout,
) -> Batches:
    """Prompts, and where the mix is on the text of an iteration beside them."""
    if not config.coefficient:
        return prompts
    if not config.length:
        raise ConfigError(
            f"{stage.stage}.ptx.length: the mix needs the length of its sequences"
        )
    size = stage.episodes * config.ratio
    source = open_sources(config.sources, f"{stage.stage}.ptx.sources")
    own = own_shards(config.data_shards, size, layout)
    options = {
        "batch_size": size,
        "length": config.length,
        "seed": stage.seed + PRETRAINING_MIX,
        "shards": own,
    }
    return Together(prompts, ptx=loader.pretrain_batches(source, tokenizer, **options))


def text_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text of an iteration: what stands in a batch beside its prompts."""
    return {
        name.removeprefix("ptx/"): x
        for name, x in batch.items()
        if name.startswith("ptx/")
    }


def text_shapes(config: PtxConfig, episodes: int) -> Shapes:
    """Returns the shapes of an iteration's text; nothing where the mix is off."""
    if not config.coefficient:
        return {}
    return language_shapes(episodes * config.ratio, config.length, "ptx/")
