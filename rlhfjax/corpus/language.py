"""The language of a text, by a linear classifier over byte n-grams (py3langid, 97 languages).

Source: Lui & Baldwin 2012, "langid.py". Filtering a corpus so is as in CCNet (Wenzek et al. 2020,
section 4.2, with fastText's classifier and a threshold of 0.5).
"""

import functools
import importlib.util
from typing import Any, NamedTuple

from rlhfjax.errors import ConfigError, install

MOST_CHARACTERS = 2_000  # of a text that the classifier reads, the first ones


class Language(NamedTuple):
    """What a text is written in."""

    code: str  # ISO 639
    probability: float


def identify(text: str) -> Language:
    """Returns the most probable language of a text."""
    code, probability = _identifier().classify(text[:MOST_CHARACTERS])
    return Language(code, float(probability))


def validate_languages(option: str, codes: tuple[str, ...]) -> None:
    """Validates the codes of languages.

    Raises:
      ConfigError: py3langid is not installed, or does not know a code.
    """
    validate_installed(option, "py3langid")
    known = sorted(_identifier().labels)
    for code in codes:
        if code not in known:
            raise ConfigError(f"{option}={code!r}: expected one of {', '.join(known)}")


def validate_installed(option: str, package: str) -> None:
    """Raises ConfigError if a package of the extra `prepare` is missing."""
    if importlib.util.find_spec(package) is None:
        hint = install("prepare")
        raise ConfigError(f"{option}: {package} is not installed; {hint}")


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
