"""KTO from rows that have one response and a label each (Ethayarajh et al. 2024)."""

import json

import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.errors import ConfigError
from rlhfjax.stages import direct
from tests.test_stage_direct import BAD, GOOD, run_steps, values

PROMPTS = ("you", "I see dogs", "what do they want today")


@pytest.fixture
def labeled(tmp_path):
    """Returns a source of KTO rows that words alone decide, in two files."""
    rows = []
    for i in range(24):
        words = GOOD if i % 2 else BAD
        completion = [{"role": "assistant", "content": words[i % 3]}]
        prompt = [{"role": "user", "content": PROMPTS[(i // 2) % 3]}]
        rows.append({"prompt": prompt, "completion": completion, "label": bool(i % 2)})
    for split, chosen in (("train", rows[:16]), ("validation", rows[16:])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (tmp_path / f"{split}.jsonl").write_text(text)
    return {"spec": f"jsonl:{tmp_path}/{{split}}.jsonl", "kind": "unpaired"}


def config_of(finished, source, name="kto", **changes):
    return values(finished, "unused", name, preferences=(source,), **changes)


def test_kto_learns_which_responses_are_desirable(finished, labeled):
    metrics, _, before, after = run_steps(config_of(finished, labeled), steps=6)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert after["val_loss"] < before["val_loss"]
    assert np.isfinite([value for step in metrics for value in step.values()]).all()


def test_the_first_loss_is_one_half_of_each_response(finished, labeled):
    """The policy is the reference and z is 0, so that v is sigmoid(0) for every response."""
    metrics, *_ = run_steps(config_of(finished, labeled), steps=1, held_out=False)
    np.testing.assert_allclose(metrics[0]["loss"], 0.5, rtol=1e-5)


def test_a_threshold_in_the_config_stays(finished, labeled):
    given = config_of(finished, labeled, loss={"desirable_above": 0.2})
    typed = direct.with_threshold(recipe.check(given, "direct"))
    assert typed.loss.desirable_above == 0.2
    typed = direct.with_threshold(recipe.check(config_of(finished, labeled), "direct"))
    assert typed.loss.desirable_above == 0.5


def test_a_loss_of_pairs_refuses_single_responses(finished, labeled):
    why = r'direct\.loss\.name="dpo": it learns from pairs; expected "kto"'
    with pytest.raises(ConfigError, match=why):
        run_steps(config_of(finished, labeled, "dpo"))
