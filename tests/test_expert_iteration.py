"""Expert iteration on the tiny recipe: collect, keep the best, fine-tune, and what is then sampled
is better.

The reward counts a letter. The gold labeler would not do: the tiny model says hardly any words,
nine pairs in ten are tied at 0, and there is nothing to select.
"""

from pathlib import Path

import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.stages import stage_config
from tests import tiny

OPTIM = {"learning_rate": 1e-2, "warmup_steps": 2}


class Folder:
    """Rounds by hand in one folder, each stage by the function that `rlhfjax train` calls."""

    def __init__(self, folder: Path, tokenizer: Path, conversations: Path):
        self.folder, self.tokenizer = folder, tokenizer
        self.prompts = {
            "spec": f"jsonl:{conversations}/train.jsonl",
            "kind": "messages",
            "split": "all",
        }

    def run(self, stage: str, name: str, **values) -> dict[str, float]:
        return recipe.run_stage(
            to_dict(stage_config(stage, **values)), self.folder / name
        )

    def collect(self, name: str, policy: Path, seed: int) -> float:
        """The mean score of what a policy samples."""
        prompts = {
            "prompts": {"source": self.prompts, "limit": 48},
            "eval_prompts": {"source": self.prompts, "limit": 8},
        }
        rule = "rule:tests.rewards.some_rules:letters?workers=1"
        options = {
            "samples_per_prompt": 8,
            "batch_size": 16,
            "seed": seed,
            **prompts,
            **tiny.SAMPLING,
        }
        return self.run(
            "collect", name, init_from=str(policy), labeler=rule, **options
        )["collect/score"]

    def tune(self, name: str, policy: Path, keep: int) -> Path:
        """A policy fine-tuned on the best `keep` of the 8 answers to each prompt that `collected`
        holds.
        """
        kept = self.folder / f"{name}_kept"
        preferences = (str(self.folder / "collected" / "preferences"),)
        self.run(
            "select",
            kept.name,
            tokenizer=str(self.tokenizer),
            preferences=preferences,
            keep=keep,
        )
        rows = {"kind": "messages", "split": "all"}
        self.run(
            "sft",
            name,
            init_from=str(policy),
            sources=({"spec": f"jsonl:{kept}/train.jsonl", **rows},),
            eval_sources=({"spec": f"jsonl:{kept}/validation.jsonl", **rows},),
            length=32,
            batch_size=16,
            steps=30,
            optim=OPTIM,
        )
        return self.folder / name


@pytest.fixture(scope="module")
def scores(conversations, tmp_path_factory):
    """Mean scores of samples: before, after a round, and after as many steps on all answers, the
    worst included.

    The policy has two layers: with one it moves by fine-tuning on its own samples too.
    """
    run = tmp_path_factory.mktemp("two_layers")
    config = tiny.get_config(f"data={conversations},until=sft")
    config.pretrain.model.n_layers = 2
    recipe.run(to_dict(config), run)
    one = Folder(
        tmp_path_factory.mktemp("expert_iteration"), run / "00_tokenizer", conversations
    )
    sft = run / "02_sft"
    before = one.collect("collected", sft, seed=1)
    best = one.collect("after_best", one.tune("best", sft, keep=1), seed=2)
    everything = one.collect("after_all", one.tune("all", sft, keep=8), seed=2)
    return before, best, everything


@pytest.mark.nightly
def test_a_round_raises_the_score_of_what_is_sampled_and_only_selection_does(scores):
    before, best, everything = scores
    assert best > 2 * before  # 0.55 and 0.18 letters an answer when this was written
    assert everything < 1.3 * before  # 0.17: it is not fine-tuning that does it
