"""Stages whose models are mixtures of experts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import dry_run, footprint, pace, paths, recipe
from rlhfjax.config import to_dict
from rlhfjax.data.batches import TokenBatch
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model
from rlhfjax.models.experts import balance
from rlhfjax.models.presets import preset
from rlhfjax.models.size import layer_activations, token_flops
from rlhfjax.plan import tables
from rlhfjax.roles import Role
from rlhfjax.stages import sft
from rlhfjax.supervised import held_out_loss, language_loss
from tests import tiny
from tests.models.families import CONFIGS, random_params, tokens
from tests.plan.subjects import subject_of

MOE = CONFIGS["moe"]
METRICS = ("router_balance", "router_most_loaded", "router_entropy")
EXPERTS = {"n_experts": 4, "experts_per_token": 2, "router_loss": 0.1}


def test_held_out_loss_is_the_likelihood_alone():
    """Training has 0.01 x balance in the loss; what is compared between models has not."""
    model = Model(MOE)
    params, rows = random_params(model), tokens(2, 8)
    ones = jnp.ones_like(rows)
    positions = jnp.broadcast_to(jnp.arange(8), rows.shape)
    batch = TokenBatch(
        tokens=rows,
        targets=tokens(2, 8, 3),
        mask=ones.astype(jnp.float32),
        segment_ids=ones,
        positions=positions,
    )
    plain, _ = jax.jit(language_loss(model))(params, batch, None)
    with_balance = jax.jit(language_loss(model, balanced=True))
    balanced, metrics = with_balance(params, batch, None)
    added = balance(model.hidden_and_routing(params, rows)[1])
    np.testing.assert_allclose(balanced - plain, 0.01 * added, rtol=1e-4)
    assert set(metrics) == {"loss", *METRICS}
    held_out = held_out_loss(model, language_loss(model), np.ones(61, np.int32))
    total, weight = held_out(params, batch)["val_loss"]
    np.testing.assert_allclose(total / weight, plain, rtol=1e-6)


@pytest.mark.nightly
def test_every_stage_trains_a_mixture_of_experts(conversations, tmp_path, capsys):
    """The whole recipe, then a direct and a group stage on what it left."""
    config = tiny.get_config(f"data={conversations},steps=2,until=ppo")
    config.pretrain.model.update(EXPERTS)
    dry_run.show(config, paths.path(str(tmp_path / "none")))
    assert "active" in capsys.readouterr().out
    values = to_dict(config)
    recipe.run(values, tmp_path)
    folders = recipe.stage_folders(values, tmp_path)
    for name in ("pretrain", "sft", "reward", "ppo"):
        line = last_metrics(folders[name])
        prefixes = ("", "value_") if name == "ppo" else ("",)
        for metric in (f"{p}{m}" for p in prefixes for m in METRICS):
            assert np.isfinite(line[f"{name}/{metric}"]), (name, metric)
        assert 1 <= line[f"{name}/router_balance"] <= 4
    stages = {
        name: recipe.resolve(values[name], folders, name) for name in ("reward", "ppo")
    }
    kept = {"direct": ("reward", DIRECT), "group": ("ppo", GROUP)}
    for name, (base, options) in kept.items():
        stage = {key: stages[base][key] for key in (*SHARED, *options)}
        recipe.run({"stage": name, **stage}, tmp_path / name)
        assert f"{name}/router_balance" in last_metrics(tmp_path / name)


SHARED = ("init_from", "batch_size", "optim", "steps", "log")
DIRECT = ("preferences", "length")
GROUP = (
    *("reward", "prompts", "eval_prompts"),
    *("prompt_length", "max_new_tokens", "temperature"),
)


def last_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    merged = {}
    for line in lines:
        merged |= json.loads(line)
    return merged


# ------------------------------------------------------------------ the mesh and the planner


def test_experts_that_a_mesh_does_not_divide():
    layout = make_layout(MeshConfig(data=1, expert=4))
    with pytest.raises(ConfigError, match="axis 'expert' of size 6 is not divisible"):
        layout.spec(("expert", "embed", "mlp"), (6, 24, 16))


def test_a_strategy_of_experts():
    layout = make_layout(MeshConfig(strategy="expert", expert=2))
    assert (layout.mesh.shape["expert"], layout.mesh.shape["fsdp"]) == (2, 2)
    with pytest.raises(ConfigError, match=r"needs mesh\.expert above 1"):
        make_layout(MeshConfig(strategy="expert"))
    with pytest.raises(ConfigError, match=r"mesh\.expert=2: strategy 'fsdp' has"):
        make_layout(MeshConfig(strategy="fsdp", expert=2))


MIXTRAL = preset("mixtral-8x7b", dtype="bfloat16", remat="full")
TOTAL, ACTIVE = 46_702_792_704, 12_879_925_248
IN_EXPERTS = 32 * 8 * 3 * 4096 * 14336


def an_sft():
    return subject_of(
        sft.Config(init_from="x", length=2048, steps=10, batch_size=64), x=MIXTRAL
    )


def test_a_device_has_its_share_of_the_experts_and_all_of_the_rest():
    subject = an_sft()
    axes = {"replica": 1, "data": 1, "fsdp": 4, "tensor": 2, "sequence": 1, "expert": 8}
    parts = footprint.device_bytes(subject.nets, subject.workload(), axes)
    numbers = TOTAL - IN_EXPERTS + IN_EXPERTS / 8
    assert parts["parameters"] == pytest.approx(4 * numbers / 8)
    assert parts["gradients"] == pytest.approx(4 * numbers / 8)
    assert parts["optimizer and average"] == pytest.approx(8 * numbers / 8)
    gathered = (numbers - 2 * 32000 * 4096 - 4096) / 32  # of a layer
    assert parts["gathered layers"] == pytest.approx(gathered * (2 * 2 + 4) / 2)
    without = {name: size for name, size in axes.items() if name != "expert"}
    whole = footprint.device_bytes(subject.nets, subject.workload(), without)
    assert whole["parameters"] == 4 * TOTAL / 8


def test_flops_are_those_of_the_chosen_experts():
    subject = an_sft()
    (flops,) = pace.step_flops(subject.nets, subject.workload()).values()
    assert flops == 64 * 2048 * token_flops(ACTIVE, MIXTRAL, 2048)
    assert flops < 64 * 2048 * 6 * 0.5 * TOTAL


def test_tables_and_lists_have_both_counts():
    assert (
        f"{TOTAL:,} parameters, {ACTIVE:,} active" in tables.by_precision(MIXTRAL).title
    )
    assert "active" not in tables.by_precision(preset("small")).title
    net = footprint.Net("policy", Role(source=""), MIXTRAL)
    assert dry_run._model(net) == "policy 46.7 B, 12.9 B active"


def test_activations_of_experts_are_those_of_the_chosen_ones():
    """Per token: the input, and per expert its input, 4 f of the gated MLP and its output."""
    config = dataclasses.replace(MOE, remat="none")
    found = layer_activations(config, batch=3, time=5, size=2)["mlp"]
    assert found == 3 * 5 * (2 * 24 + 2 * 2 * (24 + 4 * 16 + 24) + 4 * 6)
