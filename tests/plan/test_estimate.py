"""Estimates against arithmetic by hand, and advice against the estimate of the advised config."""

import dataclasses

import pytest

from rlhfjax.config import to_dict
from rlhfjax.footprint import layer_parameters
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import size
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.presets import preset
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.plan import advice, estimate, memory, programs, shapes
from rlhfjax.plan.chips import CHIPS, GIB
from rlhfjax.plan.compiled import CompiledProgram, Memory, held_by_others
from rlhfjax.rl.config import HumanConfig
from rlhfjax.stages import ppo, sft
from tests import tiny
from tests.plan.subjects import subject_of

ONE = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
MODEL = preset("gpt3-1.3b", dtype="bfloat16", scan_layers=True, remat="full")
N = memory.parameters(MODEL)
REWARD_MODEL = preset("gpt3-6.7b", dtype="bfloat16", scan_layers=True, remat="full")


def an_sft(model=MODEL, **changes):
    config = sft.Config(
        init_from="x", length=2048, steps=10, **{"batch_size": 64} | changes
    )
    return subject_of(config, x=model)


def a_ppo(**changes):
    options = {
        "batch_size": 64,
        "prompt_length": 1024,
        "max_new_tokens": 1024,
        "steps": 10,
        "minibatches": 8,
    } | changes
    return subject_of(
        ppo.Config(init_from="x", reward="r", **options), x=MODEL, r=REWARD_MODEL
    )


def in_memory(subject, axes=ONE):
    """Bytes of parameters alone, per device."""
    return estimate.estimate(subject, axes, CHIPS["v5p"]).parts["parameters"]


def test_the_state_is_split_and_the_activations_are_of_a_devices_rows():
    parts = estimate.estimate(an_sft(), {**ONE, "fsdp": 16}, CHIPS["v5e"]).parts
    assert (
        parts["parameters"] == 4 * N / 16
        and parts["optimizer and average"] == 8 * N / 16
    )
    assert parts["gradients"] == 4 * N / 16
    # 64 rows over 16 devices: of each the inputs of 24 layers, and all of one layer
    a_layer = sum(memory.layer_activations(MODEL, 4, 2048).values())
    assert parts["activations"] == 24 * 2 * 4 * 2048 * 2048 + a_layer
    again = estimate.estimate(
        an_sft(microbatches=4), {**ONE, "fsdp": 16}, CHIPS["v5e"]
    ).parts
    half = an_sft(optim=OptimConfig(moments="bfloat16"))
    assert (
        estimate.estimate(half, {**ONE, "fsdp": 16}, CHIPS["v5e"]).parts[
            "optimizer and average"
        ]
        == 6 * N / 16
    )
    assert (
        again["activations"] == parts["activations"] / 4
        and again["gradients"] == 2 * parts["gradients"]
    )


def test_ppo_has_four_models_and_an_average():
    reward = memory.parameters(REWARD_MODEL, "scalar")
    assert in_memory(a_ppo(ema=0.9)) == 4 * (2 * N + 2 * reward)
    parts = estimate.estimate(
        a_ppo(ema=0.9), {**ONE, "fsdp": 8}, CHIPS["v5p"], phase="rollout"
    ).parts
    assert parts["optimizer and average"] == 4 * (3 * N + 2 * reward) / 8
    # 8 rows a device while sampling, 1 in a minibatch: 8 x 2048 keys and values of 24 layers
    assert parts["KV cache"] == size.kv_cache_bytes(MODEL, 8, 2048)


def test_adapters_share_their_base_with_the_reference():
    """So does the value function with the reward model, but for a head of its own."""
    everywhere = LoraConfig(rank=8, targets="attention|mlp")
    # rank 8 x (d_in + d_out) of four projections of d x d and two of d x 4 d
    adapters = 8 * (24 * 18 * 2048 + 32 * 18 * 4096)
    head = REWARD_MODEL.d_model + 1
    frozen = N + memory.parameters(REWARD_MODEL, "scalar")
    subject = a_ppo(lora=everywhere)
    assert in_memory(subject) == 4 * (frozen + adapters + head)
    parts = estimate.estimate(subject, ONE, CHIPS["v5p"]).parts
    assert parts["optimizer and average"] == 8 * (adapters + head)
    quantized = a_ppo(lora=dataclasses.replace(everywhere, base="int8"))
    layers = 24 * layer_parameters(MODEL)
    assert in_memory(quantized) == 4 * (frozen + adapters + head) - 3 * layers


def test_every_model_that_takes_part_is_in_the_estimate():
    """A human reward and a gold reward too; a reward that is a gold function has no model."""
    plain = in_memory(a_ppo())
    human = a_ppo(human=HumanConfig(reward="h"))
    gold = a_ppo(gold="g")
    small = preset("gpt3-125m")
    reward = memory.parameters(small, "scalar")
    for subject, name in ((human, "h"), (gold, "g")):
        subject.sources.models[name] = Model(small, "scalar")
        assert in_memory(subject) == plain + 4 * reward
    assert in_memory(a_ppo(gold="gold:sentiment")) == plain
    separate = a_ppo(frozen_mesh=MeshConfig(devices="0:1"))
    assert in_memory(separate) == 4 * (N + memory.parameters(REWARD_MODEL, "scalar"))


