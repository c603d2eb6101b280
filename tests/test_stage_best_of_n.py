"""Best-of-n on the tiny recipe: the curve is that of an enumeration of every subset of the pool."""

import itertools
import json
import math

import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.report import write_report
from rlhfjax.rewards.gold import Sentiment
from rlhfjax.stages import best_of_n, stage_config
from tests import tiny


def values(conversations, finished, **changes):
    prompts = {
        "source": {
            "spec": f"jsonl:{conversations}/test.jsonl",
            "kind": "messages",
            "split": "all",
        },
        "limit": 5,
    }
    defaults = {
        "init_from": str(finished / "02_sft"),
        "proxy": str(finished / "04_reward"),
        "gold": "gold:sentiment",
        "prompts": prompts,
        "pool": 6,
        "batch_size": 8,
    }
    return to_dict(stage_config("best_of_n", **(defaults | tiny.SAMPLING | changes)))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(conversations, finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("best_of_n") / "run"
    recipe.run_stage(values(conversations, finished), workdir)
    return workdir


def test_the_curve_is_the_mean_over_all_subsets_of_the_pool(run):
    rows, lines = read(run / "scores.jsonl"), read(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert [len(row["proxy"]) for row in rows] == [6] * 5
    for line in lines:
        n = line["step"]
        picked = [
            (row["proxy"][best], row["gold"][best])
            for row in rows
            for subset in itertools.combinations(range(6), n)
            for best in [max(subset, key=lambda i, row=row: (row["proxy"][i], i))]
        ]
        assert line["best_of_n/proxy"] == pytest.approx(
            np.mean([p for p, _ in picked]), rel=1e-4
        )
        assert line["best_of_n/gold"] == pytest.approx(
            np.mean([g for _, g in picked]), rel=1e-4, abs=1e-6
        )
        assert line["best_of_n/kl"] == pytest.approx(math.log(n) - (n - 1) / n)
        assert line["best_of_n/kl_pool"] <= line["best_of_n/kl"] + 1e-6
    assert lines[-1]["best_of_n/proxy"] > lines[0]["best_of_n/proxy"]


def test_what_predicts_the_gold_reward_is_on_every_line(
    conversations, finished, tmp_path
):
    """Gold is a model here: the scores of a rule tie on such responses."""
    run, gold = tmp_path / "run", str(finished / "04_reward")
    recipe.run_stage(values(conversations, finished, gold=gold), run)
    rows, lines = read(run / "scores.jsonl"), read(run / "metrics.jsonl")
    right = pairs = 0
    for row in rows:
        gold, length = (np.array(row[name][:8]) for name in ("gold", "length"))
        for i, j in itertools.combinations(range(len(gold)), 2):
            if gold[i] != gold[j]:
                pairs += 1
                better = np.sign((gold[i] - gold[j]) * (length[i] - length[j]))
                right += (better + 1) / 2
    expected = max(right, pairs - right) / pairs
    for line in lines:
        assert line["best_of_n/gold_length_accuracy"] == pytest.approx(expected)
        assert 0 <= line["best_of_n/gold_ten_words_accuracy"] <= 1


def test_the_share_of_distinct_responses():
    """Two of three and three of three."""
    pool = {"answer": np.array([[4, 4, 9], [1, 2, 3]])}
    assert best_of_n.distinct(pool) == pytest.approx((2 / 3 + 1) / 2)


def test_scores_are_those_of_the_answers(run):
    scorer = Sentiment()
    rows, samples = read(run / "scores.jsonl"), read(run / "samples.jsonl")
    assert [row["prompt"] for row in rows] == [sample["prompt"] for sample in samples]
    assert len({row["prompt"] for row in rows}) == 5
    for row, sample in zip(rows, samples, strict=True):
        assert sample["proxy_policy"] == max(row["proxy"])
        assert (sample["proxy_baseline"], sample["gold_baseline"]) == (
            row["proxy"][0],
            row["gold"][0],
        )
        for who in ("policy", "baseline"):
            again = scorer([sample["prompt"]], [sample[who]])[0]
            assert sample[f"gold_{who}"] == pytest.approx(float(again), abs=1e-6)
        assert row["gold"][int(np.argmax(row["proxy"]))] == sample["gold_policy"]


def test_answers_differ_within_a_pool_and_do_not_depend_on_the_run(
    run, conversations, finished, tmp_path
):
    assert np.mean([len(set(row["answer"])) for row in read(run / "scores.jsonl")]) > 4
    recipe.run_stage(values(conversations, finished), tmp_path / "again")
    for file in ("metrics.jsonl", "scores.jsonl", "samples.jsonl"):
        assert (tmp_path / "again" / file).read_bytes() == (run / file).read_bytes()


def test_saved_pools_are_scored_as_they_were(conversations, finished, tmp_path):
    """Another proxy on the same responses: all that is not the proxy's stays."""
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    recipe.run_stage(values(conversations, finished, save_responses=True), first)
    saved = {"gold": "", "responses": str(first)}
    recipe.run_stage(values(conversations, finished, **saved), again)
    for file in ("metrics.jsonl", "scores.jsonl", "samples.jsonl"):
        assert (again / file).read_bytes() == (first / file).read_bytes()
    saved["proxy"] = "gold:sentiment"
    recipe.run_stage(values(conversations, finished, seed=9, **saved), other)
    old, new = read(first / "scores.jsonl"), read(other / "scores.jsonl")
    for before, after in zip(old, new, strict=True):
        for name in ("prompt", "gold", "length", "answer", "cut"):
            assert after[name] == before[name]
        assert after["proxy"] == before["gold"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pool": 5}, r"it has 30 responses; expected 25, best_of_n.pool=5 per prompt"),
        ({"prompt_length": 23}, r"max_new_tokens are \(24, 8\); expected \(23, 8\)"),
        ({"max_new_tokens": 7}, r"max_new_tokens are \(24, 8\); expected \(24, 7\)"),
        ({"prompts": "train.jsonl"}, "its prompts are others than best_of_n.prompts"),
        (
            {"gold": "gold:sentiment"},
            "best_of_n.gold and save_responses must be left out",
        ),
        (
            {"save_responses": True},
            "best_of_n.gold and save_responses must be left out",
        ),
    ],
)
def test_saved_pools_of_something_else_are_refused(
    changes, message, conversations, finished, tmp_path
):
    first, config = tmp_path / "first", values(conversations, finished, gold="")
    if "gold" not in changes and "save_responses" not in changes:
        with_gold = values(conversations, finished, save_responses=True)
        recipe.run_stage(with_gold, first)
    if "prompts" in changes:
        spec = f"jsonl:{conversations}/{changes['prompts']}"
        config["prompts"]["source"]["spec"] = spec
        changes = {}
    config |= {"responses": str(first)} | changes
    with pytest.raises(ConfigError, match=message):
        recipe.run_stage(config, tmp_path / "run")


def test_damaged_or_missing_pools_are_one_line(conversations, finished, tmp_path):
    config = values(conversations, finished, gold="", responses=str(tmp_path))
    with pytest.raises(
        DataError, match=r"responses\.npz: not found; a best_of_n stage"
    ):
        recipe.run_stage(config, tmp_path / "run")
    (tmp_path / "responses.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"responses\.npz: is damaged"):
        recipe.run_stage(config, tmp_path / "run")
    config = values(conversations, finished, gold="", save_responses=True)
    with pytest.raises(
        ConfigError, match=r"save_responses=True: expected best_of_n\.gold"
    ):
        recipe.run_stage(config, tmp_path / "run")


def test_pitfall_36_saved_pools_with_an_infinite_score_are_refused(
    conversations, finished, tmp_path
):
    first = tmp_path / "first"
    recipe.run_stage(values(conversations, finished, save_responses=True), first)
    with np.load(first / "responses.npz") as file:
        arrays = dict(file)
    arrays["gold"][7] = np.inf
    np.savez(first / "responses.npz", **arrays)
    config = values(conversations, finished, gold="", responses=str(first))
    with pytest.raises(DataError, match=r"responses\.npz: is damaged"):
        recipe.run_stage(config, tmp_path / "run")


def test_the_tilt_stands_beside_the_curve_where_the_pool_tells_it(
    conversations, finished, tmp_path
):
    """Recomputed from the scores with the beta found by a plain search."""
    run = tmp_path / "run"
    recipe.run_stage(values(conversations, finished, pool=40, batch_size=40), run)
    proxy = np.array([row["proxy"] for row in read(run / "scores.jsonl")])
    gold = np.array([row["gold"] for row in read(run / "scores.jsonl")])
    lines = read(run / "metrics.jsonl")
    told = [line["step"] for line in lines if "best_of_n/tilt_proxy" in line]
    assert told == [1, 2, 4]  # log 40 - 3 = 0.69; best of 4 has 0.64
    weights = {
        scale: np.exp(scale * (proxy - proxy.max(1, keepdims=True)))
        for scale in np.linspace(0, 40, 20_001)
    }
    weights = {s: w / w.sum(1, keepdims=True) for s, w in weights.items()}
    kls = [np.mean(np.sum(w * np.log(40 * w + 1e-300), 1)) for w in weights.values()]
    for line in lines[:3]:
        near = np.argmin(np.abs(np.array(kls) - line["best_of_n/kl"]))
        w = list(weights.values())[near]
        expected = {"proxy": np.mean(np.sum(w * proxy, 1))}
        expected["gold"] = np.mean(np.sum(w * gold, 1))
        for name, value in expected.items():
            assert line[f"best_of_n/tilt_{name}"] == pytest.approx(value, abs=3e-3)
        assert line["best_of_n/tilt_proxy"] >= line["best_of_n/proxy"] - 1e-6


@pytest.mark.parametrize("n", [1, 2, 3])
def test_pool_kl_is_that_of_drawing_from_the_pool_with_repetitions(n):
    answers, rewards = (
        np.array([7, 7, 3, 5, 5, 5]),
        np.array([1.0, 1.0, 2.0, 0.0, 0.0, 0.0]),
    )
    p = {7: 2 / 6, 3: 1 / 6, 5: 3 / 6}
    reward = {7: 1.0, 3: 2.0, 5: 0.0}
    q = dict.fromkeys(p, 0.0)
    for draws in itertools.product(p, repeat=n):
        q[max(draws, key=reward.get)] += math.prod(p[d] for d in draws)
    kl = sum(q[a] * math.log(q[a] / p[a]) for a in q)
    assert best_of_n.pool_kl(answers, rewards, n=n) == pytest.approx(
        kl, rel=1e-5, abs=1e-6
    )
    assert n == 1 or kl < math.log(n) - (n - 1) / n


@pytest.mark.parametrize(
    "pool, sizes",
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_sizes(pool, sizes):
    assert best_of_n.sizes(pool) == sizes


def test_without_gold_the_curve_is_the_proxys(conversations, finished, tmp_path):
    metrics = recipe.run_stage(
        values(conversations, finished, gold="", pool=2), tmp_path / "run"
    )
    names = ["proxy", "kl", "kl_pool", "prompts_cut", "distinct_responses"]
    names += ["data_skipped_rows", "data_merged_turns"]
    assert metrics.keys() == {f"best_of_n/{name}" for name in names}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pool": 0}, "pool=0: expected int >= 1"),
        ({"temperature": 0.0}, "expected float >= 0.0001"),
        ({"max_new_tokens": 64}, "longer than the model's"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    changes, message, conversations, finished, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        recipe.run_stage(values(conversations, finished, **changes), tmp_path / "run")


def test_pitfall_36_a_pool_with_an_infinite_score_is_refused(
    conversations, finished, tmp_path, monkeypatch
):
    """Response 1 of prompt 2 of 5 with 2 responses each: row 5 of the first batch of 8."""
    scores = np.where(np.arange(8) == 5, np.inf, 0.5)
    monkeypatch.setattr(
        best_of_n, "load_reward", lambda *_: lambda tokens, segments, mask: scores
    )
    said = r"^best_of_n\.proxy=.*/04_reward: the score of prompt 2, response 1 is inf;"
    with pytest.raises(DataError, match=said):
        recipe.run_stage(
            values(conversations, finished, gold="", pool=2), tmp_path / "run"
        )
    assert not (tmp_path / "run" / "scores.jsonl").exists()


def test_the_report_draws_the_curve_beside_ppo(run, tmp_path):
    import shutil

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"stages": ["bon"], "bon": {"stage": "best_of_n"}})
    )
    shutil.copytree(run, tmp_path / "run" / "00_bon")
    page = write_report(tmp_path / "run").read_text()
    assert "Reward and KL" in page
    assert "best-of-n" in page
