"""What is planned is what runs: the programs of shapes alone against those that stages compiled."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.footprint import Net
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.presets import preset
from rlhfjax.plan import compiled, memory, programs, shapes
from rlhfjax.roles import Role
from tests import tiny
from tests.frozen import programs as frozen
from tests.plan import fingerprint

NOWHERE = to_dict(tiny.get_config("data=nowhere"))
MODEL = shapes.subject(NOWHERE, "pretrain").model
LORA = {"rank": 2, "targets": "attention/(query|value)"}
POLICY = ["rollout", "know", "score", "prepare", "update"]
COMPLETIONS = 4  # of tests/tiny.py


def described(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


PLANNED = {
    "pretrain": ["step"],
    "sft nf4": ["step"],
    "reward": ["step"],
    "tamer": ["step"],
    "ppo": POLICY,
    "ppo lora": POLICY,
    "ppo int8": POLICY,
    "ppo one_step_off": POLICY,
    "ppo rollout_mesh": POLICY,
    "ppo frozen_mesh": [
        "rollout",
        "know",
        "ref_logprobs",
        "score",
        "prepare",
        "update",
    ],
    "ppo text": ["rollout", "know", "prepare", "update"],
    "ppo human": ["rollout", "know", "score", "human", "prepare", "update"],
    "ppo compose": ["rollout", "know", "score_0", "prepare", "update"],
    "ppo ensemble": [
        "rollout",
        "know",
        "score",
        "score_spread",
        "score_combine",
        "prepare",
        "update",
    ],
    "ppo scores": ["rollout", "truncate", "know", "score", "prepare", "update"],
    "group dapo overlong": POLICY,
    "direct kto": ["reference", "mismatched_reference", "mismatched", "step"],
    "direct precomputed": ["step"],
}
SMALL = (
    "score_spread",
    "score_combine",
)  # programs of a few operations, which are not in the table
QUICK = (
    "sft nf4",
    "reward",
    "ppo lora",
    "ppo rollout_mesh",
    "ppo frozen_mesh",
    "direct kto",
)


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PLANNED],
)
def test_what_is_planned_is_what_ran(
    name, conversations, finished, tmp_path, monkeypatch
):
    """Every planned program is among those that the stage compiled in a run (tests/frozen).

    The plan reads the configs of models, no parameters and no data.
    """
    values = as_planned(
        frozen.variants(conversations, finished)[name],
        conversations,
        finished,
        tmp_path,
    )
    tokenizer = load_tokenizer(str(finished / "00_tokenizer"))
    for id_name in ("eos_id", "pad_id"):
        monkeypatch.setattr(shapes._Ids, id_name, getattr(tokenizer, id_name))
    monkeypatch.setattr(
        shapes._Ids, "token_id", lambda self, piece: tokenizer.token_id(piece)
    )
    subject = shapes.subject(values)
    completions = most_feedback(values) if name == "tamer" else COMPLETIONS
    step = programs.step_programs(
        subject, make_layout(subject.config.mesh), completions
    )
    assert [program.name for program in step.programs] == PLANNED[name]
    ran = frozen.read()[name]
    for program in step.programs:
        if program.name not in SMALL:
            module = fingerprint.received(program.lower(), {}).module
            assert frozen.digest(module) in ran, program.name


def as_planned(values, conversations, finished, tmp_path):
    """A variant's config; a reward that is made of others is described first."""
    if values.get("reward") not in ("compose", "ensemble"):
        return values
    folder = tmp_path / values["reward"]
    recipe.run_stage(frozen.variants(conversations, finished)[values["reward"]], folder)
    return values | {"reward": str(folder)}


def most_feedback(values):
    lines = open(values["feedback"]).read().splitlines()  # noqa: SIM115
    return max(len(json.loads(line)["feedback"]) for line in lines if line.strip())


