"""Fine-tuning with documents, and chosen by a reward (Ouyang et al. 2022, appendix C)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import paths, recipe
from rlhfjax.data.batches import TokenBatch
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.report import tables
from rlhfjax.report.workdir import read_run
from rlhfjax.stages import ppo, sft
from rlhfjax.supervised import language_loss
from tests.test_stages import stage_values

SHAPE = TransformerConfig(
    vocab_size=31, d_model=8, n_layers=1, n_heads=2, d_ff=16, max_length=8
)


def test_losses_and_shares_of_documents_by_a_loop():
    """Two rows: a conversation of 5 and a document of 3 tokens; a document of 8."""
    rng = np.random.default_rng(0)
    model = Model(SHAPE)
    params = model.init(jax.random.key(0))
    documents = np.array([[0] * 5 + [1] * 3, [1] * 8], np.float32)
    batch = TokenBatch(
        tokens=rng.integers(0, 31, (2, 8), np.int32),
        targets=rng.integers(0, 31, (2, 8), np.int32),
        mask=np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8], np.float32),
        segment_ids=np.array([[1] * 5 + [2] * 3, [1] * 8], np.int32),
        positions=np.array([[*range(5), *range(3)], [*range(8)]], np.int32),
        cut=np.zeros(2, np.float32),
        documents=documents,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    args = (batch.tokens, batch.positions, batch.segment_ids)
    hidden = model.hidden_and_routing(params, *args, None)[0]

    def nll(kind):
        total = 0.0
        for row in range(2):
            for t in range(8):
                if batch.mask[row, t] and documents[row, t] == kind:
                    logits = model.logits(params, hidden[row, t][None, None])[0, 0]
                    total -= float(jax.nn.log_softmax(logits)[batch.targets[row, t]])
        return total

    mean, metrics = language_loss(model, by_kind=True)(params, batch, None)
    total = {name: (float(a), float(b)) for name, (a, b) in metrics.items()}
    assert total["document_loss"] == pytest.approx((nll(1), 11), rel=1e-5)
    assert total["conversation_loss"] == pytest.approx((nll(0), 2), rel=1e-4)
    assert total["loss"] == pytest.approx((nll(0) + nll(1), 13), rel=1e-5)
    assert float(mean) == pytest.approx((nll(0) + nll(1)) / 13, rel=1e-5)
    assert total["document_examples"] == (2, 3)
    assert total["document_tokens"] == (11, 13)
    training = language_loss(model)(params, batch, None)[1]
    assert "document_loss" not in training and "document_tokens" in training
    plain = dataclasses.replace(batch, documents=None)
    assert set(language_loss(model, by_kind=True)(params, plain, None)[1]) == {
        "loss",
        "examples_cut",
    }


@pytest.fixture
def documents(tmp_path):
    file = tmp_path / "documents.jsonl"
    texts = ["the cat sat on the mat " * 8, "a dog ran", "birds sang happy songs"]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return {"spec": f"jsonl:{file}", "kind": "text", "split": "all"}


def values_of(conversations, finished, documents, **changes):
    values = stage_values("sft", conversations, finished, steps=4)
    chats = values["sources"][0]
    sources = ({**chats, "weight": 0.8}, {**documents, "weight": 0.2})
    held_out = (*values["eval_sources"], documents)
    return values | {"sources": sources, "eval_sources": held_out} | changes


def test_fine_tuning_with_documents_tells_the_kinds_apart_and_counts_rows(
    conversations, finished, documents, tmp_path
):
    values = values_of(conversations, finished, documents)
    metrics = recipe.run(values, tmp_path / "run")
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0] == {
        "step": 0,
        "sft/data_merged_turns": 0.0,
        "sft/data_skipped_rows": 0.0,
    }
    assert 0 < metrics["sft/document_examples"] < 1
    assert 0 < metrics["sft/document_tokens"] < 1
    share = metrics["sft/val_document_tokens"]
    parts = (metrics["sft/val_document_loss"], metrics["sft/val_conversation_loss"])
    mean = share * parts[0] + (1 - share) * parts[1]
    assert metrics["sft/val_loss"] == pytest.approx(mean, rel=1e-4)


def test_the_stage_has_the_batch_that_the_loader_gives(
    conversations, finished, documents
):
    values = values_of(conversations, finished, documents)
    layout = make_layout(devices=jax.devices()[:1])
    stage = sft.build(recipe.check(values, "sft"), layout)
    planned, batch = stage.batch(1), next(stage.batches)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(
        lambda x: (x.shape, x.dtype), batch
    )


def test_weights_are_checked_before_anything_runs(conversations, finished, documents):
    layout = make_layout(devices=jax.devices()[:1])

    def validate(**changes):
        values = values_of(conversations, finished, documents, **changes)
        sft.validate(recipe.check(values, "sft"), layout, None)

    validate()
    some = ({**documents, "weight": 0.5}, documents)
    with pytest.raises(ConfigError, match=r"sft.sources\[1\].weight=None: other"):
        validate(sources=some)
    with pytest.raises(ConfigError, match=r"sft.eval_sources\[0\].weight=0.5: only"):
        validate(eval_sources=some)
    reward = {"source": "gold:sentiment", "prompt_length": 8}
    with pytest.raises(ConfigError, match=r"eval_reward.max_new_tokens=0: must be > 0"):
        validate(eval_reward=reward)


def test_the_text_beside_prompts_is_mixed_by_weight_too(
    conversations, finished, documents
):
    values = stage_values("ppo", conversations, finished)
    layout = make_layout(devices=jax.devices()[:1])
    sources = ({**documents, "weight": 0.5}, documents)
    values["ptx"] = {**values["ptx"], "sources": sources}
    with pytest.raises(ConfigError, match=r"ppo.ptx.sources\[1\].weight=None: other"):
        ppo.validate(recipe.check(values, "ppo"), layout, None)
    sources = ({**documents, "weight": 3.0}, {**documents, "weight": 1.0})
    values["ptx"] = {**values["ptx"], "sources": sources}
    stage = ppo.build(recipe.check(values, "ppo"), layout)
    state = stage.batches.get_state()["ptx/"]
    assert state["loader"]["source_rows"] == [[3, 3.0], [3, 1.0]]


@pytest.mark.slow
def test_the_checkpoint_with_the_best_scored_responses_is_kept(
    conversations, finished, tmp_path
):
    values = stage_values("sft", conversations, finished, steps=6)
    ppo = stage_values("ppo", conversations, finished)
    values |= {
        "eval_every": 2,
        "keep_best": "max:val_reward",
        "eval_reward": {
            "source": ppo["reward"],
            "prompts": ppo["eval_prompts"],
            "prompt_length": 16,
            "max_new_tokens": 4,
        },
    }
    roles = sft.roles(recipe.check(values, "sft"))
    assert list(roles) == ["model", "eval_reward"] and roles["eval_reward"].scores
    metrics = recipe.run(values, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scores = {
        row["step"]: row["sft/val_reward"]
        for row in map(json.loads, lines)
        if "sft/val_reward" in row
    }
    assert set(scores) == {2, 4, 6} and len(set(scores.values())) == 3
    best = max(scores, key=scores.get)
    assert metrics["sft/best_step"] == best
    assert metrics["sft/best_value"] == scores[best]
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert done["best"] == {
        "metric": "max:val_reward",
        "step": best,
        "value": scores[best],
    }
    stage, *_ = read_run(paths.path(tmp_path / "run")).stages
    assert tables.stage_row(stage)["metrics"].startswith(f"best_step {best}")
    # A run of that number of steps leaves the same model: the schedule ends with the same step.
    layout = make_layout(devices=jax.devices()[:1])
    optim = values["optim"] | {"decay_steps": 6}
    plain = values | {"steps": best, "optim": optim, "keep_best": ""}
    recipe.run(plain, tmp_path / "plain")
    ours, theirs = (
        store.load(tmp_path / name, layout).params for name in ("run", "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
