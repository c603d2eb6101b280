"""Prompts for the stages that sample responses, and the pretraining text of PPO-ptx."""

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
from rlhfjax.supervised import language_shapes
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompts: rows of kind prompt, or prefixes of conversations (kind messages).

    A prefix ends with a user's turn.
    """

    source: SourceConfig | None = None
    """Where the prompts are; required in stages that sample."""
    per_conversation: Count = 1
    """Prefixes per conversation; 0 takes all."""
    limit: Count = 0
    """Number of prompts; 0 takes all."""


def open_prompts(config: PromptConfig, option: str, seed: int = 0) -> Source:
    """Opens the prompts of a config option. Raises ConfigError if it names no source."""
    if config.source is None:
        raise ConfigError(f"{option}.source: a value is required")
    source = config.source.open()
    if source.kind == "messages":
        per_conversation = config.per_conversation or None
        source = Prompts(source, per_conversation=per_conversation, seed=seed)
    return Limited(source, config.limit) if config.limit else source


def prompt_batches(
    config: PromptConfig, tokenizer: Tokenizer, stage: Any
) -> loader.Batches:
    """Returns endless shuffled prompts for a stage with prompt_length, batch_size and seed."""
    source = open_prompts(config, f"{stage.stage}.prompts")
    return loader.prompt_batches(
        source,
        tokenizer,
        batch_size=stage.batch_size,
        length=stage.prompt_length,
        seed=stage.seed,
        train=True,
    )


class Repeated:
    """A stream of batches with every row repeated `times` times, copies next to each other."""

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
    """Returns one pass over held-out prompts, in order, in batches of at most `stage.episodes`."""
    source = open_prompts(config, f"{stage.stage}.eval_prompts")
    # Few prompts make a smaller batch, in a multiple of 8 that devices can share.
    size = min(stage.episodes, -(-len(source) // 8) * 8)
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


# ------------------------------------------------------------------ PPO-ptx: text beside prompts


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """gamma E[log pi(x)] over pretraining text; its gradient is added to PPO's per minibatch.

    The paper's gamma, 27.8, comes without a unit. Here `unit` says what gamma multiplies.

    Source: Ouyang et al. 2022, eq. 2.
    """

    coefficient: NonNegative = 0.0
    """Weight gamma of the pretraining loss; 0 is off."""
    unit: Literal["token", "sequence"] = "token"
    """Whether gamma multiplies nats per token or nats per sequence."""
    ratio: Size = 8
    """Sequences of text per episode of an iteration (InstructGPT C.4: 8)."""
    length: TokensOrNone = 0
    """Tokens per sequence."""
    data_shards: Size = 1
    """Streams that the text comes in, as in a StreamConfig."""
    sources: tuple[SourceConfig, ...] = ()
    """Where the text is."""


class Together:
    """Several streams of batches as one; `{name}/` precedes the arrays of each but the first."""

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
        """Goes back to the first batch of each stream; see `loader.Batches.restart`."""
        for stream in self._streams.values():
            stream.restart()  # pyright: ignore[reportAttributeAccessIssue]  # loader's have it
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
    """Returns prompts with an iteration's text beside them, if its coefficient is not 0."""
    if not config.coefficient:
        return prompts
    if not config.length:
        raise ConfigError(
            f"{stage.stage}.ptx.length=0: must be > 0 with a ptx.coefficient"
        )
    size = stage.episodes * config.ratio
    text = loader.pretrain_batches(
        open_sources(config.sources, f"{stage.stage}.ptx.sources"),
        tokenizer,
        batch_size=size,
        length=config.length,
        seed=stage.seed + 1,
        shards=own_shards(config.data_shards, size, layout),
    )
    return Together(prompts, ptx=text)


def text_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an iteration's text, the arrays in its batch beside the prompts."""
    return {
        name.removeprefix("ptx/"): x
        for name, x in batch.items()
        if name.startswith("ptx/")
    }


def text_shapes(config: PtxConfig, episodes: int) -> Shapes:
    """Returns the shapes of an iteration's text; empty if the mix is off."""
    if not config.coefficient:
        return {}
    return language_shapes(episodes * config.ratio, config.length, "ptx/")