def test_a_plan_without_any_file_is_the_same(finished):
    """Models from the recipe's configs give the same programs as models on the disk."""
    on_disk = {
        **NOWHERE["ppo"],
        "init_from": str(finished / "02_sft"),
        "reward": str(finished / "04_reward"),
    }
    plans = [
        programs.step_programs(subject, make_layout(MeshConfig()))
        for subject in (shapes.subject(NOWHERE, "ppo"), shapes.subject(on_disk))
    ]
    assert [p.name for p in plans[0].programs] == POLICY
    for one, other in zip(plans[0].programs, plans[1].programs, strict=True):
        assert described(one.inputs) == described(other.inputs)
        assert one.model_flops == other.model_flops
    digests = [frozen.digest(d.programs[-1].lower().as_text()) for d in plans]
    assert digests[0] == digests[1]


def test_a_reference_takes_memory_where_a_loss_has_one():
    """A reference takes memory, a precomputed one too; a base that adapters share does not."""
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])

    def beside(**changes):
        config = {
            "stage": "direct",
            "init_from": "stage:sft",
            "preferences": ("stage:collect/preferences",),
        }
        config |= {"length": 32, "batch_size": 8, "steps": 2, **changes}
        values = {**NOWHERE, "stages": (*NOWHERE["stages"], "direct"), "direct": config}
        step = programs.step_programs(shapes.subject(values, "direct"), layout)
        (update,) = (p for p in step.programs if p.name == "step")
        return len(step.programs), compiled.held_by_others(update, step.held)

    size = 4.0 * memory.parameters(shapes.subject(NOWHERE, "sft").model)
    assert beside(loss={"name": "dpo"}) == (2, size)
    assert beside(loss={"name": "dpo"}, reference_logprobs="precomputed") == (1, size)
    assert beside(loss={"name": "simpo"}) == (1, 0.0)
    assert beside(loss={"name": "dpo"}, lora=LORA) == (2, 0.0)


def beside_the_update(**changes):
    """Bytes per device that are held beside PPO's update, on two of four devices."""
    values = {
        **NOWHERE,
        "ppo": NOWHERE["ppo"] | {"mesh": {"data": 2, "devices": "0:2"}} | changes,
    }
    subject = shapes.subject(values, "ppo")
    step = programs.step_programs(subject, make_layout(subject.config.mesh))
    (update,) = (program for program in step.programs if program.name == "update")
    return compiled.held_by_others(update, step.held)


def test_memory_is_counted_per_role():
    """What other roles hold meanwhile: frozen models on the same devices, each once."""
    policy = 4.0 * memory.parameters(shapes.subject(NOWHERE, "sft").model)
    reward = 4.0 * memory.parameters(shapes.subject(NOWHERE, "sft").model, "scalar")
    assert beside_the_update() == policy + reward
    assert (
        beside_the_update(human={"reward": "stage:reward"}) == policy + reward
    )  # the same arrays
    assert beside_the_update(value="policy", reward="gold:sentiment") == policy
    assert beside_the_update(frozen_mesh={"data": 2, "devices": "2:4"}) == 0.0
    assert beside_the_update(lora=LORA) == reward - 4.0 * (
        reward / 4 - 17
    )  # its head: the base is in the value


def as_group(ppo_values, estimator):
    """PPO's values as those of a group stage: 4 prompts with 4 answers each."""
    own = {
        "stage": "group",
        "estimator": estimator,
        "batch_size": 4,
        "samples_per_prompt": 4,
        "epochs": 1,
        "minibatches": 2,
    }
    left_out = {
        "value",
        "value_head",
        "value_clip",
        "value_coefficient",
        "value_optim",
        "gamma",
        "lam",
    }
    left_out |= {"whiten_rewards", "whiten_advantages"}
    return {k: v for k, v in ppo_values.items() if k not in left_out} | own


def planned_as(name, values, completions=2):
    """Returns the programs by name of a stage of the tiny recipe with these values."""
    recipe_values = {
        **NOWHERE,
        "stages": tuple(dict.fromkeys((*NOWHERE["stages"], name))),
        name: values,
    }
    subject = shapes.subject(recipe_values, name)
    return {
        p.name: p
        for p in programs.step_programs(
            subject, make_layout(subject.config.mesh), completions
        ).programs
    }


