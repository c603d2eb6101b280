"""Rule-based reward models: a judge answers a rubric's multiple choice; each class has a reward.

r(x, y) = sum_c p(c | rubric, x, y) reward_c, p the judge's probabilities of the options

Source: OpenAI 2023, GPT-4 technical report, section 6 (an RBRM takes a prompt, an output and a
rubric, and returns a class).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.ranges import Finite
from rlhfjax.rewards.judge import (
    Judge,
    JudgeConfig,
    ask,
    class_probabilities,
    validate_placeholders,
)
from rlhfjax.rewards.registry import Loader
from rlhfjax.rewards.responses import TextReward
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True)
class ClassConfig:
    """One option of the multiple choice."""

    option: str
    """the judge's text for it, "A" for instance"""
    reward: Finite
    """the reward of a response that the judge puts into this class"""
    name: str = ""
    """its name in the metrics, as class_NAME; empty: the option"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RubricConfig:
    """A rubric, its classes and its judge."""

    judge: JudgeConfig
    """the language model that chooses"""
    template: str
    """the question, with {response}, the options, and {prompt} if the judge is to see it"""
    classes: tuple[ClassConfig, ...] = ()
    """the options, at least two"""

    def __post_init__(self):
        validate_placeholders(
            "rubric.template", self.template, ("prompt", "response"), ("response",)
        )
        if len(self.classes) < 2:
            raise ConfigError(
                f"rubric.classes: a choice needs at least 2, got {len(self.classes)}"
            )


class Rubric:
    """A rubric as a scorer of texts.

    Metrics: class_NAME, the mean probability of each class; judge_cut, the share of questions whose
    prompt or response was cut to fit.
    """

    def __init__(self, config: RubricConfig, judge: Judge):
        self._config, self._judge = config, judge

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns the scores, float32 [n]."""
        return self.with_metrics(prompts, responses)[0]

    def with_metrics(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[np.ndarray, Metrics]:
        """Returns the scores, float32 [n], and the metrics."""
        classes = self._config.classes
        probabilities, cut = self.probabilities(prompts, responses)
        n = float(len(responses))
        scores = probabilities @ np.array([choice.reward for choice in classes])
        metrics: Metrics = {}
        for choice, total in zip(classes, probabilities.sum(axis=0), strict=True):
            metrics[f"class_{choice.name or choice.option}"] = (float(total), n)
        metrics["judge_cut"] = (float(cut), n)
        return scores.astype(np.float32), metrics

    def probabilities(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[np.ndarray, int]:
        """Returns the probabilities of the classes [n, classes] and the number of questions cut."""
        options = [choice.option for choice in self._config.classes]
        room = self._judge.room(options)
        questions, cut = [], 0
        for prompt, response in zip(prompts, responses, strict=True):
            values = {"prompt": prompt, "response": response}
            question, was_cut = ask(
                self._judge.tokenizer, self._config.template, room, values
            )
            questions.append(question)
            cut += was_cut
        return class_probabilities(self._judge.logprobs(questions, options)), cut


def load(config: RubricConfig, loader: Loader) -> TextReward:
    """Returns a rubric as a reward, its judge loaded."""
    judge = Judge(config.judge, loader.layout, loader.sources)
    return TextReward(Rubric(config, judge), loader.tokenizer, "together")
