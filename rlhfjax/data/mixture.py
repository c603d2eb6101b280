"""Sources that training mixes by weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhfjax.data import verdicts
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source
from rlhfjax.errors import ConfigError


class Mixed(Concatenated):
    """Several sources with weights. As a source it is their rows one after the other.

    The loaders mix the sources in training: of n examples drawn, about n w / (sum of the weights)
    are rows of a source with weight w. A source that ends before the others begins again, in a new
    order. A single pass has every row once, whatever the weights.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        super().__init__(sources)
        self.weights = [float(weight) for weight in weights]

    def pairs(self) -> list[tuple[Source, float]]:
        """Returns the sources with their weights."""
        return list(zip(self.sources, self.weights, strict=True))


def combined(
    sources: Sequence[Source], weights: Sequence[float | None], option: str
) -> Source:
    """Returns the sources of an option as one: mixed if they have weights, else concatenated.

    Args:
      weights: of each source; None: the source has none.
      option: name of the option, for the error message.
    Raises:
      ConfigError: some sources have a weight, and others have none.
    """
    validate_weights(weights, option)
    given = [weight for weight in weights if weight is not None]
    if given:
        return Mixed(sources, given)
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def validate_weights(weights: Sequence[float | None], option: str) -> None:
    """Raises ConfigError if some sources have a weight, and others have none."""
    weights = list(weights)
    if None in weights and any(weight is not None for weight in weights):
        raise ConfigError(
            f"{option}[{weights.index(None)}].weight=None: other sources have a weight;"
            " expected one for all or for none"
        )


class Part:
    """Consecutive rows of a source."""

    def __init__(self, source: Source, start: int, count: int):
        self.kind = source.kind
        self.skipped, self.merged = 0, 0  # the whole source counts them
        self.accepted_by = getattr(source, "accepted_by", None)
        self._source = source
        self._start = start
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return self._source[self._start + index]

    def locate(self, index: int) -> str:
        return self._source.locate(self._start + index)

    def of_chosen(
        self, indices: np.ndarray, name: str, dtype: Any, measure: verdicts.Measure
    ) -> np.ndarray:
        """Returns what `verdicts.of_chosen` does."""
        inside = self._start + indices
        return verdicts.of_chosen(self._source, inside, name, dtype, measure)


def mixed_like(source: Source, whole: Source) -> Source:
    """Returns `whole` with the mixture of `source`, whose rows its rows belong to one by one.

    The loaders take the rows of both in the same order.
    """
    if not isinstance(source, Mixed):
        return whole
    parts, start = [], 0
    for part in source.sources:
        parts.append(Part(whole, start, len(part)))
        start += len(part)
    return Mixed(parts, source.weights)