def test_time_of_a_step_on_one_chip_is_that_of_its_products():
    """6 N + 12 L H Q T a token, a third more for what is computed again; nothing is sent."""
    got = estimate.estimate(an_sft(), ONE, CHIPS["v5p"])
    flops = 64 * 2048 * (6 * N + 12 * 24 * 16 * 128 * 2048)
    assert got.seconds == pytest.approx(flops * 4 / 3 / CHIPS["v5p"].flops)
    assert got.tokens == 64 * 2048


def too_large(gib, room=16.0, name="step"):
    memory_ = Memory(gib * GIB, 0.0, 0.0, 0.0, gib * GIB)
    return CompiledProgram(name, memory_, room * GIB, False, None, [], None, 1.0, 0.0)


def test_advice_names_what_fits_and_by_how_much():
    """On 16 replicas, every line has the estimate of the changed config, scaled by 2."""
    wide = dataclasses.replace(MODEL, dtype="float32", remat="none")
    subject, axes = an_sft(wide), {**ONE, "data": 16}
    now = estimate.estimate(subject, axes, CHIPS["v5e"]).bytes
    lines = advice.advise(subject, axes, too_large(2 * now / GIB))
    text = "\n".join(lines)
    assert f"step needs {2 * now / GIB:.1f} GiB per device of 16.0" in lines[0]
    full = estimate.estimate(
        an_sft(dataclasses.replace(wide, remat="full")), axes, CHIPS["v5e"]
    ).bytes
    assert (
        f"remat=full of the model (now none): {2 * full / GIB:.1f} GiB, not enough alone"
        in text
    )
    assert (
        "--config.microbatches=4 (now 1)" in text
        and "--config.mesh.fsdp=16 (now data 16, fsdp 1)" in text
    )
    together = an_sft(MODEL, microbatches=4)
    best = estimate.estimate(together, {**ONE, "fsdp": 16}, CHIPS["v5e"]).bytes
    assert f"all of this together: {2 * best / GIB:.1f} GiB, fits" in text


def test_what_the_mesh_forbids_is_not_advised():
    """With one row per device, no smaller batch is advised; more devices extend tensor."""
    text = "\n".join(advice.advise(an_sft(), {**ONE, "fsdp": 64}, too_large(40.0)))
    assert "smaller microbatches" not in text and "--config.batch_size" not in text
    assert "--config.mesh.fsdp=64 --config.mesh.tensor=" in text


def test_advice_is_for_the_program_that_does_not_fit():
    """Smaller microbatches save activations of an update, but nothing of a rollout."""
    subject, axes = a_ppo(minibatches=1, batch_size=512), {**ONE, "fsdp": 8}
    parts = {
        part: estimate.estimate(subject, axes, CHIPS["v5e"], phase=part)
        for part in ("rollout", "update")
    }
    assert (
        "KV cache" in parts["rollout"].parts and "KV cache" not in parts["update"].parts
    )
    for part, helped in (("rollout", False), ("update", True)):
        (line,) = (
            x
            for x in advice.advise(subject, axes, too_large(20.0, name=part))
            if "smaller microbatches" in x
        )
        assert (
            float(line.partition(": ")[2].partition("): ")[2].partition(" GiB")[0]) < 20
        ) == helped, line


def test_frozen_models_are_beside_an_update():
    """Reference and reward model stay on the devices while the policy and its EMA are updated."""
    subject = shapes.subject(to_dict(tiny.get_config("data=nowhere")), "ppo")
    step = programs.step_programs(subject, make_layout(MeshConfig()))
    left = {p.name: held_by_others(p, step.held) for p in step.programs}
    one, reward = (
        4 * memory.parameters(subject.model),
        4 * memory.parameters(subject.model, "scalar"),
    )
    assert left["update"] == one + reward
    # policy and value function with two moments each, the policy's average; counters
    state = 4 * one + 3 * reward
    assert left["score"] == pytest.approx(one + state, rel=0.01)
    assert left["rollout"] == pytest.approx(one + reward + state - one, rel=0.01)
    assert left["know"] == pytest.approx(reward + state - one - reward, rel=0.01)


def test_a_rollout_in_the_decode_layout_gathers_no_weights_and_has_them_twice():
    """FSDP over 16 of v5e: gathered for 1024 tokens, 2 N / 200 GB/s each; else sent once."""
    axes = {**ONE, "fsdp": 16}
    training, decode = (
        estimate.estimate(a_ppo(rollout_layout=layout), axes, CHIPS["v5e"], phase=phase)
        for layout, phase in (("training", "rollout"), ("decode", "rollout"))
    )
    gathered = 1024 * 2 * N * 15 / 16 / CHIPS["v5e"].ici
    assert 0.5 * gathered < training.seconds - decode.seconds < gathered
    n = estimate.decode_size(a_ppo(rollout_layout="decode"), a_ppo().workload(), axes)
    assert decode.parts["weights of rollouts"] == 2 * N / n
    assert decode.parts["KV cache"] == training.parts["KV cache"]
