"""Rule rewards: a Python function of (prompt, response, metadata) scores what a program can check.

    rule:package.module:function?timeout=2&failed=-1&workers=4&metadata=runs/x/00_tasks/*.jsonl

The prompt and the response are text; the prompt has our chat markers (`<|user|>…<|assistant|>`),
whatever the model's chat template is. A marker that a message spells has a backslash, `<\\|user|>`;
`rlhfjax.data.chat.turns_of` returns the turns as they were written. The function runs in processes
beside the accelerator. A sample on which it fails gets the score `failed`; a metric and a warning
say how many failed and why. The run stops if more than a tenth of a batch's samples fail
(`max_failed`); in a batch of fewer than ten, a single one is more than a tenth. `metadata` is a
glob of JSON lines: the column `prompt` is the question, and the other columns are passed to the
function. Without it, metadata is empty. Of several hosts each runs the function for its own part of
the batch; with `hosts=first` the first one runs it for all.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np

from rlhfjax import hosts, user_code
from rlhfjax.data import chat
from rlhfjax.data.files import matching
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows
from rlhfjax.ranges import Finite, Seconds, Share, Workers
from rlhfjax.rewards.workers import TIMED_OUT, Outcome, Pool
from rlhfjax.types import Metrics

log = logging.getLogger("rlhfjax")


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """A rule and how it is run."""

    function: str
    """package.module:function, also of a module in the working directory"""
    timeout: Seconds = 5.0
    """seconds per sample"""
    failed: Finite = 0.0
    """score of a sample whose rule raised, timed out or returned no finite number"""
    workers: Workers = 0
    """processes; 0: one per core, at most 8"""
    metadata: str = ""
    """glob of JSON lines; empty: no metadata"""
    max_failed: Share = 0.1
    """share of a batch's samples that may fail; if more do, the run stops with the first error"""
    hosts: Literal["every", "first"] = "every"
    """hosts that run the rule: every host for its own rows, or the first one for all rows, for a
    rule that keeps state or whose files are on one host"""

    def __post_init__(self):
        user_code.split(self.function, "rule", user_code.RULE)


def parse(text: str) -> dict[str, Any]:
    """Returns the options in `module:function?option=value&…`, the name of a rule.

    `%26` stands for `&` in a value, as in addresses.

    Raises:
      ConfigError: an option has no value or stands twice, or its number cannot be read.
    """
    function, _, query = text.partition("?")
    values: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        option, equal, value = item.partition("=")
        if not equal:
            raise ConfigError(f"rule:{text}: {item!r}: expected option=value")
        if option in values or option == "function":
            raise ConfigError(f"rule:{text}: {option!r} stands twice")
        values[option] = _number(text, option, unquote(value))
    return {"function": function, **values}


NUMBERS = {"timeout": float, "failed": float, "max_failed": float, "workers": int}


def _number(text: str, option: str, value: str) -> Any:
    """Returns the value of an option, as a number where the option is one."""
    kind = NUMBERS.get(option, str)
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(
            f"rule:{text}: {option}={value!r}: expected {kind.__name__}"
        ) from None


class Rule:
    """A rule as a scorer of texts; see the module.

    Raises:
      DataError: the metadata cannot be read, or has two different rows of one prompt.
    """

    def __init__(self, config: RuleConfig):
        self._config = config
        self._metadata = read_metadata(config.metadata) if config.metadata else None
        workers = config.workers if config.workers > 0 else min(8, os.cpu_count() or 1)
        self._pool = Pool(config.function, workers=workers, timeout=config.timeout)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns the scores, float32 [n]."""
        return self.with_metrics(prompts, responses)[0]

    def with_metrics(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[np.ndarray, Metrics]:
        """Returns the scores [n] and metrics of a batch, as `summarize` does."""
        return self.summarize(self.outcomes(prompts, responses))

    def summarize(self, outcomes: Sequence[Outcome]) -> tuple[np.ndarray, Metrics]:
        """Returns the scores [n] and the shares of samples that failed and that timed out.

        Raises:
          DataError: more than `max_failed` of the samples failed.
        """
        failed = [outcome for outcome in outcomes if outcome.value is None]
        timed_out = sum(outcome.error.startswith(TIMED_OUT) for outcome in failed)
        if failed:
            self._report(failed, len(outcomes))
        scores = [
            self._config.failed if outcome.value is None else outcome.value
            for outcome in outcomes
        ]
        n = float(len(outcomes))
        return np.array(scores, np.float32), {
            "rule_failed": (float(len(failed)), n),
            "rule_timed_out": (float(timed_out), n),
        }

    def _report(self, failed: Sequence[Outcome], n: int) -> None:
        """Warns of the samples of a batch of n that failed; raises DataError if it is too many."""
        config = self._config
        first = f"the first: {failed[0].error}"
        what = f"rule {config.function}: {len(failed)} of {n} samples failed"
        if len(failed) / n > config.max_failed:
            raise DataError(
                f"{what}, more than max_failed={config.max_failed:g}; {first};"
                " correct the rule, or allow more with …?max_failed=1"
            )
        if hosts.first():
            log.warning("%s and score %g; %s", what, config.failed, first)

    def outcomes(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> list[Outcome]:
        """Returns each sample's value, or why it has none."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses")
        outcomes = [Outcome(None, "no metadata for its prompt")] * len(prompts)
        calls = {}
        for i, prompt in enumerate(prompts):
            metadata = self._lookup(prompt)
            if metadata is not None:
                calls[i] = (prompt, responses[i], metadata)
        results = self._pool.map(list(calls.values()))
        for i, outcome in zip(calls, results, strict=True):
            outcomes[i] = outcome
        return outcomes

    def _lookup(self, prompt: str) -> Mapping[str, Any] | None:
        return {} if self._metadata is None else self._metadata.get(question(prompt))

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()


def question(prompt: str) -> str:
    """Returns the last user turn of a prompt with chat markers, or the text without markers."""
    turns = chat.turns_of(prompt)
    texts = [turn["content"] for turn in turns if turn["role"] in ("user", "")]
    return texts[-1].strip() if texts else ""


def read_metadata(pattern: str) -> dict[str, dict[str, Any]]:
    """Returns {question: the other columns} of JSON lines.

    Raises:
      DataError: no file matches, a line is malformed, or a question has two different rows.
    """
    metadata: dict[str, dict[str, Any]] = {}
    for path in matching(pattern, "rule metadata"):
        for place, row in located_rows(path):
            try:
                prompt = row.pop("prompt")
                text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                key = text.strip()
            except (KeyError, AttributeError, TypeError, IndexError):
                raise DataError(
                    f"{place}: expected a JSON object with a 'prompt'"
                ) from None
            if not key:
                raise DataError(f"{place}: the prompt is empty")
            if metadata.setdefault(key, row) != row:
                raise DataError(
                    f"{place}: the prompt {key[:60]!r} stands twice with different metadata"
                )
    if not metadata:
        raise DataError(f"rule metadata: {pattern} holds no row")
    return metadata
