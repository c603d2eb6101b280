"""A rule that stands for people: the share of the letter e among a response's letters."""

import numpy as np


def share_of_e(prompt: str, response: str, metadata: dict) -> float:
    """Returns a score in [0, 1]; the length of the response does not tell it."""
    letters = [letter for letter in response.lower() if letter.isalpha()]
    return letters.count("e") / max(1, len(letters))


def scorer(prompts: list[str], responses: list[str]) -> np.ndarray:
    """Returns the scores of several responses, as a `Scorer` does."""
    pairs = zip(prompts, responses, strict=True)
    return np.array([share_of_e(prompt, response, {}) for prompt, response in pairs])
