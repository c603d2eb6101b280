"""The process reward stage: its held-out numbers by loops, its learning, the reward it leaves."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import recipe, stages
from rlhfjax.data import chat
from rlhfjax.data.steps import step_ends
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.plan import programs, shapes
from rlhfjax.rewards.load import load_reward
from rlhfjax.rewards.process import ProcessReward
from rlhfjax.stages import stage_config
from tests import tiny
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
# A step is right unless it says "hate".
SOLUTIONS = [
    ("I like", ["tea", "I love rain", "music"]),
    ("dogs", ["we hate dogs", "sad"]),
    ("you see", ["good", "great", "hate", "tea"]),
    ("what", ["books"]),
    ("what", ["tea", "hate rain"]),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps") / "s.jsonl"
    lines = []
    for prompt, steps in SOLUTIONS:
        labels = [float("hate" not in step) for step in steps]
        messages = [{"role": "user", "content": prompt}]
        lines.append({"messages": messages, "steps": steps, "labels": labels})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def values(finished, data, **changes):
    source = {"spec": f"jsonl:{data}", "kind": "steps", "split": "all"}
    options = {
        "init_from": str(finished / "02_sft"),
        "sources": (source,),
        "eval_sources": (source,),
        "length": 32,
        "batch_size": 4,
        "steps": 30,
        "eval_every": 30,
        "optim": {"learning_rate": 1e-2, "schedule": "constant"},
        "log": {"every": 10, "tensorboard": False},
    }
    return stage_config("process_reward", **(options | changes)).to_dict()


def probabilities(model, params, tokenizer):
    """The probability of each step of each solution, one row at a time, unpadded, in float64."""
    found = []
    for prompt, steps in SOLUTIONS:
        messages = [{"role": "user", "content": prompt}]
        start = chat.render_prompt(tokenizer, messages).tolist()
        response = chat.response_tokens(tokenizer, "\n\n".join(steps))
        ids = jnp.array([[*start, *response]])
        logits = np.asarray(model.scalar(params, model.hidden(params, ids))[0])
        ends = step_ends(tokenizer, response, "\n\n")
        own = [1 / (1 + math.exp(-float(logits[len(start) + end]))) for end in ends]
        found.append(own)
    return found


@pytest.fixture(scope="module")
def trained(finished, data, tmp_path_factory):
    """(metrics, folder) of a run."""
    folder = tmp_path_factory.mktemp("process")
    return recipe.run(values(finished, data), folder), folder


def test_held_out_numbers_are_those_of_loops_over_steps(trained):
    metrics, folder = trained
    saved = store.load(folder, ONE)
    found = probabilities(saved.model, saved.params, saved.tokenizer)
    labels = [["hate" not in step for step in steps] for _, steps in SOLUTIONS]
    pairs = [
        (p, y)
        for own, ys in zip(found, labels, strict=True)
        for p, y in zip(own, ys, strict=True)
    ]
    expected = {
        "val_loss": np.mean([-math.log(p if y else 1 - p) for p, y in pairs]),
        "val_accuracy": np.mean([(p > 0.5) == y for p, y in pairs]),
        "val_majority": 9 / 12,
        "val_solution_accuracy": np.mean(
            [
                (math.prod(own) > 0.5) == all(ys)
                for own, ys in zip(found, labels, strict=True)
            ]
        ),
        "val_solution_majority": 3 / 5,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(
            metrics[f"process_reward/{name}"], value, rtol=1e-3, err_msg=name
        )


def test_it_learns_which_steps_are_right(trained):
    metrics, _ = trained
    assert metrics["process_reward/val_loss"] < 0.2
    assert metrics["process_reward/val_accuracy"] == 1
    assert metrics["process_reward/val_solution_accuracy"] == 1


@pytest.mark.parametrize(("combine", "of"), [("product", math.prod), ("minimum", min)])
def test_it_leaves_a_reward_that_scores_responses_by_their_steps(
    combine, of, trained, tmp_path
):
    _, folder = trained
    saved = store.load(folder, ONE)
    source = {"kind": "process", "model": str(folder), "combine": combine}
    named = load_reward(str(folder), ONE, saved.tokenizer)
    reward = load_reward(source, ONE, saved.tokenizer)
    assert isinstance(named, ProcessReward)
    rows = rollout_rows(saved.tokenizer)
    scores = np.asarray(reward(*rows))
    expected = probabilities(saved.model, saved.params, saved.tokenizer)
    np.testing.assert_allclose(scores, [of(own) for own in expected], rtol=1e-4)
    if combine == "product":
        np.testing.assert_array_equal(named(*rows), scores)


def rollout_rows(tokenizer, p=10, r=22):
    """The solutions as sampled responses: tokens, attention_mask [n, p + r], mask [n, r]."""
    n = len(SOLUTIONS)
    tokens = np.full((n, p + r), tokenizer.pad_id, np.int32)
    attention = np.zeros((n, p + r), np.int32)
    for i, (prompt, steps) in enumerate(SOLUTIONS):
        messages = [{"role": "user", "content": prompt}]
        start = chat.render_prompt(tokenizer, messages)
        response = chat.response_tokens(tokenizer, "\n\n".join(steps))
        tokens[i, p - len(start) : p] = start
        tokens[i, p : p + len(response)] = response
        attention[i, p - len(start) : p + len(response)] = 1
    mask = attention[:, p:].astype(np.float32)
    return jnp.array(tokens), jnp.array(attention), jnp.array(mask)


def test_pitfall_17_solutions_of_unequal_length_accumulate_exactly(finished, data):
    sgd = {"name": "sgd", "learning_rate": 1e-2, "b1": 0.0, "schedule": "constant"}
    runs = [
        run_steps(
            "process_reward",
            values(finished, data, optim=sgd, microbatches=n),
            ONE,
            steps=1,
        )
        for n in (1, 4)
    ]
    np.testing.assert_allclose(runs[1][0][0]["loss"], runs[0][0][0]["loss"], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(run[1]) for run in runs), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_ppo_trains_on_it_and_its_value_starts_from_it(
    conversations, finished, trained
):
    _, folder = trained
    few = {"ptx": {"coefficient": 0.0}, "ema": 0.0, "epochs": 1}
    config = stage_values(
        "ppo", conversations, finished, reward=str(folder), value="reward", **few
    )
    metrics, _ = run_steps("ppo", config, ONE, steps=1)
    assert 0 <= metrics[0]["score"] <= 1


@pytest.mark.slow
def test_a_plan_knows_its_step_and_those_that_score_with_it(finished, data):
    config = tiny.get_config("data=nowhere").to_dict()
    own = values(finished, data, init_from="stage:sft")
    ppo = {**config["ppo"], "reward": "stage:process_reward", "stage": "ppo"}
    order = list(config["stages"])
    order.insert(order.index("ppo"), "process_reward")
    config |= {"process_reward": own, "ppo": ppo, "stages": tuple(order)}
    for name, expected in (
        ("process_reward", ["step"]),
        ("ppo", ["rollout", "know", "score", "prepare", "update"]),
    ):
        subject = shapes.subject(config, name)
        layout = make_layout(subject.config.mesh)
        planned = programs.step_programs(subject, layout).programs
        assert [program.name for program in planned] == expected


def test_what_cannot_be_meant_is_refused(finished, data):
    config = recipe.check(values(finished, data, separator=""), "process_reward")
    with pytest.raises(ConfigError, match=r"process_reward\.separator=''"):
        stages.find("process_reward").build(config, ONE)
    with pytest.raises(ConfigError, match="neutral"):
        recipe.check(values(finished, data, neutral="zero"), "process_reward")
