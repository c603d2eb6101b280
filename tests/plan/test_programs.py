"""What is planned is what runs: the programs of shapes alone against those of stages that were really built."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest
from rlhfjax.stages.parts.policy import open_task

from rlhfjax import recipe
from rlhfjax import stages as stage_modules
from rlhfjax import state as states
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.plan import compiled, memory, programs, shapes
from rlhfjax.stages import direct, group, ppo
from tests import tiny
from tests.test_stages import stage_values

NOWHERE = to_dict(tiny.get_config("data=nowhere"))
MODEL = shapes.subject(NOWHERE, "pretrain").model
LORA = {"rank": 2, "targets": "attention/(query|value)"}


def described(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward"])
def test_the_step_is_that_of_the_stage(name, conversations, finished):
    """The same text of the whole program, its arguments' shapes included; the plan has read no file.

    SFT is that of adapters.
    """
    changes = {"lora": LORA} if name == "sft" else {}
    values = stage_values(name, conversations, finished, **changes)
    config = recipe.check(values, name)
    layout = make_layout(config.mesh)
    with layout.use():
        stage = stage_modules.find(name).build(config, layout)
        state = states.abstract(jax.eval_shape(stage.init, jax.random.key(0)), stage.axes, layout)
        batch = layout.put(next(stage.batches))
        key = jax.device_put(jax.random.key(0), layout.replicated)
        real = stage.step.func.lower(*stage.step.args, state, batch, key).as_text()
    k = batch["tokens"].shape[1]
    subject = shapes.subject({**NOWHERE, name: NOWHERE[name] | changes}, name)
    planned = programs.sketch(subject, layout, completions=k).programs
    assert [p.name for p in planned] == ["step"]
    assert planned[0].lower().as_text() == real


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_passes_of_a_direct_step_are_those_of_the_stage(loss, conversations, finished):
    """The reference's and the step's programs word for word; KTO asks both models about mismatched answers too."""
    ppo_values = stage_values("ppo", conversations, finished)
    answers = {"preferences": (str(finished / "03_collect/preferences"),), "length": 32, "batch_size": 8}
    values = {"stage": "direct", "loss": {"name": loss}, "init_from": ppo_values["init_from"], **answers}
    values |= {"steps": 2, "optim": tiny.OPTIM, "microbatches": 2}
    config = recipe.check(values, "direct")
    layout = make_layout(config.mesh)
    with layout.use():
        stage = direct.build(config, layout)
        made = inspect.getclosurevars(inspect.unwrap(stage.step)).nonlocals
        batch = layout.put({k: v for k, v in next(stage.batches).items() if not k.startswith(direct.OTHERS)})
        state = states.abstract(jax.eval_shape(stage.init, jax.random.key(0)), stage.axes, layout)
        reference = made["reference"]
        known = {"reference": layout.put_rows(np.zeros(batch["valid"].shape, np.float32))}
        known |= {"kl": layout.put_rows(np.zeros(8, np.float32))} if loss == "kto" else {}
        key = jax.device_put(jax.random.key(0), layout.replicated)
        real = {
            "reference": reference._total.lower(reference._params, batch),
            "mismatched_reference": reference._total.lower(reference._params, batch),
            "mismatched": made["measure"].lower(state.params, batch),
            "step": made["stage"].step.func.lower(*made["stage"].step.args, state, batch | known, key),
        }
    planned = planned_as("direct", values | {"init_from": NOWHERE["ppo"]["init_from"]}, batch["tokens"].shape[1])
    names = {"dpo": ["reference", "step"], "kto": ["reference", "mismatched_reference", "mismatched", "step"]}
    assert list(planned) == names[loss]
    for name, program in planned.items():
        assert program.lower().as_text() == real[name].as_text(), name
    ratio = planned["reference"].model_flops / planned["step"].model_flops
    assert ratio == pytest.approx(1 / 3)


def test_a_reference_takes_memory_where_a_loss_has_one():
    """All of the model's parameters beside the policy's state; a precomputed one too, and no adapters' base twice."""
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])

    def beside(**changes):
        config = {"stage": "direct", "init_from": "stage:sft", "preferences": ("stage:collect/preferences",)}
        config |= {"length": 32, "batch_size": 8, "steps": 2, **changes}
        values = {**NOWHERE, "stages": (*NOWHERE["stages"], "direct"), "direct": config}
        sketch = programs.sketch(shapes.subject(values, "direct"), layout)
        (step,) = (p for p in sketch.programs if p.name == "step")
        return len(sketch.programs), compiled.beside(step, sketch.held)

    size = 4.0 * memory.parameters(shapes.subject(NOWHERE, "sft").model)
    assert beside(loss={"name": "dpo"}) == (2, size)
    assert beside(loss={"name": "dpo"}, reference_logprobs="precomputed") == (1, size)
    assert beside(loss={"name": "simpo"}) == (1, 0.0)
    assert beside(loss={"name": "dpo"}, lora=LORA) == (2, 0.0)


