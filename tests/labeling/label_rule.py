"""A rule that stands for people: the share of punctuation among a response's characters."""

import numpy as np


def share_of_punctuation(prompt: str, response: str, metadata: dict) -> float:
    """Returns a score in [0, 1]; the length of the response hardly tells it."""
    marks = sum(character in ".,!?'" for character in response)
    return marks / max(1, len(response))


def scorer(prompts: list[str], responses: list[str]) -> np.ndarray:
    """Returns the scores of several responses, as a `Scorer` does."""
    pairs = zip(prompts, responses, strict=True)
    scores = [share_of_punctuation(prompt, text, {}) for prompt, text in pairs]
    return np.array(scores)
