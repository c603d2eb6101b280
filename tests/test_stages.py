"""The stages on the tiny recipe: one device against four, and what PPO must be at its first
minibatch.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import optimum
from rlhfjax import recipe, stages, state
from rlhfjax.algos.preference import kwise_loss
from rlhfjax.config import to_dict
from rlhfjax.data import loader
from rlhfjax.data.batches import PreferenceBatch, TokenBatch
from rlhfjax.data.sources import Rows
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout, MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.rl import task
from rlhfjax.stages import ppo, pretrain, sft
from rlhfjax.stages.reward import reward_loss
from rlhfjax.supervised import held_out_loss, language_loss
from tests import tiny

ONE = make_layout(MeshConfig(), jax.devices()[:1])
TRAINED = ("pretrain", "sft", "reward", "ppo")


def stage_values(name, conversations, finished, **changes):
    """A stage's config with its references resolved to the finished run."""
    config = to_dict(tiny.get_config(f"data={conversations}"))
    folders = recipe.stage_folders(config, finished)
    return recipe.resolve(config[name], folders, name) | changes


def run_steps(name, values, layout, steps=2):
    """The first steps of a stage, without the loop: (metrics of each step, final parameters)."""
    config = recipe.check(values, name)
    with layout.use():
        stage = stages.find(name).build(config, layout)
        key = jax.random.key(config.seed)
        current = stage.start(state.create_sharded(stage.init, key, stage.axes, layout))
        metrics = []
        for step in range(steps):
            batch = layout.put(next(stage.batches))
            current, pairs = stage.step(current, batch, jax.random.fold_in(key, step))
            metrics.append(finalize(jax.device_get(pairs)))
    return metrics, jax.device_get(current.params)


@functools.cache
def on_one_device(name, conversations, finished):
    return run_steps(name, with_two_layers(name, conversations, finished), ONE)


def with_two_layers(name, conversations, finished):
    """Of a stage that makes a new model; what others load has one."""
    values = stage_values(name, conversations, finished)
    return values | (
        {"model": values["model"] | {"n_layers": 2}} if name == "pretrain" else {}
    )


DATA, FSDP_TENSOR = {"data": 4}, {"data": 1, "fsdp": 2, "tensor": 2}
ON_FOUR = [
    pytest.param("pretrain", FSDP_TENSOR),
    pytest.param("reward", FSDP_TENSOR),
    pytest.param("ppo", FSDP_TENSOR, marks=pytest.mark.slow),
    pytest.param("sft", FSDP_TENSOR, marks=pytest.mark.nightly),  # pretrain's loss
    *(
        pytest.param(name, DATA, marks=pytest.mark.nightly) for name in TRAINED
    ),  # asks for less than the other mesh
]


def named(x):
    return (
        "-".join(axis for axis, n in x.items() if n > 1) if isinstance(x, dict) else x
    )


@pytest.mark.parametrize("name, axes", ON_FOUR, ids=named)
def test_four_devices_give_what_one_gives(name, axes, conversations, finished):
    values = with_two_layers(name, conversations, finished)
    one, params_one = on_one_device(name, conversations, finished)
    four, params_four = run_steps(name, values, make_layout(MeshConfig(**axes)))
    for a, b in zip(one, four, strict=True):
        assert a.keys() == b.keys()
        for metric in a:
            np.testing.assert_allclose(
                b[metric], a[metric], rtol=2e-3, atol=2e-4, err_msg=metric
            )
    for a, b in zip(
        jax.tree.leaves(params_one), jax.tree.leaves(params_four), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


def test_pitfall_42_the_held_out_loss_is_reported_per_byte_of_its_targets(tmp_path):
    """A model of zeros gives each of v tokens the chance 1 / v: log v nats per target, whatever the
    text is."""
    tokenizer = train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path, vocab_size=275
    )
    shape = TransformerConfig(
        vocab_size=400, d_model=8, n_layers=1, n_heads=1, d_ff=8, max_length=64
    )
    model = Model(shape)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    options = {"batch_size": 2, "length": 64, "train": False}

    def nats_per_byte(stage, batches):
        measure = held_out_loss(model, language_loss(model), tokenizer.byte_lengths())
        return finalize(jax.device_get(measure(params, next(batches))))[
            "val_nats_per_byte"
        ]

    words = (
        "a",
        "é今!",
        "no",
    )  # 1 + 2 + 3 + 1 + 2 bytes; documents that are packed into one row
    targets = sum(
        len(tokenizer.encode(text)) + 1 for text in words
    )  # and the eos of each
    documents = Rows([{"text": text} for text in words], "text")
    expected = targets * math.log(400) / 9
    packed = loader.pretrain_batches(documents, tokenizer, **options)
    assert nats_per_byte(pretrain, packed) == pytest.approx(expected)
    talk = [
        {"role": "user", "content": "今今今"},
        {"role": "assistant", "content": "é今!"},
    ]
    targets = len(tokenizer.encode("é今!")) + 1  # the answer's bytes alone: 6
    answers = loader.sft_batches(
        Rows([{"messages": talk}], "messages"), tokenizer, **options
    )
    assert nats_per_byte(sft, answers) == pytest.approx(targets * math.log(400) / 6)


