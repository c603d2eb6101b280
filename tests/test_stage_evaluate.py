"""Evaluation: what is measured when responses are sampled, greedy, or cannot be scored."""

import itertools

import numpy as np
import pytest
import scipy.stats

from rlhfjax import recipe
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.metrics import last_values
from rlhfjax.report import tables, write_report
from rlhfjax.report.workdir import read_run
from rlhfjax.stages import evaluate
from tests.test_json_text import strict
from tests.test_stages import stage_values


def evaluated(conversations, finished, workdir, **changes):
    return recipe.run_stage(
        stage_values("evaluate", conversations, finished, **changes), workdir
    )


def test_pitfall_35_greedy_evaluation_has_no_kl_and_says_so(
    conversations, finished, tmp_path
):
    metrics = evaluated(conversations, finished, tmp_path / "run", temperature=0.0)
    assert "evaluate/kl" not in metrics and np.isfinite(list(metrics.values())).all()
    assert strict((tmp_path / "run" / "done.json").read_text())["metrics"] == metrics
    assert (
        strict((tmp_path / "run" / "metrics.jsonl").read_text())
        == {"step": 0} | metrics
    )
    (kl,) = [
        row for row in tables.headlines(read_run(tmp_path / "run")) if row.name == "kl"
    ]
    assert (kl.policy, kl.note) == (
        "",
        "none: responses are greedy (temperature 0), not samples",
    )
    assert kl.note in write_report(tmp_path / "run").read_text()


def test_pitfall_35_shaped_responses_have_no_kl_and_it_is_said(
    conversations, finished, tmp_path
):
    """Responses that a stop text ends count as ended, and their texts end before it."""
    plain = evaluated(conversations, finished, tmp_path / "plain")
    assert "evaluate/kl" in plain
    texts = [row["policy"] for row in samples(tmp_path / "plain")]
    metrics = evaluated(conversations, finished, tmp_path / "run", stop=(" ", "e"))
    cut = [text.partition(" ")[0].partition("e")[0] for text in texts]
    assert [row["policy"] for row in samples(tmp_path / "run")] == cut != texts
    assert "evaluate/kl" not in metrics
    rate, before = (x["evaluate/eos_rate_policy"] for x in (metrics, plain))
    changed = np.array([a != b for a, b in zip(cut, texts, strict=True)])
    assert max(before, changed.mean()) <= rate <= before + changed.mean()
    (kl,) = [
        row for row in tables.headlines(read_run(tmp_path / "run")) if row.name == "kl"
    ]
    assert kl.note == tables.SHAPED
    assert tables._why_no_kl({"temperature": 1.0}) == ""


def test_the_policy_may_get_the_prompts_in_another_form(
    conversations, finished, tmp_path
):
    """Each response is that to its own form; the baseline's do not change."""
    plain = tmp_path / "plain.jsonl"
    other = tmp_path / "other.jsonl"
    questions = [f"Question {i}" for i in range(4)]
    plain.write_text("".join(f'{{"prompt": "{x}"}}\n' for x in questions))
    other.write_text("".join(f'{{"prompt": "Please. {x}"}}\n' for x in questions))

    def prompts(file):
        return {"source": {"spec": f"jsonl:{file}", "kind": "prompt", "split": "all"}}

    def run(name, **changes):
        evaluated(conversations, finished, tmp_path / name, **changes)
        return samples(tmp_path / name)

    both = run("both", prompts=prompts(plain))
    others = run("others", prompts=prompts(other))
    mixed = run("mixed", prompts=prompts(plain), policy_prompts=prompts(other))
    policy = [row["policy"] for row in mixed]
    assert policy == [row["policy"] for row in others]
    assert policy != [row["policy"] for row in both]
    assert [row["baseline"] for row in mixed] == [row["baseline"] for row in both]
    assert "Please. Question 2" in mixed[2]["prompt"]
    fewer = {**prompts(other), "limit": 3}
    with pytest.raises(ConfigError, match=r"3 prompts, evaluate\.prompts has 4"):
        run("fewer", prompts=prompts(plain), policy_prompts=fewer)


def samples(workdir):
    return [
        strict(line) for line in (workdir / "samples.jsonl").read_text().splitlines()
    ]


def summarized(policy, baseline):
    """The metrics of made-up gold scores; the proxy has them with the other sign."""
    n = len(policy)
    told = {
        "response": ["a b"] * n,
        "length": np.ones(n),
        "ended": np.ones(n),
        "kl": np.arange(n),
    }
    told |= {"cut": np.zeros(n)}
    scores = {"policy": policy, "baseline": baseline}
    answers = {who: told | {"gold": x, "proxy": -x} for who, x in scores.items()}
    metrics = evaluate.summarize(answers)
    return {name.removeprefix("evaluate/"): value for name, value in metrics.items()}


