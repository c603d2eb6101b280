"""People's rankings into a dataset that the reward stage reads, with the agreement between those who ranked.

workdir/preferences/    ArrayRecord and JSON lines, as `collect` leaves them; one row a ranking

The rankings are JSON lines (see `rewards/rankings.py`). Where they are of answers that `collect` sampled, `answers`
names its folders, and the ids that were sampled are kept; other answers are encoded as text, with eos.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from rlhfjax.data import chat
from rlhfjax.data.preferences import read_preferences, write_preferences
from rlhfjax.data.rows import opening, split_of
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer
from rlhfjax.errors import DataError
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.ranges import ProperShare
from rlhfjax.rewards.agreement import agreement_of
from rlhfjax.rewards.rankings import Ranking, by_labeler, read_rankings
from rlhfjax.stages.collect import FOLDER

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "import_rankings"
    rankings: str  # a glob
    tokenizer: str  # file or folder
    answers: tuple[str, ...] = ()  # folders that `collect` wrote
    validation: ProperShare = (
        0.05  # share of the prompts, by a stable hash of their first user turn
    )
    mesh: MeshConfig = MeshConfig()


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes preferences/; returns counts, the share of tied pairs and the agreement."""
    rankings = read_rankings(config.rankings)
    tokenizer = load_tokenizer(config.tokenizer)
    native = _native(config.answers)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for one in rankings:
        key = one.prompt if isinstance(one.prompt, str) else opening(one.prompt)
        held_out = split_of(key, validation=config.validation, test=0.0) == "validation"
        splits["validation" if held_out else "train"].append(
            _row(one, tokenizer, native)
        )
    for split, rows in splits.items():
        if not rows:
            raise DataError(
                f"import_rankings: {len(rankings)} rankings leave no {split} prompt; change `validation`"
            )
    write_preferences(workdir / FOLDER, splits, labeler="unnamed")
    metrics = {
        f"import_rankings/{name}": value for name, value in describe(rankings).items()
    }
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def describe(rankings: list[Ranking]) -> dict[str, float]:
    """How many rankings, labelers and comparisons, how many of the pairs are ties, and how far labelers agree."""
    people = by_labeler(rankings)
    pairs = [
        (a, b)
        for one in rankings
        for i, a in enumerate(one.ranks)
        for b in one.ranks[i + 1 :]
    ]
    out = {
        "rankings": float(len(rankings)),
        "labelers": float(len(people)),
        "comparisons": float(len(pairs)),
        "ties": float(np.mean([a == b for a, b in pairs])),
    }
    said = [opinions_of(some) for some in people.values()]
    pairs_judged = sorted({pair for one in said for pair in one})
    table = [np.array([one.get(pair, np.nan) for pair in pairs_judged]) for one in said]
    return out | (agreement_of(table) if len(people) > 1 else {})


def opinions_of(rankings: list[Ranking]) -> dict[tuple[str, str, str], float]:
    """{(prompt, a, b): +1 where a is ranked better, 0 for a tie, -1}, a before b; the last word on a pair counts.

    Ranks are compared within one ranking only: another one of the same prompt may be of other completions.
    """
    found = {}
    for one in rankings:
        ranked = sorted(set(zip(one.completions, one.ranks, strict=True)))
        for (a, first), (b, second) in itertools.combinations(ranked, 2):
            found[one.key, a, b] = float(np.sign(second - first))
    return found


def _native(
    folders: tuple[str, ...],
) -> dict[str, tuple[list[int], dict[str, list[int]]]]:
    """{prompt: (its ids, {completion: its ids})} of what was sampled."""
    found: dict[str, tuple[list[int], dict[str, list[int]]]] = {}
    for folder in folders:
        for split in ("train", "validation"):
            source = read_preferences(folder, split)
            for row in (source[i] for i in range(len(source))):
                ids = [one.tolist() for one in row["completion_tokens"]]
                texts = dict(zip(row["completions"], ids, strict=True))
                found.setdefault(row["prompt"], (row["prompt_tokens"].tolist(), {}))[
                    1
                ].update(texts)
    return found


def _row(one: Ranking, tokenizer: Tokenizer, native: dict[str, Any]) -> dict[str, Any]:
    if native:
        if one.key not in native or any(
            text not in native[one.key][1] for text in one.completions
        ):
            raise DataError(
                f"import_rankings.answers: they lack a ranked answer to {one.key[:60]!r}"
            )
        prompt, ids = native[one.key]
        completions = [ids[text] for text in one.completions]
    else:
        messages = (
            one.prompt
            if isinstance(one.prompt, list)
            else [{"role": "user", "content": one.prompt}]
        )
        prompt = chat.render_prompt(tokenizer, messages).tolist()
        completions = [
            chat.response_tokens(tokenizer, text) for text in one.completions
        ]
    return {
        "prompt": one.key,
        "prompt_tokens": prompt,
        "completions": list(one.completions),
        "completion_tokens": completions,
        "scores": one.scores,
        "ranks": list(one.ranks),
        "labeler": one.labeler,
    }