def test_pitfall_39_fine_tuning_counts_the_examples_that_lost_tokens(tmp_path):
    tokenizer = train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path, vocab_size=275
    )
    model = Model(
        TransformerConfig(
            vocab_size=300, d_model=8, n_layers=1, n_heads=1, d_ff=8, max_length=32
        )
    )
    talks = [
        [{"role": "user", "content": "the mat"}, {"role": "assistant", "content": text}]
        for text in ("the cat", "the mat", "the cat " * 40)
    ]
    rows = Rows([{"messages": talk} for talk in talks], "messages")
    batch = next(
        loader.sft_batches(rows, tokenizer, batch_size=4, length=32, train=False)
    )
    params = model.init(jax.random.key(0))
    loss = jax.jit(language_loss(model))
    _, pairs = loss(params, jax.tree.map(jnp.asarray, batch), None)
    assert [float(x) for x in pairs["examples_cut"]] == [1.0, 3.0]


def test_parameters_and_moments_are_sharded_not_replicated(conversations, finished):
    layout = make_layout(MeshConfig(data=1, fsdp=4))
    config = recipe.check(stage_values("pretrain", conversations, finished), "pretrain")
    with layout.use():
        stage = stages.find("pretrain").build(config, layout)
        current = state.create_sharded(
            stage.init, jax.random.key(0), stage.axes, layout
        )
    matrices = [
        x for x in jax.tree.leaves((current.params, current.opt_state)) if x.ndim >= 2
    ]
    assert matrices
    for x in matrices:
        assert x.addressable_shards[0].data.size == x.size // 4


@pytest.fixture(scope="module")
def first_step(conversations, finished):
    """(metrics, rollouts, what was scored) of PPO's first step, in one minibatch."""
    sampled, scored = [], []
    plain_sampler, plain_score = ppo.make_sampler, task.score

    def make_sampler(*args):
        sample = plain_sampler(*args)
        return lambda *rows: sampled.append(sample(*rows)) or sampled[-1]

    def score(reward, *rows):
        scored.append(rows)
        return plain_score(reward, *rows)

    values = stage_values("ppo", conversations, finished, epochs=1, minibatches=1)
    assert values["temperature"] != 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_sampler", make_sampler)
        patch.setattr(task, "score", score)
        (metrics,), _ = run_steps("ppo", values, ONE, steps=1)
    return metrics, sampled, scored


def test_pitfall_03_first_ratio_is_one_and_kl_zero_at_temperature_not_one(first_step):
    """Policy == reference at step 0: the trainer's and the reference's logprobs are the sampler's,
    temperature 0.9.
    """
    metrics, _, _ = first_step
    assert abs(metrics["first_ratio_max"] - 1) < 2e-5
    assert metrics["approx_kl"] < 1e-9
    assert abs(metrics["kl"]) < 1e-4
    assert metrics["clip_fraction"] == 0