def test_ppos_state_and_experience_are_those_of_the_stage(conversations, finished):
    values = stage_values("ppo", conversations, finished)
    config = recipe.check(values, "ppo")
    layout = make_layout(config.mesh)
    with layout.use():
        stage = ppo.build(config, layout)
        real = jax.eval_shape(stage.init, jax.random.key(0))
        frozen = ppo.parts(config, open_task(config, layout)).frozen
        batch = layout.put(next(stage.batches))
    sketch = programs.sketch(shapes.subject(NOWHERE, "ppo"), layout)
    planned = {p.name: p for p in sketch.programs}
    assert list(planned) == ["rollout", "know", "score", "prepare", "update"]
    state, experience, text, _, _, all_frozen = planned["update"].inputs
    assert described(state) == described(real)
    assert all_frozen["value"] == frozen["value"] == {}
    assert described(list(planned["rollout"].inputs[1:3])) == described([batch["prompts"], batch["segments"]])
    assert described(text) == described({k[4:]: x for k, x in batch.items() if k.startswith("ptx/")})
    assert experience.mask.shape == (16, 8) and experience.tokens.shape == (16, 32)
    assert (sketch.tokens, sketch.batch, sketch.time) == (16 * 8, 8, 32)
    lowered = {program.name: program.lower() for program in sketch.programs}
    assert described(lowered["rollout"].out_info) == described(planned["know"].inputs[2])


def as_group(ppo_values, estimator):
    """PPO's values as those of a group stage: 4 prompts with 4 answers each."""
    known = {f.name for f in dataclasses.fields(group.Config)}
    own = {"stage": "group", "estimator": estimator, "batch_size": 4, "completions": 4, "epochs": 1, "minibatches": 2}
    return {k: v for k, v in ppo_values.items() if k in known} | own


def planned_as(name, values, completions=2):
    """The tiny recipe with these values for a stage, sketched: programs by name."""
    recipe_values = {**NOWHERE, "stages": tuple(dict.fromkeys((*NOWHERE["stages"], name))), name: values}
    subject = shapes.subject(recipe_values, name)
    return {p.name: p for p in programs.sketch(subject, make_layout(subject.config.mesh), completions).programs}


def really_built(name, values):
    """A policy stage: its state as it is placed, its step's parts by name, and a batch."""
    config = recipe.check(values, name)
    layout = make_layout(config.mesh)
    with layout.use():
        stage = stage_modules.find(name).build(config, layout)
        state = states.abstract(jax.eval_shape(stage.init, jax.random.key(0)), stage.axes, layout)
        return (
            state,
            inspect.getclosurevars(inspect.unwrap(stage.step)).nonlocals,
            layout.put(next(stage.batches)),
            layout,
        )


@pytest.mark.parametrize(
    ("name", "changes"),
    [("group", {"estimator": "reinforce"}), ("group", {"estimator": "grpo", "lora": LORA}), ("ppo", {"lora": LORA})],
    ids=["group", "group-lora", "ppo-lora"],
)
def test_the_update_is_that_of_the_stage(name, changes, conversations, finished):
    """The same text of the whole program, of what it is called with as well: groups, and adapters on a frozen base."""

    def values(of):
        return (as_group(of, changes["estimator"]) if name == "group" else of) | changes

    state, made, batch, layout = really_built(name, values(stage_values("ppo", conversations, finished)))
    planned = planned_as(name, values(NOWHERE["ppo"]))
    assert list(planned) == ["rollout", "know", "score", "prepare", "update"]
    _, experience, text, pairs, key, _ = planned["update"].inputs
    with layout.use():
        real = made["algorithm"].update.lower(state, experience, text, pairs, key, made["frozen"])
    assert planned["update"].lower().as_text() == real.as_text()
    assert described(list(planned["rollout"].inputs[1:3])) == described([batch["prompts"], batch["segments"]])


def test_a_group_runs_its_prompt_once():
    """16 answers to 4 prompts of 24 tokens: what is prefilled, and by hand what it costs."""
    planned = planned_as("group", as_group(NOWHERE["ppo"], "rloo"))
    lowered = planned["rollout"].lower()
    assert described(lowered.out_info) == described(planned["know"].inputs[2])
    text = lowered.as_text()
    assert "tensor<4x24x16xf32>" in text and "tensor<16x24x16xf32>" not in text
    ratio = planned["rollout"].model_flops / planned["know"].model_flops
    assert ratio == pytest.approx((4 * 24 + 16 * 8) / (16 * 32))


