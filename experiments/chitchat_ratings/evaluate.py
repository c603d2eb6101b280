"""Prints how a reward model orders held-out conversations that people rated.

    python experiments/chitchat_ratings/evaluate.py WORKDIR … [--split=validation]

Each WORKDIR is a finished run of recipe.py; several are averaged pair by pair. Pairs are all those
of the split (`test` by default) whose ratings differ by 2 or more. Rows of the table:

  reward model      r(opening, conversation), ties 1/2
  length            the longer conversation, by characters, is the better one
  chance            1/2
  model - length    difference of the two, pair by pair

Intervals are of 95 %, from a bootstrap over conversations (`rlhfjax/evals/dyads.py`): a
conversation is in many pairs, which are not independent.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlhfjax import process
from rlhfjax.data import examples
from rlhfjax.data.chitchat import ChitchatRatings, Rated
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.evals.dyads import pair_mean
from rlhfjax.evals.length import correlation
from rlhfjax.interop import store
from rlhfjax.json_text import Object, read
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.model import ModelReward

REWARD = "03_reward"
BATCH = 8  # conversations per forward pass


def main() -> None:
    workdirs = [Path(word) for word in sys.argv[1:] if not word.startswith("--")]
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    if not workdirs or not set(options) <= {"--split=validation", "--split=test"}:
        raise ConfigError("evaluate.py: expected WORKDIR … [--split=validation]")
    split = options[-1].partition("=")[2] if options else "test"
    rated = list(ChitchatRatings().rated(split))
    pairs = Pairs(rated)
    lengths = np.array([len(one.text) for one in rated])
    scores, whole = zip(*(score(workdir, rated) for workdir in workdirs), strict=True)
    print(f"{split}: {pairs.describe()}; read whole: {np.mean(whole[0]):.1%}")
    by_length = pairs.right(lengths)
    by_model = [pairs.right(each) for each in scores]
    for workdir, right in zip(workdirs, by_model, strict=True):
        print(f"  {workdir}: {pairs.interval(right)}")
    mean = np.mean(by_model, axis=0)
    print(f"reward model    {pairs.interval(mean)}")
    print(f"length          {pairs.interval(by_length)}")
    print(f"model - length  {pairs.interval(mean - by_length)}")
    both = np.array(whole[0])[pairs.first] & np.array(whole[0])[pairs.second]
    print(f"both read whole ({both.sum()} pairs)")
    print(f"  reward model    {pairs.interval(mean, both)}")
    print(f"  model - length  {pairs.interval(mean - by_length, both)}")
    labels = np.array([one.score for one in rated])
    for name, values in (("log length", np.log(lengths)), ("reward", scores[0])):
        r = correlation(labels, values)
        print(f"correlation of rating and {name}: {r and r.value:.3f}")
    r = correlation(np.log(lengths), scores[0])
    print(f"correlation of reward and log length: {r and r.value:.3f}")


class Pairs:
    """The pairs of some conversations that share an opening and differ by 2 or more."""

    def __init__(self, rated: list[Rated]):
        first, second = np.triu_indices(len(rated), k=1)
        labels = np.array([one.score for one in rated])
        openings = np.array([one.opening for one in rated])
        gap = labels[first] - labels[second]
        keep = np.abs(gap) >= ChitchatRatings.LEAST_DIFFERENCE
        keep &= openings[first] == openings[second]
        self.first, self.second = first[keep], second[keep]
        self.order = np.sign(gap[keep])

    def describe(self) -> str:
        members = np.unique([self.first, self.second])
        return f"{len(self.first)} pairs of {len(members)} conversations"

    def right(self, scores: np.ndarray) -> np.ndarray:
        """Returns 1, 1/2 or 0 for each pair that scores order right, tie, or order wrong."""
        margin = (scores[self.first] - scores[self.second]) * self.order
        return (np.sign(margin) + 1) / 2

    def interval(self, values: np.ndarray, keep: np.ndarray | None = None) -> str:
        keep = np.ones(len(values), bool) if keep is None else keep
        result = pair_mean(values[keep], self.first[keep], self.second[keep])
        return f"{result.value:+.1%} [{result.low:+.1%}, {result.high:+.1%}]"


def score(workdir: Path, rated: list[Rated]) -> tuple[np.ndarray, list[bool]]:
    """Returns the reward of each conversation, and whether it was read whole."""
    folder = workdir / REWARD
    config = read(folder / "config.json", Object)
    layout = make_layout(MeshConfig())
    saved = store.load(folder, layout)
    reward = ModelReward(saved.model, saved.params)
    rewards: list[float] = []
    whole: list[bool] = []
    for start in range(0, len(rated), BATCH):
        part = rated[start : start + BATCH]
        values, cut = _score(reward, saved.tokenizer, part, config["length"])
        rewards += values[: len(part)].tolist()
        whole += [not is_cut for is_cut in cut]
    return np.array(rewards), whole


def _score(
    reward: ModelReward, tokenizer: Tokenizer, part: list[Rated], length: int
) -> tuple[np.ndarray, list[bool]]:
    """Returns the rewards of BATCH conversations, the last ones repeated, and which were cut."""
    rows = [
        examples.preference(
            tokenizer,
            {"prompt": one.opening, "completions": [one.text], "scores": [0.0]},
            k=1,
            length=length,
        )
        for one in part
    ]
    filled = [*rows, *[rows[-1]] * (BATCH - len(rows))]
    tokens = jnp.concatenate([row.tokens for row in filled])
    attention_mask = jnp.concatenate([row.attention_mask for row in filled])
    values = reward(tokens, attention_mask, attention_mask)
    return np.asarray(values), [bool(row.cut[0]) for row in rows]


if __name__ == "__main__":
    process.run(main)