def test_pitfall_06_the_reward_scores_the_ids_that_were_sampled(first_step, finished):
    """Some of them are not how the tokenizer would spell their text."""
    _, (drawn,), ((tokens, segments, mask),) = first_step
    np.testing.assert_array_equal(tokens, drawn.tokens)
    np.testing.assert_array_equal(segments, drawn.attention_mask)
    np.testing.assert_array_equal(mask, drawn.mask)
    tokenizer = load_tokenizer(finished / "02_sft" / "model")
    ids = [
        row[keep > 0].tolist()
        for row, keep in zip(np.asarray(drawn.responses), np.asarray(mask), strict=True)
    ]
    assert any(
        tokenizer.encode(tokenizer.decode(row))
        != [i for i in row if i != tokenizer.eos_id]
        for row in ids
    )


@pytest.fixture(scope="module")
def three_steps(conversations, finished):
    """Metrics of PPO with four epochs of two minibatches."""
    origin = {"init_from": str(finished / "01_pretrain")}
    return run_steps(
        "ppo",
        stage_values("ppo", conversations, finished, epochs=4, **origin),
        ONE,
        steps=3,
    )[0]


def test_pitfall_27_first_minibatch_of_every_iteration_has_ratio_one(three_steps):
    """Also after the policy moved: the behavior policy is that at the start of the iteration."""
    assert three_steps[2]["kl"] > 1e-3  # it has moved
    for metrics in three_steps:
        assert abs(metrics["first_ratio_max"] - 1) < 2e-5


@pytest.mark.parametrize("what", ["pretrain", "sft", "reward"])
def test_a_model_with_dropout_is_trained_with_it(what):
    """Two keys, two losses."""
    ids = jnp.array([[[1, 3, 4, 5], [1, 4, 4, 2]]])
    if what == "reward":
        head, make = "scalar", lambda model: reward_loss(model, kwise_loss)
        batch = PreferenceBatch(
            tokens=ids,
            attention_mask=jnp.ones_like(ids),
            scores=jnp.array([[1.0, 0.0]]),
            valid=jnp.ones((1, 2)),
            same=jnp.array([[0, 1]]),
            cut=jnp.zeros((1, 2)),
            lengths=jnp.array([[2, 2]]),
            index=jnp.zeros(1, jnp.int32),
        )
    else:
        head, make = "lm", language_loss
        batch = TokenBatch(
            tokens=ids[0],
            targets=ids[0],
            mask=jnp.ones((2, 4)),
            segment_ids=jnp.ones_like(ids[0]),
            positions=jnp.tile(jnp.arange(4), (2, 1)),
            cut=jnp.zeros(2) if what == "sft" else None,
        )
    model = Model(dataclasses.replace(optimum.SHAPE, dropout=0.5), head)
    params, loss = model.init(jax.random.key(0)), jax.jit(make(model))
    one, other = (float(loss(params, batch, jax.random.key(i))[0]) for i in (1, 2))
    assert abs(one - other) > 1e-3


def test_pitfall_19_epochs_move_the_policy_between_minibatches(three_steps):
    """With several epochs the ratio leaves 1 within an iteration, so that the clip can act."""
    assert three_steps[0]["ratio_max"] > 1.005
    assert three_steps[0]["approx_kl"] > 1e-6


