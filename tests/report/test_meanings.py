"""Every metric that a stage writes is explained, on hover and in docs/metrics.md."""

import json
import os
import re
from pathlib import Path

import pytest

from rlhfjax import stages
from rlhfjax.evals.stats import METHODS
from rlhfjax.report import meanings
from tests.frozen import programs

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rlhfjax"


def frozen_metrics():
    """STAGE/NAME of what the variants of all stages wrote."""
    table = json.loads(programs.METRICS.read_text())
    variants = [row for row in table.values() if isinstance(row, dict)]
    return sorted({name for row in variants for name in row})


@pytest.mark.parametrize("name", frozen_metrics())
def test_a_metric_of_a_stage_is_explained(name):
    kind, _, base = name.partition("/")
    meaning = meanings.find(base, kind)
    assert meaning is not None
    assert meaning.unit and meaning.what.endswith(".")


def test_metrics_in_the_source_are_explained():
    """Those of stages without a frozen variant: f"{stage}/{name}" with a literal name."""
    written = set()
    kinds = "|".join(stages.names())
    for path in PACKAGE.rglob("*.py"):
        written |= set(re.findall(rf'"({kinds})/(\w+)"', path.read_text()))
    assert ("tokenizer", "bytes_per_token") in written
    assert ("select", "score_before") in written
    unknown = {
        f"{kind}/{name}"
        for kind, name in written
        if meanings.find(name, kind) is None and not is_file(kind, name)
    }
    assert unknown == set()


def is_file(kind: str, name: str) -> bool:
    """Whether it is a path, not a metric: `tasks/prompts`."""
    return (kind, name) in {("tasks", "prompts")}


def test_no_entry_is_of_a_stage_that_there_is_not():
    for entries in meanings.groups().values():
        for name in entries:
            kind, slash, _ = name.rpartition("/")
            assert not slash or kind in stages.names(), name


def test_held_out_models_and_intervals_share_a_meaning():
    loss = meanings.find("loss", "sft")
    assert loss is not None and loss.unit == "nats per token"
    assert meanings.find("val_loss", "sft") == loss
    reward = meanings.find("val_loss", "reward")
    assert reward is not None and reward.unit == "nats per pair"
    gold = meanings.find("gold")
    assert meanings.find("gold_policy", "evaluate") == gold
    assert meanings.find("gold_policy_bca_low", "evaluate") == gold
    assert meanings.find("score_helpful", "ppo") == meanings.find("score_*")
    assert meanings.find("nonsense", "ppo") is None
    assert meanings.hint("nonsense") == ""
    assert meanings.hint("val_loss", "sft").startswith("Held-out. Mean negative")
    assert all(f"`{method}`" in meanings.HEADER for method in METHODS)


def test_the_page_is_made_of_the_table():
    """UPDATE_GOLDEN=1 writes it."""
    page = ROOT / "docs" / "metrics.md"
    if os.environ.get("UPDATE_GOLDEN"):
        page.write_text(meanings.markdown())
    assert page.read_text() == meanings.markdown()
