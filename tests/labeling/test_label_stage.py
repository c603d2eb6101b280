"""The stage: over HTTP by a program in place of people, killed and continued, sampled live."""

import threading
import time

import jax
import numpy as np
import pytest

from rlhfjax import json_text, paths, recipe
from rlhfjax.data.preferences import read_preferences
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.labeling import filler, queue
from rlhfjax.labeling.client import Client, label_by, prompt_text
from rlhfjax.labeling.store import FILE, Store
from rlhfjax.main import main
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.gold import Unlabeled
from rlhfjax.stages import label, stage_config
from tests import tiny

ONE = make_layout(MeshConfig(), jax.devices()[:1])


def shorter(prompts, responses):
    """A rule that prefers short responses."""
    return np.array([-float(len(text)) for text in responses])


def values(**changes):
    return stage_config("label", **({"port": 0, "grace": 0.0} | changes)).to_dict()


def ranked_by_gold(finished):
    """A program labels 12 prompts of the tiny recipe."""
    return values(
        answers=(str(finished / "03_collect" / "preferences"),),
        simulated="gold:sentiment",
        count=12,
        validation=0.3,
    )


def test_a_program_ranks_what_collect_wrote_and_reward_reads_it(finished, tmp_path):
    config = ranked_by_gold(finished)
    metrics = recipe.run(config, tmp_path / "label")
    assert metrics["label/labels"] == 12 and metrics["label/labelers"] == 1
    collected = {
        row["prompt"]: row
        for split in ("train", "validation")
        for row in read_all(finished / "03_collect" / "preferences", split)
    }
    rows = [
        row
        for split in ("train", "validation")
        for row in read_all(tmp_path / "label" / "preferences", split)
    ]
    assert len(rows) == 12
    for row in rows:
        ours = collected[row["prompt"]]
        assert list(row["ranks"]) == list(ours["ranks"])  # gold labeled both
        np.testing.assert_equal(row["completion_tokens"], ours["completion_tokens"])
    assert (
        recipe.run(config, tmp_path / "label") == metrics
    )  # finished: nothing is served


@pytest.mark.slow
def test_labels_become_a_reward_model_and_that_a_policy(finished, tmp_path):
    """The loop with people, of a few labels: collect, label, reward, PPO."""
    labels = ranked_by_gold(finished)
    recipe.run(labels, tmp_path / "label")
    config = json_text.read(finished / "config.json", json_text.Object)
    preferences = (str(tmp_path / "label" / "preferences"),)
    sft = str(finished / "02_sft")
    changes = {
        "init_from": sft,
        "preferences": preferences,
        "steps": 2,
        "eval_every": 2,
    }
    reward = recipe.run(config["reward"] | changes, tmp_path / "reward")
    assert 0 <= reward["reward/accuracy"] <= 1 and reward["reward/grad_norm"] > 0
    changes = {"init_from": sft, "reward": str(tmp_path / "reward"), "steps": 1}
    ppo = recipe.run(config["ppo"] | changes, tmp_path / "ppo")
    assert ppo["ppo/grad_norm"] > 0 and np.isfinite(ppo["ppo/score"])


def read_all(folder, split):
    source = read_preferences(folder, split)
    return [source[i] for i in range(len(source))]


