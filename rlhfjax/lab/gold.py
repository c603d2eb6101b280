"""Reports what length and single words predict of a gold reward's preferences.

    python -m rlhfjax.lab.gold runs/quickstart/03_collect/preferences
    python -m rlhfjax.lab.gold jsonl:pairs/{split}.jsonl --split=validation --gold=sentiment

It reads responses with the scores that their labeler gave: the folder that `collect` wrote with the
gold reward as its labeler, or another source of preferences. A gold reward of which length, a word
or ten words predict more than 55 % of held-out pairs is that length or those words in disguise.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax import process
from rlhfjax.data.config import open_preferences
from rlhfjax.errors import DataError
from rlhfjax.evals.text import words
from rlhfjax.evals.words import MOST_RESPONSES, substitutes, word_baselines
from rlhfjax.lab.page import MOST_PREDICTED
from rlhfjax.rewards.gold import SCORERS, GoldConfig


def report(rows: Sequence[Mapping[str, Any]], name: str = "") -> list[str]:
    """Returns the lines of the report.

    Args:
      rows: with `prompt`, `completions` and `scores`; lengths are counted in words.
      name: a scorer of `rewards.gold`, which scores the responses anew; empty: the rows' scores.
    Raises:
      DataError: there are fewer than two rows.
      ConfigError: there is no such scorer.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} rows: at least 2 are needed, half are held out")
    texts = [list(row["completions"]) for row in rows]
    labels = [list(row["scores"]) for row in rows]
    if name:
        scorer = SCORERS[GoldConfig(name=name).name]()
        labels = [
            scorer([row["prompt"]] * len(responses), responses).tolist()
            for row, responses in zip(rows, texts, strict=True)
        ]
    widest = max(map(len, texts))
    lengths = [[float(len(words(text))) for text in row] for row in texts]
    tables = _padded(lengths, widest), _padded(labels, widest)
    found = substitutes(texts, *tables)
    by_words = word_baselines(texts, tables[1])
    lines = [
        f"{value:6.1%}  {name}{'  too high' if value > MOST_PREDICTED else ''}"
        for name, value in found.items()
    ]
    chosen = [f"{'+' if sign > 0 else '-'}{word}" for word, sign in by_words.chosen]
    return [
        f"{len(rows)} prompts, {by_words.pairs} held-out pairs, at most {MOST_RESPONSES}"
        " responses per prompt",
        *lines,
        f"the ten words: {' '.join(chosen) or 'none'}",
    ]


def _padded(rows: Sequence[Sequence[float]], width: int) -> np.ndarray:
    """Returns rows of several lengths as an array, NaN where there is no value."""
    table = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def main() -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog="python -m rlhfjax.lab.gold", description=about
    )
    parser.add_argument("preferences", help="folder of `collect`, or a source's spec")
    parser.add_argument("--split", default="train")
    parser.add_argument("--gold", default="", help=f"one of {', '.join(SCORERS)}")
    given = parser.parse_args()
    source = open_preferences((given.preferences,), given.split)
    rows = [source[i] for i in range(len(source))]
    print("\n".join(report(rows, given.gold)))


if __name__ == "__main__":
    process.run(main)
