"""Policies with more rows of embeddings than their tokenizer has ids, as in published models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import recipe, stages
from rlhfjax.config import to_dict
from rlhfjax.data.preferences import read_preferences
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rl import iteration
from rlhfjax.rl.rollout import sample
from rlhfjax.sampling.config import Sampling
from tests import tiny
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
ROWS = tiny.VOCAB + 8


@pytest.fixture(scope="module")
def padded(finished, tmp_path_factory):
    """The SFT model with 8 more rows, whose logits are often the largest."""
    saved = store.load(finished / "02_sft", ONE)
    config = dataclasses.replace(saved.model.config, vocab_size=ROWS)
    model = dataclasses.replace(saved.model, config=config)
    extra = 3 * jax.random.normal(jax.random.key(0), (8, config.d_model))
    backbone = saved.params["backbone"]
    rows = jnp.concatenate([backbone["embed"]["tokens"], extra])
    embed = backbone["embed"] | {"tokens": rows}
    params = saved.params | {"backbone": backbone | {"embed": embed}}
    folder = tmp_path_factory.mktemp("padded")
    store.save(folder / "model", store.SavedModel(model, params, saved.tokenizer))
    return folder


def test_without_the_restriction_the_rows_would_be_sampled(padded):
    """What the other tests rely on; the model that is loaded has the restriction."""
    saved = store.load(padded, ONE)
    assert saved.model.sampled_ids == tiny.VOCAB < saved.model.config.vocab_size
    settings = Sampling(max_new_tokens=8, eos_id=-1, pad_id=0)
    prompts = jnp.full((16, 4), 9, jnp.int32)
    most = {}
    for ids in (None, tiny.VOCAB):
        model = dataclasses.replace(saved.model, sampled_ids=ids)
        rollout = sample(
            model,
            saved.params,
            prompts,
            jnp.ones_like(prompts),
            jax.random.key(0),
            sampling=settings,
        )
        most[ids] = int(rollout.responses.max())
    assert most[None] >= tiny.VOCAB > most[tiny.VOCAB]


@pytest.mark.parametrize(
    "name",
    [
        "ppo",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("group", "reinforce_pp")),
    ],
)
def test_policy_reference_and_trainer_are_over_the_same_ids(
    name, conversations, finished, padded, monkeypatch
):
    """No other id is sampled, the first ratio is 1 and the first KL 0."""
    values = stage_values("ppo", conversations, finished) | {"init_from": str(padded)}
    if name != "ppo":
        names = ("prompts", "eval_prompts", "init_from", "reward")
        kept = {option: values[option] for option in names}
        options = kept | tiny.SAMPLING | {"steps": 1, "batch_size": 8}
        values = to_dict(stages.stage_config(name, **options))
    module, sampled = stages.find(name), []

    def sample_rollouts(*args):
        rollouts = iteration.sample_rollouts(*args)
        sampled.append(np.asarray(rollouts.current.responses))
        return rollouts

    monkeypatch.setattr(module, "sample_rollouts", sample_rollouts)
    metrics, _ = run_steps(name, values, ONE, steps=1)
    assert np.concatenate(sampled).max() < tiny.VOCAB
    assert metrics[0]["first_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_other_stages_sample_the_same_ids(conversations, finished, padded, tmp_path):
    values = stage_values("collect", conversations, finished)
    recipe.run_stage(values | {"init_from": str(padded)}, tmp_path)
    rows = read_preferences(tmp_path / "preferences", "train")
    ids = [ids for i in range(len(rows)) for ids in rows[i]["completion_tokens"]]
    assert np.concatenate(ids).max() < tiny.VOCAB
