"""examples/ppo_minimal.py against the ppo stage: same config and prompts, same numbers."""

import jax
import numpy as np
import pytest

from examples import ppo_minimal
from examples.ppo_minimal import Config
from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.data.loader import prompt_batches
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import open_source
from rlhfjax.interop import store
from rlhfjax.jsonl import read_jsonl
from rlhfjax.mesh import make_layout
from tests import tiny

# The first policy loss of an iteration is a mean of whitened advantages, which cancel.
ROUNDING = 2 * np.finfo(np.float32).eps


def load(folder):
    return store.load(folder, make_layout(devices=jax.devices()[:1]))


def open_conversations(folder):
    return open_source(f"jsonl:{folder}/train.jsonl", kind="messages", split="all")


def tiny_config(eos_id, pad_id, **changes):
    """Returns a config of three iterations for the tiny recipe, with values unlike the defaults."""
    values = {
        "iterations": 3,
        "batch_size": 16,
        "prompt_length": tiny.SAMPLING["prompt_length"],
        "response_length": tiny.SAMPLING["max_new_tokens"],
        "temperature": tiny.SAMPLING["temperature"],
        "kl_coefficient": 0.3,
        "kl_target": 0.02,
        "kl_horizon": 160.0,
        "gamma": 0.97,
        "lam": 0.9,
        "epochs": 1,
        "minibatches": 1,
        "clip": 0.01,
        "value_clip": 0.05,
        "value_coefficient": 0.3,
        "learning_rate": 3e-3,
        "seed": 3,
    }
    return Config(eos_id, pad_id, **values | changes)


def stage_values(config, conversations, finished):
    """Returns the config of the ppo stage that says the same."""
    adam = {
        "name": "adam",
        "learning_rate": config.learning_rate,
        "schedule": "constant",
        "b2": 0.999,
        "clip_norm": 0.0,
    }
    recipe_values = to_dict(tiny.get_config(f"data={conversations}"))
    return recipe_values["ppo"] | {
        "init_from": str(finished / "02_sft"),
        "reward": str(finished / "04_reward"),
        "mesh": {"devices": "0:1"},
        "steps": config.iterations,
        "batch_size": config.batch_size,
        "prompt_length": config.prompt_length,
        "max_new_tokens": config.response_length,
        "temperature": config.temperature,
        "behavior_logprobs": "forward",
        "kl": {
            "coefficient": config.kl_coefficient,
            "target": config.kl_target,
            "horizon": int(config.kl_horizon),
        },
        "gamma": config.gamma,
        "lam": config.lam,
        "epochs": config.epochs,
        "minibatches": config.minibatches,
        "clip": config.clip,
        "value_clip": config.value_clip,
        "value_coefficient": config.value_coefficient,
        "optim": adam,
        "value_optim": adam,
        "seed": config.seed,
        "ptx": {},
        "ema": 0.0,
        "gold": "",
        "eval_every": 0,
        "checkpoint": {},
        "log": {"every": 1, "tensorboard": False},
    }


@pytest.mark.parametrize(
    "epochs, minibatches", [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)]
)
def test_it_computes_what_the_stage_does(
    epochs, minibatches, conversations, finished, tmp_path
):
    """Every metric of the first three iterations, and the policy after them.

    With one epoch of one minibatch these are the first three updates. Only with more does the
    policy leave the one that sampled, so that the two clips act.
    """
    policy, reward = load(finished / "02_sft"), load(finished / "04_reward")
    tokenizer = policy.tokenizer
    config = tiny_config(
        tokenizer.eos_id, tokenizer.pad_id, epochs=epochs, minibatches=minibatches
    )
    prompts = prompt_batches(
        Prompts(open_conversations(conversations)),
        tokenizer,
        batch_size=config.batch_size,
        length=config.prompt_length,
        seed=config.seed,
    )
    iterations = ppo_minimal.train(
        policy.model, config, policy.params, reward.params, prompts
    )
    iterations = list(iterations)
    recipe.run(stage_values(config, conversations, finished), tmp_path / "ppo")
    stage_metrics = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    stage_metrics = [row for row in stage_metrics if "ppo/loss" in row]

    assert len(iterations) == config.iterations
    for (iteration, _, metrics), row in zip(iterations, stage_metrics, strict=True):
        assert row["step"] == iteration + 1
        assert {"loss", "policy_loss", "value_loss", "kl", "score"} <= metrics.keys()
        for name, value in metrics.items():
            expected = row[f"ppo/{name}"]
            np.testing.assert_allclose(
                value, expected, rtol=1e-5, atol=ROUNDING, err_msg=name
            )

    _, trained, last_metrics = iterations[-1]
    stage_policy = load(tmp_path / "ppo").params
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), trained, stage_policy
    )
    clips_act = (
        last_metrics["clip_fraction"] > 0 and last_metrics["value_clip_fraction"] > 0
    )
    assert clips_act == (epochs * minibatches > 1)


def test_it_prints_a_line_per_iteration(conversations, finished, monkeypatch, capsys):
    source = open_conversations(conversations)
    monkeypatch.setattr(ppo_minimal, "open_source", lambda *args, **kwargs: source)
    monkeypatch.setattr(ppo_minimal, "Config", tiny_config)
    ppo_minimal.main([f"--run={finished}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert "kl 0.000 kl_coefficient 0.300 policy_loss" in lines[0]


def test_a_folder_without_a_finished_run_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="not a finished quickstart") as error:
        ppo_minimal.main([f"--run={tmp_path}"])
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