def test_training_computes_more_than_palm_counts_with_remat_and_less_with_adapters():
    """Forward, gradients of inputs, gradients of weights are 3; remat=full adds a pass, adapters leave one out."""
    plain, full = (dataclasses.replace(MODEL, remat=remat) for remat in ("none", "full"))
    assert [programs.passes(rank, c) * 3 for rank in (0, 4) for c in (plain, full)] == pytest.approx([3, 4, 2, 3])
    assert programs.passes(0, full, plain) == 1.0
    subject = shapes.subject(NOWHERE | {"ppo": NOWHERE["ppo"] | {"value": "policy"}}, "ppo")._replace(model=full)
    times = {p.name: p.passes for p in programs.sketch(subject, make_layout(MeshConfig())).programs}
    assert times.pop("update") == pytest.approx(4 / 3) and set(times.values()) == {1.0}


def test_flops_of_ppos_programs_by_hand():
    """PaLM's 6 N + 12 L H Q T a token, a forward pass a third; N by hand, LM 7,728 and a scalar head of 17."""
    layout = make_layout(MeshConfig())
    sketch = programs.sketch(shapes.subject(NOWHERE, "ppo"), layout)
    flops = {p.name: p.model_flops for p in sketch.programs}
    trunk = 320 * 16 + (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    attention = 12 * 2 * 8 * 32
    policy, value = 6 * trunk + attention, 6 * (trunk + 17) + attention
    tokens = 16 * 32
    assert flops["rollout"] == pytest.approx(tokens * policy / 3)
    assert flops["score"] == pytest.approx(tokens * value / 3)
    # 2 epochs; and as much text (ptx.ratio 1, length 32) in each
    assert flops["update"] == pytest.approx(2 * tokens * (policy + value) + 2 * tokens * policy)
    assert flops["prepare"] == 0


def test_arrays_are_laid_over_the_mesh():
    config = to_dict(tiny.get_config("data=nowhere"))
    config["sft"]["mesh"] |= {"fsdp": 2, "tensor": 2}
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    _, state, batch, _ = programs.sketch(shapes.subject(config, "sft"), layout).programs[0].inputs
    kernel = state.params["backbone"]["layers"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
    assert batch["tokens"].sharding.shard_shape(batch["tokens"].shape) == (4, 32)
    assert all(np.prod(x.shape) for x in jax.tree.leaves(batch))


def test_the_model_of_an_earlier_stage_with_overrides():
    config = to_dict(tiny.get_config("data=nowhere"))
    config["sft"]["overrides"] = {"dtype": "bfloat16"}
    assert shapes.subject(config, "pretrain").model.dtype == "float32"
    assert shapes.subject(config, "reward").model.dtype == "bfloat16"  # from sft
    last = shapes.subject(config)
    assert last.name == "ppo" and last.reward.d_model == 16


def test_a_model_that_is_nowhere_is_asked_for():
    config = {**NOWHERE["ppo"], "init_from": "runs/start", "reward": "gold:sentiment", "value": "policy"}
    with pytest.raises(ConfigError, match=r"ppo.init_from=runs/start: no model there; say its shape with --model"):
        shapes.subject(config)
    got = shapes.subject(config, model="gpt3-1.3b:dtype=bfloat16,scan_layers=true")
    assert (got.model.n_layers, got.model.dtype, got.model.scan_layers, got.reward) == (24, "bfloat16", True, None)
    with pytest.raises(ConfigError, match="--reward_model=PRESET"):
        shapes.subject({**config, "reward": "runs/reward"}, model="tiny")


def test_what_cannot_be_planned():
    with pytest.raises(ConfigError, match="the stages that train are pretrain, sft, reward, ppo"):
        shapes.subject(NOWHERE, "tokenizer")
    with pytest.raises(ConfigError, match="config argument 'depth' is unknown"):
        shapes.parse_model("tiny:depth=3")
    quantised = {**NOWHERE, "sft": {**NOWHERE["sft"], "lora": {**LORA, "base": "nf4"}}}
    with pytest.raises(ConfigError, match=r"plan: lora\.base='nf4' cannot be planned"):
        programs.sketch(shapes.subject(quantised, "sft"), make_layout(MeshConfig()))
    config = to_dict(tiny.get_config("data=nowhere"))
    config["sft"]["batch_size"] = 6
    layout = make_layout(MeshConfig(data=4), jax.devices()[:4])
    with pytest.raises(ConfigError, match=r"sft.batch_size=6 is not divisible by the 4 devices"):
        programs.sketch(shapes.subject(config, "sft"), layout)
