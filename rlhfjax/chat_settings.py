"""The settings with which a chat samples: flags, else those of the model's files, else defaults."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhfjax.data.chat import render_prompt
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import foreign, generation_config, store
from rlhfjax.models.size import parameters
from rlhfjax.models.transformer import Model
from rlhfjax.paths import Path
from rlhfjax.sampling import Sampling

# Nearly greedy, as transformers is without settings. Models of few parameters and few bits have
# flat distributions: of 7 simple questions with 10 seeds each, SmolLM2-135M in 4 bits answers 50
# correctly with these settings, 46 with top_p=0.9, and 32 at temperature 0.7 without top_p; the
# capital of France in 10, 7 and 3 of 10.
FOREIGN = {"temperature": 0.2, "top_p": 0.5}

# Parameters of a model whose float32 weights do not fit a CPU's caches, so that a step takes as
# long as reading them.
LARGE = 2**26


# The flags that `rlhfjax serve` has too: settings of requests that give none.
OF_REQUESTS = ("temperature", "top_p", "top_k", "min_p", "stop", "max_new_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of `rlhfjax chat`. None: the model's own value, or our default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()
    max_new_tokens: int | None = None
    system: str = ""
    seed: int = 0
    int8: bool | None = None
    """Whether weights and cache are int8; None: the weights, if `int8_pays`."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Settings of the sampler, and what a user should know about them."""

    sampling: Sampling
    notes: list[str]


def choose_settings(path: str | Path, opened: store.Opened, options: Options) -> Chosen:
    """Returns the settings: the options given, else those of the model's files, else defaults.

    Raises:
      ConfigError: an option is out of its range.
    """
    scheme, _, folder = str(path).partition(":")
    defaults = FOREIGN if is_foreign(path) else generation_config.OURS
    context = opened.model.config.max_length
    sampling = Sampling(
        max_new_tokens=generation_config.longest_response(context),
        eos_id=opened.tokenizer.eos_id,
        extra_eos_ids=opened.tokenizer.extra_eos_ids,
        pad_id=opened.tokenizer.pad_id,
        temperature=defaults["temperature"],
        top_p=defaults["top_p"],
    )
    notes = []
    if scheme == "hf":
        own = generation_config.read(folder)
        ignored = dict(own.ignored)
        for name, value in own.settings.items():
            try:
                sampling = _with(sampling, name, value, context)
            except ConfigError:
                ignored[name] = value
        if ignored:
            listed = ", ".join(
                f"{name}={value!r:.40}" for name, value in ignored.items()
            )
            notes.append(f"not applied of {generation_config.FILE}: {listed}")
    for name in generation_config.SETTINGS:
        value = getattr(options, name)
        if value is not None:
            sampling = _flag(sampling, name, value)
    if options.stop:
        sampling = _flag(sampling, "stop", tuple(options.stop))
    validate_length(context, sampling, "--")
    return Chosen(sampling, notes)


def int8_pays(model: Model, platform: str) -> bool:
    """Returns whether a response is faster with int8 weights: on a CPU, of many dense weights.

    Args:
      platform: of jax, such as "cpu".
    """
    config = model.config
    is_large = parameters(config) >= LARGE
    return platform == "cpu" and is_large and not config.n_experts


def is_foreign(path: str | Path) -> bool:
    """Returns whether a model's name is foreign, without opening the model."""
    scheme, colon, _ = str(path).partition(":")
    return bool(colon) and scheme in foreign.SCHEMES


def _with(sampling: Sampling, name: str, value: Any, context: int) -> Sampling:
    """Returns the settings with one of a file; a length is at most half of the context."""
    if name == "max_new_tokens":
        value = min(int(value), max(1, context // 2))
    return dataclasses.replace(sampling, **{name: value})


def _flag(sampling: Sampling, name: str, value: Any) -> Sampling:
    try:
        return dataclasses.replace(sampling, **{name: value})
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None


def shown_settings(sampling: Sampling) -> str:
    """Returns the settings that a user can change, without those that are off."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    shown = []
    for name in generation_config.SETTINGS:
        value = getattr(sampling, name)
        if value != off.get(name):
            shown.append(f"{name}={value}")
    shown += [f"stop={text!r}" for text in sampling.stop]
    return " ".join(shown)


def validate_length(context: int, sampling: Sampling, prefix: str = "") -> None:
    """Raises ConfigError if a response leaves no room for a prompt.

    Args:
      prefix: what stands before the name of the option.
    """
    if sampling.max_new_tokens >= context:
        raise ConfigError(
            f"{prefix}max_new_tokens={sampling.max_new_tokens}: "
            f"must be less than the model's context of {context}"
        )


def validate_template(tokenizer: Tokenizer, system: str) -> None:
    """Raises DataError if the chat template takes no user's message, or no system message."""
    messages = [{"role": "user", "content": "?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    render_prompt(tokenizer, messages)