def test_a_stage_that_goes_on_keeps_its_labels_and_links(tmp_path):
    """Two labels before, one after; the address may differ."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            f'{{"prompt": "p{i}", "completions": ["{"a" * (i + 1)}", "b{"b" * i}b"]}}\n'
            for i in range(3)
        )
    )
    given = values(items=str(rows), labelers=("ann",), task="compare")
    config = recipe.check(given, "label")
    folder = paths.path(tmp_path / "label")
    store = Store(folder / FILE)
    ann = store.invite("ann")
    items = filler.Filler(config, store, ONE, None, None)
    items.start()
    assert items.count() == 3
    for _ in range(2):
        shown = queue.next_item(store, "ann", queue.Rules())
        store.append("ann", "submit", shown.event, {"ranks": [1, 2]}, 1.0)
    store.close()
    thread = threading.Thread(target=label.run, args=(config, folder, ONE))
    with pytest.MonkeyPatch.context() as patch:
        links = patched_print(patch)
        thread.start()
        while len(links) < 2:
            time.sleep(0.01)
        assert links[1].startswith("ann: http://127.0.0.1:") and ann.token in links[1]
        assert label_by(shorter, links[1].split(": ")[1]) == 1
        thread.join(timeout=60)
    assert not thread.is_alive()
    rows = (folder / "rankings.jsonl").read_text().splitlines()
    assert len(rows) == 3


def patched_print(patch):
    links = []
    patch.setattr(
        "rlhfjax.labeling.serve.print",
        lambda text, **_: links.append(text),
        raising=False,
    )
    return links


def test_clients_show_errors_and_prompts_as_scorers_get_them(tmp_path):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    assert prompt_text(messages) == "<|user|>Hi<|assistant|>Yo<|assistant|>"
    with pytest.raises(ConnectionError, match="next"):
        Client("http://127.0.0.1:9/token/").next()
    assert Unlabeled()(["p"] * 3, ["a", "b", "c"]).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give one of answers, items, prompts.source and conversations"),
        ({"items": "x.jsonl", "conversations": 3}, "give one of answers"),
        ({"conversations": 3}, "it needs responses"),
        ({"items": "x", "task": "feedback"}, r"label\.tokenizer is needed"),
        ({"items": "x", "order": "disagreement"}, "need each other"),
        (
            {"items": "x", "task": "edit", "simulated": "gold:sentiment"},
            "does not edit",
        ),
        ({"items": "x", "simulated": "runs/x"}, "expected gold:NAME or rule"),
    ],
)
def test_a_config_that_cannot_be_meant(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        recipe.run(values(**changes), tmp_path)


def test_rows_without_anything_to_rank_are_an_error(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "completions": ["a", "a"]}\n')
    with pytest.raises(DataError, match="nothing to label"):
        recipe.run(values(items=str(rows)), tmp_path / "label")


@pytest.mark.slow
def test_a_policy_samples_while_a_program_labels(finished, conversations, tmp_path):
    """Native ids, every prompt once, and enough labels although the batches are small."""
    prompts = {
        "spec": f"jsonl:{conversations}/train.jsonl",
        "kind": "messages",
        "split": "all",
    }
    config = values(
        init_from=str(finished / "02_sft"),
        prompts={"source": prompts},
        simulated="gold:sentiment",
        count=12,
        batch_size=4,
        task="compare",
        validation=0.3,
        **tiny.SAMPLING,
    )
    metrics = recipe.run(config, tmp_path / "label")
    assert metrics["label/labels"] == 12
    rows = read_all(tmp_path / "label" / "preferences", "train")
    assert all(len(row["completion_tokens"]) == 2 for row in rows)
    store = Store(tmp_path / "label" / FILE)
    assert store.next_row() % 4 == 0 and store.next_row() >= 8


@pytest.mark.slow
def test_what_an_ensemble_disagrees_about_comes_first(finished, tmp_path):
    members = (
        {"reward": str(finished / "04_reward")},
        {"reward": str(finished / "04_reward")},
    )
    alike = {"kind": "compose", "members": members, "combine": "mean"}
    config = values(
        answers=(str(finished / "03_collect" / "preferences"),),
        reward=alike,
        order="disagreement",
        tokenizer=str(finished / "00_tokenizer"),
        simulated="gold:sentiment",
        count=3,
        validation=0.3,
    )
    recipe.run(config, tmp_path / "label")
    with Store(tmp_path / "label" / FILE).reading() as connection:
        priorities = (
            connection.exec_driver_sql("SELECT priority FROM items").scalars().all()
        )
    assert len(priorities) > 10 and max(priorities) == 0  # two equal members agree
    config["reward"] = str(finished / "04_reward")
    with pytest.raises(ConfigError, match="expected an ensemble"):
        recipe.run(config, tmp_path / "other")


@pytest.mark.slow
def test_the_command_invites_removes_and_exports(tmp_path, capsys):
    folder = f"--workdir={tmp_path / 'label'}"
    Store(paths.path(tmp_path / "label") / FILE).close()
    main(["rlhfjax", "label", folder, "--invite=ann"])
    assert "ann: http://127.0.0.1" in capsys.readouterr().out
    main(["rlhfjax", "label", folder, "--progress"])
    assert "ann: 0 labels, 0 skipped" in capsys.readouterr().out
    main(["rlhfjax", "label", folder, "--remove=ann"])
    assert "0 events of ann are deleted" in capsys.readouterr().out
    main(["rlhfjax", "label", folder, "--export"])
    assert "no rows" in capsys.readouterr().out
    for arguments in (["--invite=a", "--export"], [], ["--remove=bob"]):
        with pytest.raises(SystemExit) as ended:
            main(["rlhfjax", "label", folder, *arguments])
        assert ended.value.code == 2
