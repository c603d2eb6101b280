"""Imports people's rankings as a dataset for the reward stage, and measures their agreement.

workdir/preferences/    ArrayRecord and JSON lines, as `collect` writes them; one ranking per row

The rankings are JSON lines (see `rewards/rankings.py`). If people ranked responses that `collect`
sampled, `answers` names its folders, and the sampled token ids are kept. Other responses are
encoded as text, with eos.
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

SPLITS = ("train", "validation")

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The rankings, and how they become a dataset."""

    stage: str = "import_rankings"
    """Name of the stage."""
    rankings: str
    """glob of JSON lines with rankings"""
    tokenizer: str
    """file or folder of the tokenizer"""
    answers: tuple[str, ...] = ()
    """folders that `collect` wrote, whose responses were ranked; empty: texts are encoded"""
    validation: ProperShare = 0.05
    """share of the prompts in validation, by a stable hash of their first user turn"""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


Sampled = dict[str, tuple[list[int], dict[str, list[int]]]]
"""Token ids of sampled responses: {prompt: (its ids, {completion: its ids})}."""


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes preferences/; returns counts, the share of tied pairs and the agreement."""
    rankings = read_rankings(config.rankings)
    tokenizer = load_tokenizer(config.tokenizer)
    sampled = _read_sampled(config.answers)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for ranking in rankings:
        prompt = ranking.prompt
        key = prompt if isinstance(prompt, str) else opening(prompt)
        split = split_of(key, validation=config.validation, test=0.0)
        try:
            row = _row(ranking, tokenizer, sampled)
        except DataError as error:
            raise DataError(
                f"{config.rankings}: prompt {ranking.key[:60]!r}: {error}"
            ) from None
        splits[split].append(row)
    for split, rows in splits.items():
        if not rows:
            raise DataError(
                f"import_rankings.validation={config.validation}:"
                f" {len(rankings)} rankings leave no {split} prompt"
            )
    write_preferences(workdir / FOLDER, splits, labeler="unnamed")
    measured = ranking_metrics(rankings)
    metrics = {f"import_rankings/{name}": value for name, value in measured.items()}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def ranking_metrics(rankings: list[Ranking]) -> dict[str, float]:
    """Returns counts of rankings, labelers and comparisons, the share of ties, and agreement."""
    people = by_labeler(rankings)
    is_tie = []
    for ranking in rankings:
        pairs = itertools.combinations(ranking.ranks, 2)
        is_tie += [first == second for first, second in pairs]
    metrics = {
        "rankings": float(len(rankings)),
        "labelers": float(len(people)),
        "comparisons": float(len(is_tie)),
        "ties": float(np.mean(is_tie)),
    }
    if len(people) == 1:
        return metrics
    opinions = [opinions_of(own) for own in people.values()]
    judged = sorted({pair for own in opinions for pair in own})
    table = [np.array([own.get(pair, np.nan) for pair in judged]) for own in opinions]
    return metrics | agreement_of(table)


def opinions_of(rankings: list[Ranking]) -> dict[tuple[str, str, str], float]:
    """Returns {(prompt, a, b): +1 where a is ranked better, 0 for a tie, -1}, with a before b.

    Ranks are compared within one ranking only: another ranking of the same prompt may be of other
    completions. If several rankings have a pair, the last one counts.
    """
    opinions: dict[tuple[str, str, str], float] = {}
    for ranking in rankings:
        ranked = sorted(set(zip(ranking.completions, ranking.ranks, strict=True)))
        for (a, a_rank), (b, b_rank) in itertools.combinations(ranked, 2):
            opinions[ranking.key, a, b] = float(np.sign(b_rank - a_rank))
    return opinions


def _read_sampled(folders: tuple[str, ...]) -> Sampled:
    """Returns the token ids of all responses in folders that `collect` wrote."""
    sampled: Sampled = {}
    for folder, split in itertools.product(folders, SPLITS):
        source = read_preferences(folder, split)
        for row in (source[i] for i in range(len(source))):
            prompt_ids = row["prompt_tokens"].tolist()
            _, completions = sampled.setdefault(row["prompt"], (prompt_ids, {}))
            ids = [tokens.tolist() for tokens in row["completion_tokens"]]
            completions.update(zip(row["completions"], ids, strict=True))
    return sampled


def _row(ranking: Ranking, tokenizer: Tokenizer, sampled: Sampled) -> dict[str, Any]:
    """Returns a ranking as a row of a preference dataset."""
    prompt, completions = _token_ids(ranking, tokenizer, sampled)
    return {
        "prompt": ranking.key,
        "prompt_tokens": prompt,
        "completions": list(ranking.completions),
        "completion_tokens": completions,
        "scores": ranking.scores,
        "ranks": list(ranking.ranks),
        "labeler": ranking.labeler,
    }


def _token_ids(
    ranking: Ranking, tokenizer: Tokenizer, sampled: Sampled
) -> tuple[list[int], list[list[int]]]:
    """Returns the token ids of a ranking's prompt and of its completions."""
    if not sampled:
        messages = ranking.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = chat.render_prompt(tokenizer, messages).tolist()
        texts = ranking.completions
        return prompt, [chat.response_tokens(tokenizer, text) for text in texts]
    prompt, ids = sampled.get(ranking.key, ([], {}))
    if any(text not in ids for text in ranking.completions):
        raise DataError(
            "import_rankings.answers: they lack a ranked response to"
            f" {ranking.key[:60]!r}"
        )
    return prompt, [ids[text] for text in ranking.completions]