def test_pitfall_36_intervals_are_of_the_prompts_pairs_and_named():
    """By other formulas of Wilson's and Student's intervals; a prompt's responses stay together."""
    difficulty, effort = np.random.default_rng(0).normal(size=(2, 16))
    policy = 9 * difficulty + 0.5 + 0.1 * effort
    baseline = 9 * difficulty + (np.arange(16) % 4 == 0)
    policy[:2] = baseline[:2]  # 2 ties, 3 prompts lost, 11 won
    metrics, z = summarized(policy, baseline), 1.959963984540054
    for name, won in {"gold": 11 + 1, "proxy": 3 + 1}.items():
        center, half = won + z**2 / 2, z * np.sqrt(won * (16 - won) / 16 + z**2 / 4)
        expected = [
            won / 16,
            (center - half) / (16 + z**2),
            (center + half) / (16 + z**2),
        ]
        got = [
            metrics[f"{name}_win_rate{end}"]
            for end in ("", "_wilson_low", "_wilson_high")
        ]
        assert got == pytest.approx(expected, abs=1e-12)
    t = scipy.stats.ttest_1samp(policy - baseline, 0.0).confidence_interval()
    got = [metrics[f"gold_difference{end}"] for end in ("", "_t_low", "_t_high")]
    assert got == pytest.approx([np.mean(policy - baseline), t.low, t.high], abs=1e-9)
    assert (
        t.high - t.low < 1
    )  # unpaired, the spread of the prompts' difficulty would be in it
    assert metrics["kl"] == 7.5 and metrics["prompts"] == 16


def test_one_prompt_has_a_rate_and_no_interval_of_a_mean():
    metrics = summarized(np.ones(1), np.zeros(1))
    assert metrics["gold_win_rate"] == 1 and "gold_difference" not in metrics


def test_pitfall_36_a_response_scored_nan_is_named(
    conversations, finished, tmp_path, monkeypatch
):
    """Prompt 9, the second of the second batch of 8, by the policy, which is scored first."""
    batches = itertools.count()

    def scores(tokens, segments, mask):
        return np.where((np.arange(len(mask)) == 1) & (next(batches) == 1), np.nan, 0.5)

    monkeypatch.setattr(evaluate, "load_reward", lambda *_: scores)
    with pytest.raises(DataError) as caught:
        evaluated(conversations, finished, tmp_path / "run", proxy=None)
    context = "evaluate.gold=gold:sentiment, responses of the policy"
    assert (
        str(caught.value)
        == f"{context}: the score of prompt 9 is nan; expected a finite number"
    )
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_without_a_reward_there_is_no_win_rate_and_the_report_says_so(
    conversations, finished, tmp_path
):
    """A user has no gold reward. The losses on held-out text are those that SFT measured."""
    held_out = {
        "spec": f"jsonl:{conversations}/validation.jsonl",
        "kind": "messages",
        "split": "all",
    }
    tax = {"chats": (held_out,), "texts": (held_out,), "length": 32, "batches": 0}
    pretrained = str(finished / "01_pretrain")
    metrics = evaluated(
        conversations,
        finished,
        tmp_path / "run",
        gold=None,
        proxy=None,
        tax=tax | {"pretrained": pretrained},
    )
    assert not [name for name in metrics if "gold" in name or "proxy" in name]
    for stage, loss in (
        ("02_sft", "chat_loss_baseline"),
        ("01_pretrain", "text_loss_pretrained"),
    ):
        values = last_values(finished / stage)
        measured = next(x for name, x in values.items() if name.endswith("/val_loss"))
        assert metrics[f"evaluate/{loss}"] == pytest.approx(measured, rel=1e-5), stage
    cut = last_values(finished / "02_sft")["sft/val_examples_cut"]
    assert metrics["evaluate/chat_examples_cut"] == pytest.approx(cut, rel=1e-6)
    run = read_run(tmp_path / "run")
    assert len(tables.tax_rows(run)) == 4
    page = write_report(tmp_path / "run").read_text()
    assert (
        "Neither a gold nor a proxy reward was given, so there is no win rate" in page
    )
    assert "Alignment tax" in page


def test_without_a_gold_reward_the_proxy_decides():
    n = 8
    told = {
        "response": ["a b"] * n,
        "length": np.arange(n) % 3,
        "ended": np.ones(n),
        "cut": np.zeros(n),
    }
    results = {
        "policy": told | {"proxy": np.arange(n) % 2},
        "baseline": told | {"proxy": np.full(n, 0.5)},
    }
    metrics = evaluate.summarize(results)
    assert metrics["evaluate/proxy_win_rate"] == 0.5
    assert metrics["evaluate/proxy_difference"] == 0
    assert not [name for name in metrics if "gold" in name]
    rows = evaluate.sample_rows(["p"] * n, results["policy"], results["baseline"])
    assert rows[1] == {
        "prompt": "p",
        "policy": "a b",
        "baseline": "a b",
        "proxy_policy": 1.0,
        "proxy_baseline": 0.5,
        "length_policy": 1.0,
        "length_baseline": 1.0,
    }
