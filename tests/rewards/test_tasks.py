"""reasoning-gym's tasks as prompts and as a rule."""

import json

import pytest

from rlhfjax import recipe
from rlhfjax.data.sources import open_source
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.rewards import tasks
from rlhfjax.rewards.load import describe
from rlhfjax.rewards.rules import Rule
from rlhfjax.stages import stage_config
from tests.needs import needs

pytestmark = needs("reasoning_gym", extra="tasks")
NAMES = ("chain_sum", "spell_backward", "word_sorting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tasks") / "run"
    recipe.run(stage_config("tasks", tasks=NAMES, size=20, seed=3), workdir)
    return workdir / "prompts"


def test_every_question_is_in_one_split_and_opens_as_a_prompt(folder):
    splits = ("train", "validation", "test")
    read = {
        s: [json.loads(x)["prompt"] for x in (folder / f"{s}.jsonl").open()]
        for s in splits
    }
    assert {s: len(x) for s, x in read.items()} == {
        "train": 48,
        "validation": 6,
        "test": 6,
    }
    assert len({q for some in read.values() for q in some}) == 60
    source = open_source(
        f"jsonl:{folder}/{{split}}.jsonl", kind="prompt", split="validation"
    )
    assert source[0]["messages"] == [{"role": "user", "content": read["validation"][0]}]


def test_right_answers_score_1_and_wrong_ones_0_through_the_rule(folder):
    name = f"rule:{tasks.RULE}?metadata={folder}/*.jsonl&workers=1&failed=-1&timeout=60"
    rule = Rule(describe(name).config)
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    prompts = [f"<|user|>{row['prompt']}<|assistant|>" for row in rows]
    right = [
        row["answer"] if i % 2 else f"hm <answer> {row['answer']}</answer>"
        for i, row in enumerate(rows)
    ]
    assert rule(prompts, right).tolist() == [1.0] * len(rows)
    wrong = rule(prompts, ["no idea"] * len(rows))
    assert wrong[:2].tolist() == [
        0.0,
        0.0,
    ]  # chain_sum; spell_backward gives credit by letters
    assert max(wrong) < 1
    assert min(wrong) >= 0  # a wrong answer is no failure
    rule.close()


def test_partial_credit_stays_fractional():
    some = [
        tasks.score("", "zzz " + row["answer"], row)
        for row in tasks.rows("sentence_reordering", 5, 0)
    ]  # one word too many
    assert all(0 < x < 1 for x in some)


def test_a_changed_task_and_an_unknown_one_are_named():
    row = next(iter(tasks.rows("chain_sum", 3, 0)))
    with pytest.raises(DataError, match="has changed"):
        tasks.score("", "1", row | {"answer": "not this"})
    with pytest.raises(ConfigError, match="no_such_task"):
        tasks.dataset("no_such_task", 3, 0)
