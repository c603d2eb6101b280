"""AI feedback: a judge compares responses two by two; its choices become soft preference labels.

    p_ij = 1/2 [ p(A | i as A, j as B) + p(B | j as A, i as B) ]
    p(A) = e^{l_A} / (e^{l_A} + e^{l_B})

The judge is asked in both orders, so that a preference for one of the letters cancels;
p_ij + p_ji = 1. The label of response i is s_i = 1/K sum_j logit p_ij, the least-squares fit of
s_i - s_j to the log-odds: with K = 2, sigmoid(s_i - s_j) = p_ij exactly, which the loss `soft` of
the reward stage takes. A chain of thought makes the judge overconfident; probabilities after one
are clamped, to 0.4 and 0.6 in the paper.

Source: Bai et al. 2022, "Constitutional AI", section 4.1 (one principle drawn for each comparison;
clamping); Lee et al. 2023, "RLAIF", section 2.1.1 (both orders averaged).
"""

import dataclasses
import hashlib
import itertools
from typing import Any

import numpy as np

from rlhfjax import paths
from rlhfjax.data.files import read_text
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.ranges import Seed, Share, TokensOrNone
from rlhfjax.rewards.judge import (
    Judge,
    JudgeConfig,
    ask,
    class_probabilities,
    validate_placeholders,
)
from rlhfjax.rewards.labelers import Answers
from rlhfjax.rewards.registry import Loader
from rlhfjax.types import Metrics

TEMPLATE = """Consider the following conversation:
{prompt}

{principle}
Options:
(A) {a}
(B) {b}"""
OPTIONS = (" (A)", " (B)")
CERTAIN = 1e-6  # probabilities stay this far from 0 and 1, so that log-odds are finite
Pair = tuple[int, int, int]  # prompt, response i, response j


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    """A judge as a labeler, and what it is asked."""

    judge: JudgeConfig
    """the language model that compares"""
    principles: str
    """file with one principle per line: "Which of these responses is more helpful?", say"""
    template: str = TEMPLATE
    """the question, with {prompt}, {principle}, {a} and {b}"""
    thought: TokensOrNone = 0
    """tokens of a chain of thought before the choice; 0: none"""
    clamp: tuple[Share, Share] = (0.0, 1.0)
    """bounds of the probabilities; (0.4, 0.6) with a chain of thought"""
    seed: Seed = 0
    """of the principle that is drawn for each comparison"""

    def __post_init__(self):
        low, high = self.clamp
        if low >= high or abs(low + high - 1) > 1e-9:
            raise ConfigError(
                f"feedback.clamp={self.clamp}: must be (x, 1 - x) with x below 1/2"
            )
        validate_placeholders(
            "feedback.template",
            self.template,
            ("prompt", "principle", "a", "b"),
            ("prompt", "a", "b"),
        )


class Feedback:
    """A judge as a labeler.

    Raises:
      DataError: the file of principles cannot be read, or is empty.
    """

    def __init__(self, config: FeedbackConfig, judge: Judge):
        self._config, self._judge = config, judge
        self._asked = 0  # questions so far
        self._cut = 0  # of them, those whose texts were cut
        self.principles = read_lines(config.principles)

    def __call__(self, answers: Answers) -> np.ndarray:
        """Returns the labels, float64 [p, k]: differences within a prompt are log-odds."""
        p, k = len(answers.prompts), answers.k
        odds = np.zeros((p, k, k))
        pairs, probabilities = self.comparisons(answers)
        for (row, i, j), probability in zip(pairs, probabilities, strict=True):
            odds[row, i, j] = np.log(probability) - np.log1p(-probability)
            odds[row, j, i] = -odds[row, i, j]
        return odds.sum(axis=2) / k

    def metrics(self) -> Metrics:
        """Returns judge_cut, the share of all questions in which a text was cut to fit."""
        return {"judge_cut": (float(self._cut), float(self._asked))}

    def comparisons(self, answers: Answers) -> tuple[list[Pair], np.ndarray]:
        """Returns every (prompt, i, j), i < j, and the clamped probability [n] that i is better."""
        combinations = list(itertools.combinations(range(answers.k), 2))
        rows = range(len(answers.prompts))
        pairs = [(row, i, j) for row in rows for i, j in combinations]
        swapped = [(row, j, i) for row, i, j in pairs]
        first = self._first_is_better(answers, pairs)
        second = 1 - self._first_is_better(answers, swapped)
        low, high = (min(max(x, CERTAIN), 1 - CERTAIN) for x in self._config.clamp)
        return pairs, np.clip((first + second) / 2, low, high)

    def _first_is_better(self, answers: Answers, pairs: list[Pair]) -> np.ndarray:
        """Returns p(A) [n]; the first response of each pair is A."""
        config, judge = self._config, self._judge
        room = judge.room(OPTIONS, config.thought)
        questions = []
        for row, i, j in pairs:
            prompt, texts = answers.prompts[row], answers.completions[row]
            both = sorted((texts[i], texts[j]))
            values = {
                "prompt": prompt,
                "principle": choose(self.principles, config.seed, prompt, *both),
                "a": texts[i],
                "b": texts[j],
            }
            question, cut = ask(
                judge.tokenizer, config.template, room, values, uncut=("principle",)
            )
            questions.append(question)
            self._asked += 1
            self._cut += cut
        thoughts: list[list[int]] = []
        if config.thought:
            thoughts = judge.answer(
                questions,
                max_new_tokens=config.thought,
                temperature=0.0,
                seed=config.seed,
            )
        logprobs = judge.logprobs(questions, OPTIONS, thoughts)
        return class_probabilities(logprobs)[:, 0]


def choose(lines: list[str], *key: Any) -> str:
    """Returns the line that a stable hash of the key selects."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return lines[int.from_bytes(digest[:8], "big") % len(lines)]


def read_lines(path: str) -> list[str]:
    """Returns the lines of a file that have text, stripped.

    Raises:
      DataError: the file cannot be read, or has no such line.
    """
    try:
        text = read_text(paths.path(path))
    except DataError as error:
        raise DataError(f"principles: {error}") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"principles: {path} is empty; expected one per line")
    return lines


def load(config: FeedbackConfig, loader: Loader) -> Feedback:
    """Returns a judge as a labeler, loaded."""
    return Feedback(config, Judge(config.judge, loader.layout, loader.sources))