def test_a_group_runs_its_prompt_once():
    """16 answers to 4 prompts of 24 tokens: what is prefilled, and by hand what it costs."""
    planned = planned_as("group", as_group(NOWHERE["ppo"], "rloo"))
    lowered = planned["rollout"].lower()
    rollout = jax.tree.leaves(planned["know"].inputs)[-4:]
    assert described(jax.tree.leaves(lowered.out_info)) == described(rollout)
    text = lowered.as_text()
    assert "tensor<4x24x16xf32>" in text and "tensor<16x24x16xf32>" not in text
    ratio = planned["rollout"].model_flops / planned["know"].model_flops
    assert ratio == pytest.approx((4 * 24 + 16 * 8) / (16 * 32))


def test_training_computes_more_than_palm_counts_with_remat_and_less_with_adapters():
    """Of 3 passes, remat=full adds one, and adapters leave out the weights' gradients."""
    full = dataclasses.replace(MODEL, remat="full")
    for rank, c, passes in ((0, MODEL, 3), (0, full, 4), (4, MODEL, 2), (4, full, 3)):
        role = Role("x", lora=LoraConfig(rank=rank))
        ratio = programs.flops_ratio([Net("policy", role, c)])
        assert ratio == pytest.approx(passes / 3)
    subject = shapes.subject(
        NOWHERE | {"ppo": NOWHERE["ppo"] | {"value": "policy"}}, "ppo"
    )
    mixed = [
        net._replace(config=full) if net.name == "policy" else net
        for net in subject.nets
    ]
    assert programs.flops_ratio([net for net in mixed if net.role.optim]) == 1.0
    subject = subject.with_models(remat="full")
    times = {
        p.name: p.flops_ratio
        for p in programs.step_programs(subject, make_layout(MeshConfig())).programs
    }
    assert times.pop("update") == pytest.approx(4 / 3) and set(times.values()) == {1.0}


