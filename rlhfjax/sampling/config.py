"""Sampling settings: the options of a stage's config, and the struct that the sampler takes."""

import dataclasses
import math
from typing import Protocol, runtime_checkable

from rlhfjax.errors import ConfigError
from rlhfjax.ranges import Positive, Share, Size, SizeOrNone, Temperature, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The options of every stage that samples responses from a policy."""

    stage: str
    """Name of the stage, as in the table of stages."""
    prompt_length: Tokens
    """Tokens that prompts are padded to; longer conversations lose their oldest turns."""
    max_new_tokens: Tokens
    """Tokens of the longest response."""
    batch_size: Size
    """Prompts per batch."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""
    stop_at_eos: bool = True
    """Whether an eos ends a response; if not, each response has max_new_tokens tokens (Ziegler)."""
    decode_batch: SizeOrNone = 0
    """Responses decoded at a time by continuous batching; 0 decodes the whole batch together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapedSamplingConfig(SamplingConfig):
    """The options of stages whose responses may come from another distribution than the policy's.

    No stage that trains on its own samples has them: it would train another distribution than the
    one that it samples from.
    """

    min_p: Share = 0.0
    """Keep tokens at least this many times as likely as the likeliest; 0 is off."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of tokens that came before, multiplies negative ones; 1 is off."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, as an eos does; they are not part of it."""

    @property
    def is_shaped(self) -> bool:
        """Whether one of these options is on."""
        return self.min_p > 0 or self.repetition_penalty != 1 or bool(self.stop)


@runtime_checkable
class SpecialIds(Protocol):
    """The ids that the sampler needs: a Tokenizer has them, and so has `rl.rollout.TokenIds`."""

    @property
    def eos_id(self) -> int: ...
    @property
    def extra_eos_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_id(self) -> int: ...


def end_ids(ids: SpecialIds) -> tuple[int, ...]:
    """Returns all ids that end a response, eos_id first."""
    return (ids.eos_id, *ids.extra_eos_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of a sampler; hashable, as a static argument of a jitted function must be.

    It holds nothing that varies from batch to batch: every other value compiles the sampler anew.

    Raises:
      ConfigError: a setting is out of its range, or two of them contradict each other.
    """

    max_new_tokens: int
    """Tokens of the longest response."""
    eos_id: int
    """The token that ends a response; -1 lets every response have max_new_tokens tokens."""
    pad_id: int
    """The token after the end of a response."""
    extra_eos_ids: tuple[int, ...] = ()
    """Other tokens that end a response; pad_id may be one, as in Qwen2."""
    temperature: float = 1.0
    """0 is greedy, and logprobs are then those of temperature 1."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off. Training rollouts must not truncate."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability; 1 is off. As top_k."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest; 0 is off. As top_k."""
    repetition_penalty: float = 1.0
    """Makes tokens of prompt and response less likely; 1 is off. As top_k."""
    stop: tuple[str, ...] = ()
    """Texts that end a response. `generate` ignores them: `sampling.stop` cuts what it returns."""
    samples_per_prompt: int = 1
    """K, the number of consecutive rows that share a prompt; it is prefilled once."""
    decode_batch: int = 0
    """Lanes of continuous batching; 0, or at least the number of rows, decodes all rows at once."""
    cache_parts: int = 1
    """Steps in which the cache grows while all rows are decoded at once; 1: none."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be >= 1")
        if self.eos_id == self.pad_id:
            raise ConfigError(
                f"eos_id=pad_id={self.eos_id}: must differ, "
                "or the end of a response is taken for padding"
            )
        if not self.temperature >= 0:
            raise ConfigError(
                f"temperature={self.temperature}: must be >= 0 (0: greedy)"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must be >= 0 (0: off)")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be > 0 and <= 1 (1: off)")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p}: must be >= 0 and <= 1 (0: off)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty}: must be > 0 (1: off)"
            )
        if "" in self.stop:
            raise ConfigError("stop='': must not be empty, every text begins with it")
        k = self.samples_per_prompt
        if k < 1:
            raise ConfigError(f"samples_per_prompt={k}: must be >= 1")
        if self.decode_batch and self.decode_batch < k:
            raise ConfigError(
                f"decode_batch={self.decode_batch}: must be 0 (off) "
                f"or at least samples_per_prompt={k}"
            )

    @classmethod
    def from_config(
        cls, config: SamplingConfig, ids: SpecialIds, samples_per_prompt: int = 1
    ) -> "Sampling":
        """Returns the settings of a stage's rollouts.

        The distribution is the policy's own, unless a ShapedSamplingConfig says otherwise.
        """
        shaping = {}
        if isinstance(config, ShapedSamplingConfig):
            shaping = {
                "min_p": config.min_p,
                "repetition_penalty": config.repetition_penalty,
                "stop": config.stop,
            }
        return cls(
            max_new_tokens=config.max_new_tokens,
            eos_id=ids.eos_id if config.stop_at_eos else -1,
            pad_id=ids.pad_id,
            extra_eos_ids=ids.extra_eos_ids if config.stop_at_eos else (),
            temperature=config.temperature,
            samples_per_prompt=samples_per_prompt,
            decode_batch=config.decode_batch,
            **shaping,
        )
