"""The TAMER stage: its loss by a loop, its batches, and the reward it leaves."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import recipe, stages, state
from rlhfjax.data import chat
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.rewards.dense import DenseReward
from rlhfjax.rewards.load import load_reward
from rlhfjax.stages import stage_config, tamer
from tests import tiny
from tests.test_stages import run_steps

ONE = make_layout(MeshConfig(), jax.devices()[:1])
ROWS = [
    {
        "prompt": "I like",
        "response": "tea and rain",
        "feedback": [[0.7, 1.0], [1.3, -1.0], [9.0, 5.0]],
    },
    {"prompt": "you hate", "response": "music", "feedback": [[0.5, 0.5]]},
    {
        "prompt": "dogs",
        "response": "sad bad awful rain",
        "feedback": [[0.9, -1.0], [1.1, -1.0]],
    },
] * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("feedback") / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def values(finished, data, **changes):
    options = {
        "steps": 8,
        "batch_size": 4,
        "length": 32,
        "optim": tiny.OPTIM,
        "eval_every": 0,
    } | changes
    return stage_config(
        "tamer",
        init_from=str(finished / "02_sft"),
        feedback=data,
        held_out=data,
        **options,
    ).to_dict()


def uniform_by_hand(first, last):
    """The share of delays of 0.2 to 0.8 s that lie between two."""
    return max(0.0, min(last, 0.8) - max(first, 0.2)) / 0.6


def gamma_by_hand(first, last):
    """The same of Gamma(2, 0.3 s), whose CDF is 1 - (1 + x) exp(-x), x = delay / 0.3."""
    x, y = (max(0.0, delay) / 0.3 for delay in (first, last))
    return (1 + x) * np.exp(-x) - (1 + y) * np.exp(-y)


@functools.partial(jax.jit, static_argnums=0)
def every_scalar(model, params, ids):
    return model.scalar(params, model.hidden(params, ids))


def scalars(model, params, ids):
    """The scalar of every token of one row, float64.

    What is appended stands behind it, and attention is causal.
    """
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(every_scalar(model, params, padded)[0, : len(ids)], np.float64)


def loop_loss(finished, params, model, how, share):
    """(sum, weight) over all feedback: tokens, delays and overlaps one by one, in float64."""
    tokenizer = load_tokenizer(finished / "02_sft" / "model")
    total = weight = 0.0
    for row in ROWS:
        prompt = chat.render_prompt(
            tokenizer, [{"role": "user", "content": row["prompt"]}]
        ).tolist()
        answer = [*tokenizer.encode(row["response"]), tokenizer.eos_id][:16]
        h = scalars(model, params, prompt + answer)[len(prompt) :]
        for time, value in row["feedback"]:
            ends = [0.25 * (i + 1) for i in range(len(answer))]
            credit = [share(time - end, time - end + 0.25) for end in ends]
            if how == "tamer":
                total, weight = total + (value - np.dot(credit, h)) ** 2, weight + 1
            else:
                total, weight = (
                    total + np.dot(credit, (h - value) ** 2),
                    weight + sum(credit),
                )
    return total, weight


KINDS = [("tamer", "uniform"), ("deep_tamer", "uniform"), ("tamer", "gamma")]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_held_out_loss_is_what_a_loop_over_tokens_and_feedback_gives(
    kind, finished, data
):
    how, credit = kind
    options = {"loss": how, "credit": credit, "gamma": (2.0, 0.3)}
    config = recipe.check(values(finished, data, **options), "tamer")
    stage = stages.find("tamer").build(config, ONE)
    first = stage.start(
        state.create_sharded(stage.init, jax.random.key(0), stage.axes, ONE)
    )
    model = store.describe(store.find(finished / "04_reward"))
    share = {"uniform": uniform_by_hand, "gamma": gamma_by_hand}[credit]
    total, weight = loop_loss(finished, first.params, model, how, share)
    np.testing.assert_allclose(
        finalize(stage.evals(first))["val_loss"], total / weight, rtol=1e-4
    )


def test_pitfall_17_answers_with_unequal_feedback_accumulate_exactly(finished, data):
    sgd = {"name": "sgd", "learning_rate": 1e-2, "b1": 0.0, "schedule": "constant"}
    runs = [
        run_steps(
            "tamer", values(finished, data, optim=sgd, microbatches=n), ONE, steps=1
        )
        for n in (1, 4)
    ]
    np.testing.assert_allclose(runs[1][0][0]["loss"], runs[0][0][0]["loss"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(runs[0][1]), jax.tree.leaves(runs[1][1]), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_it_learns_and_leaves_a_reward_that_sums_over_the_response(
    finished, data, tmp_path
):
    metrics = recipe.run(values(finished, data, steps=30, eval_every=30), tmp_path)
    config = recipe.check(values(finished, data), "tamer")
    stage = stages.find("tamer").build(config, ONE)
    first = stage.start(
        state.create_sharded(stage.init, jax.random.key(0), stage.axes, ONE)
    )
    assert metrics["tamer/val_loss"] < 0.9 * finalize(stage.evals(first))["val_loss"]
    saved = store.load(tmp_path, ONE)
    reward = load_reward(str(tmp_path), ONE, saved.tokenizer)
    assert isinstance(reward, DenseReward)
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(4, tiny.VOCAB, (3, 20)), jnp.int32
    )
    mask = np.ones((3, 8), np.float32)
    mask[1, 5:] = 0
    segments = np.ones((3, 20), np.int32)
    segments[1, 17:] = 0
    got = reward(tokens, jnp.asarray(segments), jnp.asarray(mask))
    for i, n in enumerate((20, 17, 20)):
        h = scalars(saved.model, saved.params, tokens[i, :n])[12:]
        np.testing.assert_allclose(got[i], h.sum(), rtol=1e-4, atol=1e-5)


def test_pitfall_39_a_long_answer_gets_what_its_prompt_leaves(tmp_path):
    """Length 24: a short prompt leaves more than half to its answer, a long one keeps its head and
    half."""
    tokenizer = train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path, vocab_size=275
    )
    rows = [("a", "the mat " * 20), ("the cat " * 20, "the mat " * 20), ("a", "b")]
    lines = [
        {"prompt": prompt, "response": answer, "feedback": [[0.5, 1.0]]}
        for prompt, answer in rows
    ]
    (tmp_path / "f.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    made = tamer.read_feedback(str(tmp_path / "f.jsonl"), tokenizer, 24)
    prompts = [
        chat.render_prompt(tokenizer, [{"role": "user", "content": prompt}])
        for prompt, _ in rows
    ]
    answers = [[*tokenizer.encode(answer), tokenizer.eos_id] for _, answer in rows]
    assert [int(row.response_start) for row in made] == [
        len(prompts[0]),
        12,
        len(prompts[2]),
    ]
    assert made[0].tokens.tolist() == [*prompts[0], *answers[0]][:24]
    assert made[1].tokens.tolist() == [
        *prompts[1][:2],
        *prompts[1][-10:],
        *answers[1][:12],
    ]
    assert [int(row.response_length) for row in made] == [
        24 - len(prompts[0]),
        12,
        len(answers[2]),
    ]
    assert [float(row.cut) for row in made] == [1, 1, 0]


def test_batches_go_on_where_they_were(finished, data):
    build = stages.find("tamer").build
    one, two = (
        build(recipe.check(values(finished, data), "tamer"), ONE).batches
        for _ in range(2)
    )
    for _ in range(5):
        next(one)
    two.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(4):
        jax.tree.map(np.testing.assert_array_equal, next(one), next(two))
    seen = [tuple(row) for _ in range(9) for row in next(one).tokens.tolist()]
    assert {seen.count(row) for row in set(seen)} == {
        12
    }  # 36 rows are four epochs; each text stands there 3 times


def test_a_gamma_without_a_scale_is_refused(finished, data):
    with pytest.raises(
        ConfigError, match=r"tamer\.gamma\[1\]=0\.0: expected float >= 1\.2e-38"
    ):
        recipe.check(values(finished, data, gamma=(2.0, 0.0)), "tamer")


def test_delays_out_of_order_are_refused(finished, data):
    config = recipe.check(values(finished, data, delay=(0.8, 0.2)), "tamer")
    with pytest.raises(
        ConfigError,
        match=r"tamer\.delay=\(0\.8, 0\.2\): expected \(low, high\) with low < high",
    ):
        stages.find("tamer").build(config, ONE)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "response": "b"}',
        '{"prompt": "a", "response": "b", "feedback": []}',
        '{"prompt": "a", "response": "b", "feedback": [[true, 1]]}',
        '{"prompt": "a", "response": "b", "feedback": [["1", "2"]]}',
        '{"prompt": "a", "response": "b", "feedback": [1, 2]}',
        '{"prompt": "a", "response": "b", "feedback": [[1, 1e39]]}',
        '{"prompt": "a", "response": 1, "feedback": [[1, 1]]}',
    ],
)
def test_malformed_feedback_is_named_by_line(line, finished, data, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    config = recipe.check(values(finished, str(tmp_path / "bad.jsonl")), "tamer")
    stage = stages.find("tamer").build(config, ONE)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        stage.open()
