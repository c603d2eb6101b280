"""The pretraining mix of PPO-ptx: text beside the prompts of every iteration."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.config import SourceConfig, open_sources, own_shards
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.stage import Batches, Shapes
from rlhfjax.supervised import language_shapes


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """gamma E[log pi(x)] over pretraining text, its gradient added to PPO's in every minibatch.

    The paper's gamma, 27.8, comes without a unit; here it multiplies nats per token or nats per sequence: see `unit`.
    """

    coefficient: float = 0.0  # 0: off
    unit: Literal["token", "sequence"] = "token"
    ratio: int = 8  # sequences of text for every episode, over an iteration (InstructGPT C.4: 8)
    length: int = 0  # tokens of a sequence
    data_shards: int = 1  # streams that the text comes in, as of a StreamConfig
    sources: tuple[SourceConfig, ...] = ()


class Together:
    """Several streams of batches as one, `{name}/` before the arrays of each but the first."""

    def __init__(self, first: Batches, **others: Batches):
        self._streams = {"": first, **{f"{name}/": stream for name, stream in others.items()}}

    def __next__(self) -> dict[str, np.ndarray]:
        return {prefix + k: v for prefix, stream in self._streams.items() for k, v in next(stream).items()}

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


def with_ptx(config: PtxConfig, prompts: Batches, tokenizer: Tokenizer, stage: Any, layout: Layout) -> Batches:
    """Prompts, and where the mix is on the text of an iteration beside them."""
    if not config.coefficient:
        return prompts
    if config.length < 1:
        raise ConfigError(f"{stage.stage}.ptx.length: the mix needs the length of its sequences")
    size = stage.episodes * config.ratio
    source = open_sources(config.sources, f"{stage.stage}.ptx.sources")
    own = own_shards(config.data_shards, size, layout)
    options = {"batch_size": size, "length": config.length, "seed": stage.seed + 1, "shards": own}
    return Together(prompts, ptx=loader.pretrain_batches(source, tokenizer, **options))


def text_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text of an iteration: what stands in a batch beside its prompts."""
    return {name.removeprefix("ptx/"): x for name, x in batch.items() if name.startswith("ptx/")}


def text_shapes(config: PtxConfig, episodes: int) -> Shapes:
    """Returns the shapes of an iteration's text; nothing where the mix is off."""
    if not config.coefficient:
        return {}
    return language_shapes(episodes * config.ratio, config.length, "ptx/")
