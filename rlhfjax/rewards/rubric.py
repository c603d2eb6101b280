"""Rule-based reward models: a rubric put to a judge as a multiple choice, and a reward for each class.

r(x, y) = sum_c p(c | rubric, x, y) reward_c, p the judge's probabilities of the options

Source: OpenAI 2023, GPT-4 technical report, section 6 (RBRMs: prompt, output and a rubric in; a class out).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax.config import build
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.rewards.judge import Judge, JudgeConfig, class_probabilities, fill, load_judge, readable
from rlhfjax.rewards.responses import Pairs, Reward, TextReward


@dataclasses.dataclass(frozen=True)
class ClassConfig:
    """One answer of the multiple choice."""

    option: str  # what the judge says: "A"
    reward: float
    name: str = ""  # in the metrics, as class_NAME; empty: the option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RubricConfig:
    judge: JudgeConfig
    template: str  # with {response}, and {prompt} where the judge is to see it; it spells out the options
    classes: tuple[ClassConfig, ...] = ()

    def __post_init__(self):
        if "{response}" not in self.template:
            raise ConfigError("rubric.template: it has no {response}")
        if len(self.classes) < 2:
            raise ConfigError(f"rubric.classes: a choice needs at least 2, got {len(self.classes)}")


class Rubric:
    """A rubric as a scorer of texts, with the mean probability of each class as a metric."""

    def __init__(self, config: RubricConfig, judge: Judge):
        self._config, self._judge = config, judge

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return self.with_metrics(prompts, responses)[0]

    def with_metrics(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, Pairs]:
        chances = self.probabilities(prompts, responses)
        n = float(len(responses))
        scores = chances @ np.array([one.reward for one in self._config.classes])
        sums = zip(self._config.classes, chances.sum(axis=0), strict=True)
        return scores.astype(np.float32), {f"class_{one.name or one.option}": (float(s), n) for one, s in sums}

    def probabilities(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """p(class | rubric, prompt, response), [n, classes]."""
        questions = [
            [{"role": "user", "content": fill(self._config.template, prompt=readable(prompt), response=response)}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return class_probabilities(self._judge.logprobs(questions, [one.option for one in self._config.classes]))


def load(values: Mapping[str, Any], folder: Path, layout: Layout, tokenizer: Tokenizer) -> Reward:
    config = build(RubricConfig, values, str(folder / "reward.json"))
    return TextReward(Rubric(config, load_judge(config.judge, folder, layout)), tokenizer)
