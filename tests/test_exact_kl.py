"""The KL over the vocabulary as a metric of policy stages."""

import jax
import numpy as np
import pytest

from rlhfjax import recipe, stages, state
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.rl import placement
from tests.test_stages import stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
EXACT = {"coefficient": 0.05, "exact": True}
FEW = {"ptx": {"coefficient": 0.0}, "ema": 0.0, "epochs": 1}


def run(values, name="ppo", steps=2):
    """(metrics of each step, held-out metrics, final parameters)."""
    config = recipe.check(values, name)
    with ONE.use():
        stage = stages.find(name).build(config, ONE)
        key = jax.random.key(config.seed)
        current = stage.start(state.create_sharded(stage.init, key, stage.axes, ONE))
        metrics = []
        for step in range(steps):
            batch = ONE.put(next(stage.batches))
            current, pairs = stage.step(current, batch, jax.random.fold_in(key, step))
            metrics.append(finalize(jax.device_get(pairs)))
        held_out = finalize(stage.evals(current))
    return metrics, held_out, jax.device_get(current.params)


def kl_by_loops(finished, rollout, temperature):
    """Mean over responses of the summed KL(sft || pretrain), over the tokenizer's ids."""
    policy, reference = (
        store.load(finished / f, ONE) for f in ("02_sft", "01_pretrain")
    )
    size = policy.tokenizer.vocab_size
    log_p, log_q = (
        log_softmax(saved, rollout, temperature, size) for saved in (policy, reference)
    )
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    prompt = tokens.shape[1] - mask.shape[1]
    total = 0.0
    for i, t in zip(*np.nonzero(mask), strict=True):
        p, q = log_p[i, prompt + t - 1], log_q[i, prompt + t - 1]
        total += np.sum(np.exp(p) * (p - q))
    return total / len(mask)


def log_softmax(saved, rollout, temperature, size):
    hidden = jax.jit(saved.model.hidden)(
        saved.params, rollout.tokens, None, rollout.attention_mask
    )
    logits = np.asarray(saved.model.logits(saved.params, hidden), np.float64)
    logits = logits[..., :size] / temperature
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


@pytest.mark.slow
def test_the_metric_is_what_loops_give_and_training_does_not_know_of_it(
    conversations, finished, monkeypatch
):
    """Temperature 0.9, another reference, whose KL is not 0."""
    other = {"reference": str(finished / "01_pretrain"), "temperature": 0.9}
    values = stage_values("ppo", conversations, finished, **FEW, **other)
    sampled = []
    sample = placement.sample

    def recorded(*args, **static):
        sampled.append(sample(*args, **static))
        return sampled[-1]

    monkeypatch.setattr(placement, "sample", recorded)
    metrics, held_out, params = run(values | {"kl": values["kl"] | {"exact": True}})
    expected = kl_by_loops(finished, sampled[0], 0.9)
    assert expected > 0.01
    np.testing.assert_allclose(metrics[0]["kl_exact"], expected, rtol=1e-4)
    # The estimate from samples is around it.
    assert abs(metrics[0]["kl"] - expected) < 3 * expected
    assert held_out["val_kl_exact"] > 0.01
    plain, plain_held_out, plain_params = run(values)
    assert "kl_exact" not in plain[0]
    assert "val_kl_exact" not in plain_held_out
    for ours, theirs in zip(metrics, plain, strict=True):
        assert {k: v for k, v in ours.items() if k != "kl_exact"} == theirs
    jax.tree.map(np.testing.assert_array_equal, params, plain_params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group", "reinforce_pp"])
def test_with_adapters_the_reference_is_the_base_and_the_first_kl_is_0(
    name, conversations, finished
):
    lora = {"rank": 2, "targets": "attention/(query|value)"}
    ppo = stage_values("ppo", conversations, finished, **FEW)
    accepted = stages.stage_config(name).to_dict()
    values = {key: value for key, value in ppo.items() if key in accepted}
    optim = {"learning_rate": 1e-2, "schedule": "constant"}
    values |= {"stage": name, "minibatches": 1, "lora": lora, "kl": EXACT}
    values |= {"optim": optim}
    if name == "group":
        values |= {"batch_size": 4, "samples_per_prompt": 4}
    metrics, held_out, _ = run(values, name)
    assert metrics[0]["kl_exact"] == 0
    assert metrics[1]["kl_exact"] > 0
    assert held_out["val_kl_exact"] > 0


def test_a_reference_on_another_mesh_is_refused(conversations, finished):
    meshes = {
        "mesh": {"data": 2, "devices": "0:2"},
        "frozen_mesh": {"data": 2, "devices": "2:4"},
    }
    values = stage_values("ppo", conversations, finished, kl=EXACT, **meshes)
    config = recipe.check(values, "ppo")
    with pytest.raises(ConfigError, match=r"ppo\.kl\.exact: needs the logits of"):
        stages.find("ppo").build(config, make_layout(config.mesh))
