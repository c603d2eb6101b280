"""What scores a finished response: `load_scorer("gold:sentiment")`, rules by name, and the protocol they follow."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.rewards import rules
from rlhfjax.rewards.gold import Sentiment


@runtime_checkable
class Scorer(Protocol):
    """Scores finished responses as text; more is better.

    Args:
      prompts: n texts, what was asked.
      responses: n texts, without special tokens.

    Returns:
      float32 [n]. A score depends on its own prompt and response only.
    """

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> np.ndarray: ...


SCORERS: dict[str, Callable[[], Scorer]] = {"gold:sentiment": Sentiment}


def load_scorer(name: str) -> Scorer:
    """Makes the scorer of that name, as a config spells it: one of SCORERS, or `rule:module:function`.

    Raises:
      ConfigError: there is none of that name.
      DataError: it needs a package that is not installed.
    """
    if name.startswith(rules.PREFIX):
        return rules.Rule(rules.parse(name))
    if name not in SCORERS:
        raise ConfigError(
            f"scorer {name!r} is unknown; known are {', '.join(sorted(SCORERS))}"
        )
    return SCORERS[name]()