def test_flops_of_ppos_programs_by_hand():
    """6 N + 12 L H Q T per token, a forward pass a third; N is 7,728, a scalar head 17."""
    layout = make_layout(MeshConfig())
    step = programs.step_programs(shapes.subject(NOWHERE, "ppo"), layout)
    flops = {p.name: p.model_flops for p in step.programs}
    trunk = 320 * 16 + (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
    attention = 12 * 2 * 8 * 32
    policy, value = 6 * trunk + attention, 6 * (trunk + 17) + attention
    tokens = 16 * 32
    assert flops["rollout"] == pytest.approx(tokens * policy / 3)
    assert flops["know"] == pytest.approx(tokens * (policy + value) / 3)
    assert flops["score"] == pytest.approx(tokens * value / 3)
    # 2 epochs; and as much text (ptx.ratio 1, length 32) in each
    assert flops["update"] == pytest.approx(
        2 * tokens * (policy + value) + 2 * tokens * policy
    )
    assert flops["prepare"] == 0
    assert (step.tokens, step.batch, step.time) == (16 * 8, 8, 32)


def test_a_pass_without_a_gradient_is_a_third_of_a_step():
    config = {
        "stage": "direct",
        "init_from": "stage:sft",
        "preferences": ("stage:collect/preferences",),
    }
    config |= {"length": 32, "batch_size": 8, "steps": 2, "loss": {"name": "kto"}}
    planned = planned_as("direct", config)
    step = planned.pop("step").model_flops
    assert len(planned) == 3
    assert all(
        program.model_flops == pytest.approx(step / 3) for program in planned.values()
    )


def test_a_reward_of_several_models_has_a_program_for_each():
    """Members that run on the devices; text is scored on the host. All of them are in memory."""
    members = (
        {"reward": "stage:reward"},
        {"reward": "gold:sentiment"},
        {"reward": "stage:reward", "weight": 0.5},
    )
    values = {**NOWHERE, "stages": (*NOWHERE["stages"][:-2], "compose", "ppo")}
    del values["evaluate"]
    values["compose"] = {"stage": "compose", "members": members}
    values["ppo"] = NOWHERE["ppo"] | {"reward": "stage:compose", "value": "policy"}
    subject = shapes.subject(values, "ppo")
    assert [name for name in subject.roles if name.startswith("reward")] == [
        "reward_0",
        "reward_2",
    ]
    planned = programs.step_programs(subject, make_layout(MeshConfig())).programs
    scores = {p.name: p.model_flops for p in planned if p.name.startswith("score")}
    assert list(scores) == ["score_0", "score_2"]
    assert scores["score_0"] == scores["score_2"] > 0


def test_arrays_are_laid_over_the_mesh():
    config = to_dict(tiny.get_config("data=nowhere"))
    config["sft"]["mesh"] |= {"fsdp": 2, "tensor": 2}
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    inputs = (
        programs.step_programs(shapes.subject(config, "sft"), layout).programs[0].inputs
    )
    by_path = {x.path: x for x in inputs if hasattr(x, "path")}
    kernel = by_path[
        next(
            p for p in by_path if "params" in p and "'up'" in p and "opt_state" not in p
        )
    ]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
    batch = [x for x in inputs if x.shape == (8, 32)]
    assert batch and all(x.sharding.shard_shape(x.shape) == (4, 32) for x in batch)
    assert all(np.prod(x.shape) for x in inputs)


def test_the_model_of_an_earlier_stage_with_overrides():
    config = to_dict(tiny.get_config("data=nowhere"))
    config["sft"]["overrides"] = {"dtype": "bfloat16"}
    assert shapes.subject(config, "pretrain").model.dtype == "float32"
    assert shapes.subject(config, "reward").model.dtype == "bfloat16"  # from sft
    last = shapes.subject(config)
    assert (
        last.name == "ppo"
        and last.nets[2].name == "reward"
        and last.nets[2].config.d_model == 16
    )


def test_a_model_that_is_nowhere_is_asked_for():
    config = {
        **NOWHERE["ppo"],
        "init_from": "runs/start",
        "reward": "gold:sentiment",
        "value": "policy",
    }
    with pytest.raises(
        ConfigError,
        match=r"ppo: policy=runs/start: no model there; give its shape with --model",
    ):
        shapes.subject(config)
    got = shapes.subject(config, model="gpt3-1.3b:dtype=bfloat16,scan_layers=true")
    assert (got.model.n_layers, got.model.dtype, got.model.scan_layers) == (
        24,
        "bfloat16",
        True,
    )
    assert "reward" not in got.roles
    with pytest.raises(ConfigError, match="--reward_model=PRESET"):
        shapes.subject({**config, "reward": "runs/reward"}, model="tiny")


def test_what_cannot_be_planned():
    with pytest.raises(
        ConfigError, match="the stages that train are pretrain, sft, reward, ppo"
    ):
        shapes.subject(NOWHERE, "tokenizer")
    with pytest.raises(ConfigError, match="config argument 'depth' is unknown"):
        shapes.parse_model("tiny:depth=3")
    longer = shapes.parse_model("llama2-7b:max_length=8192,rope_theta=5e5")
    assert longer == preset("llama2-7b", max_length=8192, rope_theta=5e5)
    config = to_dict(tiny.get_config("data=nowhere"))
    config["sft"]["batch_size"] = 6
    layout = make_layout(MeshConfig(data=4), jax.devices()[:4])
    with pytest.raises(
        ConfigError, match=r"sft.batch_size=6 is not divisible by the 4 devices"
    ):
        programs.step_programs(shapes.subject(config, "sft"), layout)


def test_a_rollout_in_the_decode_layout_is_planned_with_its_resharding():
    """The weights are inputs of `rollout` alone, as `reshard` leaves them; then they are freed."""
    values = {**NOWHERE["ppo"], "rollout_layout": "decode", "rollout_tensor": 2}
    subject = shapes.subject({**NOWHERE, "ppo": values}, "ppo")
    layout = make_layout(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    step = programs.step_programs(subject, layout)
    assert [program.name for program in step.programs] == ["reshard", *POLICY]
    reshard, rollout = step.programs[:2]
    sizes = [compiled.sharded_bytes(program.inputs) for program in step.programs[:2]]
    assert 1.5 * sizes[0] < sizes[1] < 2.5 * sizes[0]  # over 2 devices instead of 4
    held = compiled.held_by_others(rollout, step.held)
    assert held > compiled.held_by_others(reshard, step.held)
    assert "decode" in rollout.inputs[0].sharding.mesh.axis_names
