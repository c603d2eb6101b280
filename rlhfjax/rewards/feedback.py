"""AI feedback: a judge compares answers two by two, and what it thinks become soft preference labels.

    p_ij = 1/2 [ p(A | i as A, j as B) + p(B | j as A, i as B) ],   p(A) = e^{l_A} / (e^{l_A} + e^{l_B})

Both orders are asked, so that a liking for one of the letters cancels; p_ij + p_ji = 1. The label of answer i is
s_i = 1/K sum_j logit p_ij, the least-squares fit of s_i - s_j to the log-odds: with K = 2, sigmoid(s_i - s_j) = p_ij
exactly, which is what the reward stage's loss `soft` takes. After a chain of thought probabilities are clamped, 0.4 to
0.6 in the paper, since it makes the judge all too sure.

Source: Bai et al. 2022, "Constitutional AI", section 4.1 (one principle drawn for each comparison; clamping); Lee et
al. 2023, "RLAIF", section 2.1.1 (both orders averaged).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhfjax import paths
from rlhfjax.config import build
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.ranges import Seed, Share, TokensOrNone
from rlhfjax.rewards.judge import (
    Judge,
    JudgeConfig,
    ask,
    class_probabilities,
    load_judge,
    readable,
)
from rlhfjax.rewards.labelers import Answers
from rlhfjax.rewards.responses import Pairs, found
from rlhfjax.roles import DISK, Sources

TEMPLATE = """Consider the following conversation:
{prompt}

{principle}
Options:
(A) {a}
(B) {b}"""
OPTIONS = (" (A)", " (B)")
CERTAIN = 1e-6  # probabilities stay this far from 0 and 1, so that log-odds are finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackConfig:
    judge: JudgeConfig
    principles: str  # a file with one principle a line: "Which of these responses is more helpful?"
    template: str = TEMPLATE  # with {prompt}, {principle}, {a} and {b}
    thought: TokensOrNone = 0  # tokens of a chain of thought before the choice; 0: none
    clamp: tuple[Share, Share] = (
        0.0,
        1.0,
    )  # of probabilities; (0.4, 0.6) with a chain of thought
    seed: Seed = 0

    def __post_init__(self):
        low, high = self.clamp
        if low >= high or abs(low + high - 1) > 1e-9:
            raise ConfigError(
                f"feedback.clamp={self.clamp}: bounds (x, 1 - x) with x below 1/2 are needed"
            )
        if missing := [
            name for name in ("prompt", "a", "b") if f"{{{name}}}" not in self.template
        ]:
            raise ConfigError(f"feedback.template: it has no {{{missing[0]}}}")


class Feedback:
    """A judge as a labeler.

    Raises:
      DataError: the file of principles is not there or empty.
    """

    def __init__(self, config: FeedbackConfig, judge: Judge):
        self._config, self._judge = config, judge
        self._asked, self._cut = (
            0,
            0,
        )  # questions so far, and those whose texts were cut
        self.principles = read_lines(config.principles)

    def __call__(self, answers: Answers) -> np.ndarray:
        p, k = len(answers.prompts), answers.k
        odds = np.zeros((p, k, k))
        for (row, i, j), chance in zip(*self.comparisons(answers), strict=True):
            odds[row, i, j] = np.log(chance) - np.log1p(-chance)
            odds[row, j, i] = -odds[row, i, j]
        return odds.sum(axis=2) / k

    def metrics(self) -> Pairs:
        """judge_cut: share of the questions so far in which the prompt or an answer was cut to
        fit."""
        return {"judge_cut": (float(self._cut), float(self._asked))}

    def comparisons(
        self, answers: Answers
    ) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """Every (prompt, i, j), i < j, and the probability [n] that i is better, clamped."""
        pairs = list(itertools.combinations(range(answers.k), 2))
        places = [(row, i, j) for row in range(len(answers.prompts)) for i, j in pairs]
        swapped = [(row, j, i) for row, i, j in places]
        chances = (
            self._first_is_better(answers, places),
            1 - self._first_is_better(answers, swapped),
        )
        low, high = (min(max(x, CERTAIN), 1 - CERTAIN) for x in self._config.clamp)
        return places, np.clip((chances[0] + chances[1]) / 2, low, high)

    def _first_is_better(
        self, answers: Answers, places: list[tuple[int, int, int]]
    ) -> np.ndarray:
        """p(A), the first of each pair being A; [n]."""
        questions = []
        room = self._judge.room(OPTIONS, self._config.thought)
        for row, i, j in places:
            prompt, texts = answers.prompts[row], answers.completions[row]
            principle = choose(
                self.principles,
                self._config.seed,
                prompt,
                *sorted((texts[i], texts[j])),
            )
            values = {
                "prompt": readable(prompt),
                "principle": principle,
                "a": texts[i],
                "b": texts[j],
            }
            spoken = (self._judge.tokenizer, self._config.template)
            question, cut = ask(*spoken, room, whole=("principle",), **values)
            questions.append(question)
            self._asked, self._cut = self._asked + 1, self._cut + cut
        openings: list[list[int]] = []
        if self._config.thought:
            options = {
                "max_new_tokens": self._config.thought,
                "temperature": 0.0,
                "seed": self._config.seed,
            }
            openings = self._judge.answer(questions, **options)
        return class_probabilities(self._judge.logprobs(questions, OPTIONS, openings))[
            :, 0
        ]


def choose(lines: list[str], *key: Any) -> str:
    """One of some lines, by a stable hash of the key: the same for the same item, whatever else is asked."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return lines[int.from_bytes(digest[:8], "big") % len(lines)]


def read_lines(path: str) -> list[str]:
    try:
        lines = [
            line.strip()
            for line in paths.path(path).read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"principles: {path} cannot be read ({error})") from None
    if not lines:
        raise DataError(f"principles: {path} is empty; one a line is expected")
    return lines


def load(
    values: Mapping[str, Any], folder: Path, layout: Layout, sources: Sources = DISK
) -> Feedback:
    config = build(FeedbackConfig, values, str(folder / "reward.json"))
    config = dataclasses.replace(config, principles=found(config.principles, folder))
    return Feedback(config, load_judge(config.judge, folder, layout, sources))
