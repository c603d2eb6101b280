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
from rlhfjax.ranges import Finite
from rlhfjax.rewards.judge import (
    Judge,
    JudgeConfig,
    ask,
    class_probabilities,
    load_judge,
    readable,
)
from rlhfjax.rewards.responses import Pairs, Reward, TextReward
from rlhfjax.roles import Sources


@dataclasses.dataclass(frozen=True)
class ClassConfig:
    """One answer of the multiple choice."""

    option: str  # what the judge says: "A"
    reward: Finite
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
            raise ConfigError(
                f"rubric.classes: a choice needs at least 2, got {len(self.classes)}"
            )


class Rubric:
    """A rubric as a scorer of texts; metrics: the mean probability of each class, the share of
    questions cut."""

    def __init__(self, config: RubricConfig, judge: Judge):
        self._config, self._judge = config, judge

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return self.with_metrics(prompts, responses)[0]

    def with_metrics(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[np.ndarray, Pairs]:
        chances, cut = self.probabilities(prompts, responses)
        n = float(len(responses))
        scores = chances @ np.array([one.reward for one in self._config.classes])
        sums = zip(self._config.classes, chances.sum(axis=0), strict=True)
        metrics = {f"class_{one.name or one.option}": (float(s), n) for one, s in sums}
        return scores.astype(np.float32), metrics | {"judge_cut": (float(cut), n)}

    def probabilities(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
    ) -> tuple[np.ndarray, int]:
        """p(class | rubric, prompt, response), [n, classes], and how many of the questions were cut
        to fit."""
        options = [one.option for one in self._config.classes]
        room = self._judge.room(options)
        asked = [
            ask(
                self._judge.tokenizer,
                self._config.template,
                room,
                prompt=readable(prompt),
                response=response,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        logprobs = self._judge.logprobs([question for question, _ in asked], options)
        return class_probabilities(logprobs), sum(cut for _, cut in asked)


def load(
    values: Mapping[str, Any],
    folder: Path,
    layout: Layout,
    tokenizer: Tokenizer,
    sources: Sources,
    program: str,
) -> Reward:
    config = build(RubricConfig, values, str(folder / "reward.json"))
    return TextReward(
        Rubric(config, load_judge(config.judge, folder, layout, sources)), tokenizer
    )