@pytest.mark.parametrize(
    "name", ("pretrain", pytest.param("ppo", marks=pytest.mark.slow))
)
def test_pitfall_17_accumulation_does_not_change_the_update(
    name, conversations, finished
):
    """Rows have unequal numbers of targets; one and four microbatches give the same parameters."""
    # sgd: Adam would turn rounding of zero gradients into visible steps
    sgd = {"name": "sgd", "learning_rate": 1e-2, "b1": 0.0, "schedule": "constant"}
    changes = {"optim": sgd, "checkpoint": {}, "log": {}}
    if name == "ppo":
        changes |= {"value_optim": sgd, "minibatches": 2, "epochs": 1}
    results = []
    for microbatches in (1, 4):
        values = stage_values(
            name, conversations, finished, microbatches=microbatches, **changes
        )
        results.append(run_steps(name, values, ONE, steps=1))
    # PPO's loss is small because advantages of size 1 cancel in it: two units of rounding of 1
    # remain
    rounding = 2 * np.finfo(np.float32).eps if name == "ppo" else 0
    (one, params), (four, same) = results
    np.testing.assert_allclose(
        four[0]["loss"], one[0]["loss"], rtol=1e-5, atol=rounding
    )
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def streamed(name, values, count):
    """A stage's values with `count` streams of data; of PPO's those of its text."""
    return values | (
        {"ptx": values["ptx"] | {"data_shards": count}}
        if name == "ppo"
        else {"data_shards": count}
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_host_makes_the_rows_of_its_own_devices_alone(
    name, conversations, finished, monkeypatch
):
    """Streams 1 and 3 of 4 are as one process makes them, without the rows of the others."""
    values = streamed(name, stage_values(name, conversations, finished), 4)

    def batch(own):
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "own_parts", lambda layout, size, parts: own)
            return next(
                stages.find(name)
                .build(recipe.check(values, name), make_layout())
                .batches
            )

    whole, some = batch((0, 1, 2, 3)), batch((1, 3))
    if name == "ppo":  # every host makes all prompts
        jax.tree.map(np.testing.assert_array_equal, some.prompts, whole.prompts)
        whole, some = whole.text, some.text
    for ours, theirs in zip(jax.tree.leaves(some), jax.tree.leaves(whole), strict=True):
        ours, theirs = ours.reshape(4, -1), theirs.reshape(4, -1)
        np.testing.assert_array_equal(ours[[1, 3]], theirs[[1, 3]])
        assert (ours[[0, 2]] == 0).all()


@pytest.mark.parametrize("name", (*TRAINED, "direct"))
def test_streams_that_cannot_share_a_batch_are_refused_before_anything_runs(
    name, conversations, finished
):
    if name == "direct":
        values = to_dict(
            stages.stage_config(
                "direct", init_from="x", length=32, batch_size=8, steps=1
            )
        )
    else:
        values = stage_values(name, conversations, finished)
    validate = stages.find(name).validate
    validate(recipe.check(streamed(name, values, 2), name), make_layout(), None)
    where = "ppo.ptx" if name == "ppo" else name
    with pytest.raises(
        ConfigError,
        match=rf"{where}\.data_shards=3: must divide the (8|16) rows",
    ):
        validate(recipe.check(streamed(name, values, 3), name), make_layout(), None)


def test_every_stage_learns_and_the_recipe_collects_its_metrics(finished):
    lines = [
        json.loads(line)
        for line in (finished / "metrics.jsonl").read_text().splitlines()
    ]
    by_stage = {
        name: [line for line in lines if line["stage"] == name] for name in tiny.STAGES
    }
    assert all(by_stage.values())
    losses = [
        line["pretrain/val_loss"]
        for line in by_stage["pretrain"]
        if "pretrain/val_loss" in line
    ]
    assert losses[-1] < losses[0]
    assert 0 <= by_stage["evaluate"][0]["evaluate/gold_win_rate"] <= 1
    assert by_stage["ppo"][-1]["ppo/val_kl"] != 0


def test_pitfall_30_kl_coefficient_average_and_iterator_are_in_the_checkpoint(
    finished, conversations
):
    """What a resume needs besides parameters.

    The values after six steps are restored, not those of the start.
    """
    from rlhfjax.checkpoint import Checkpoints

    config = recipe.check(stage_values("ppo", conversations, finished), "ppo")
    layout = make_layout(MeshConfig())
    with layout.use():
        stage = stages.find("ppo").build(config, layout)
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        restored, position = Checkpoints(
            finished / "05_ppo", config.checkpoint
        ).restore(state.abstract(shapes, stage.axes, layout))
    logged = [
        json.loads(line)
        for line in (finished / "05_ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert int(restored.step) == config.steps
    assert float(restored.extra["kl_coefficient"]) != pytest.approx(
        logged[0].get("ppo/kl_coefficient", 0.1), abs=1e-6
    )
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()),
        restored.extra["ema"]["policy"],
        restored.params["policy"],
    )
    assert max(jax.tree.leaves(moved)) > 0
    stage.batches.set_state(position)
    assert stage.batches.get_state() == position
