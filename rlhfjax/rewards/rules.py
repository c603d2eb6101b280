"""Rule rewards: a Python function of (prompt, response text, metadata), for what can be checked by a program.

    rule:package.module:function?timeout=2&failed=-1&workers=4&metadata=runs/x/00_tasks/*.jsonl

The prompt is text in our markers (`<|user|>…<|assistant|>`), whatever the model's chat template is.
The function runs in processes beside the accelerator. What fails gets the score `failed` and is counted: a metric and
a warning say how often and why. `metadata` names JSON lines whose column `prompt` is the question and whose other
columns the function gets; without it, metadata is empty.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from rlhfjax import paths
from rlhfjax.config import build
from rlhfjax.data.tokenizer import ASSISTANT, USER
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows
from rlhfjax.ranges import Finite, Seconds, Workers
from rlhfjax.rewards.workers import TIMED_OUT, Outcome, Pool

log = logging.getLogger("rlhfjax")
PREFIX = "rule:"
Pairs = dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """How a rule is run."""

    function: str  # package.module:function
    timeout: Seconds = 5.0  # seconds a sample
    failed: Finite = 0.0  # the score of a sample whose rule raised, timed out or gave no finite number
    workers: Workers = 0  # processes; 0: as many as there are cores, at most 8
    metadata: str = ""  # a glob of JSON lines


def parse(name: str) -> RuleConfig:
    """`rule:module:function?option=value&…` as a config.

    Raises:
      ConfigError: an option that there is not, or a value that is not of its type.
    """
    function, _, query = name.removeprefix(PREFIX).partition("?")
    values: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for option, kind in (("timeout", float), ("failed", float), ("workers", int)):
        if option in values:
            try:
                values[option] = kind(values[option])
            except ValueError:
                raise ConfigError(
                    f"{name}: {option}={values[option]!r} is no {kind.__name__}"
                ) from None
    return build(RuleConfig, {"function": function, **values}, PREFIX.rstrip(":"))


class Rule:
    """A rule as a scorer of texts; see the module.

    Raises:
      ConfigError: the function cannot be imported.
      DataError: the metadata cannot be read, or say two things of one prompt.
    """

    def __init__(self, config: RuleConfig):
        self._config = config
        self._metadata = read_metadata(config.metadata) if config.metadata else None
        workers = config.workers if config.workers > 0 else min(8, os.cpu_count() or 1)
        self._pool = Pool(config.function, workers=workers, timeout=config.timeout)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return self.with_metrics(prompts, responses)[0]

    def with_metrics(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[np.ndarray, Pairs]:
        """Scores float32 [n]; rule_failed and rule_timed_out, shares of the samples."""
        outcomes = self.outcomes(prompts, responses)
        failed = [outcome for outcome in outcomes if outcome.value is None]
        late = sum(outcome.error.startswith(TIMED_OUT) for outcome in failed)
        if failed:
            log.warning(
                "rule %s: %d of %d samples failed and score %g; the first: %s",
                self._config.function, len(failed), len(outcomes), self._config.failed, failed[0].error,
            )  # fmt: skip
        scores = [
            self._config.failed if outcome.value is None else outcome.value
            for outcome in outcomes
        ]
        n = float(len(outcomes))
        return np.array(scores, np.float32), {
            "rule_failed": (float(len(failed)), n),
            "rule_timed_out": (float(late), n),
        }

    def outcomes(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> list[Outcome]:
        """What became of every sample: a value, or why there is none."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        known = [self._lookup(prompt) for prompt in prompts]
        calls = [
            (p, r, m)
            for p, r, m in zip(prompts, responses, known, strict=True)
            if m is not None
        ]
        ran = iter(self._pool.map(calls))
        return [
            Outcome(None, "no metadata for its prompt") if m is None else next(ran)
            for m in known
        ]

    def _lookup(self, prompt: str) -> Mapping[str, Any] | None:
        return {} if self._metadata is None else self._metadata.get(question(prompt))

    def close(self) -> None:
        self._pool.close()


def question(prompt: str) -> str:
    """The last user turn of a prompt in the chat template; text without markers is itself the question."""
    return prompt.rsplit(USER, 1)[-1].removesuffix(ASSISTANT).strip()


def read_metadata(pattern: str) -> dict[str, dict[str, Any]]:
    """{question: the other columns} of JSON lines.

    Raises:
      DataError: no file, a malformed line, or a question that stands twice with different columns.
    """
    files = paths.glob(pattern)
    if not files:
        raise DataError(f"rule metadata: no file matches {pattern}")
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        for place, row in located_rows(path):
            try:
                prompt = row.pop("prompt")
                key = (
                    prompt if isinstance(prompt, str) else prompt[-1]["content"]
                ).strip()
            except (KeyError, AttributeError, TypeError, IndexError):
                raise DataError(
                    f"{place}: expected a JSON object with a 'prompt'"
                ) from None
            if found.setdefault(key, row) != row:
                twice = f"the prompt {key[:60]!r} stands twice with different metadata"
                raise DataError(f"{place}: {twice}")
    return found
