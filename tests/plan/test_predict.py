"""`rlhfjax plan` from end to end: for this machine, and for a TPU if libtpu is installed."""

import dataclasses
import importlib.util
import json
import re

import jax
import jaxlib
import pytest

from rlhfjax import main
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.plan import compiled, compiler, memory, predict, shapes, tables, topology
from rlhfjax.plan.chips import CHIPS
from rlhfjax.stages import group
from tests import tiny
from tests.needs import needs

A_CHIP = topology.Target(
    "v5e:1x1", jax.devices()[:1], CHIPS["v5e"], CHIPS["v5e"].hbm, "v5e:1x1"
)
NOTHING = compiler.Memory(0.0, 0.0, 0.0, 0.0, 0.0)
BIG_BUFFER = """
ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  ROOT %sum = f32[1024]{0} add(%p, %p), metadata={op_name="jit(f)/sum"}
}
"""
needs_libtpu = needs("libtpu", extra="plan")


def tiny_sft(**changes):
    return {**to_dict(tiny.get_config("data=nowhere")), **changes}


@pytest.fixture
def named_compiler(monkeypatch):
    """Names a compiler for TPUs where the test stands in for it and libtpu may be missing."""
    name = property(lambda self: "libtpu 0")
    monkeypatch.setattr(topology.Target, "compiler", name)


def test_the_command_on_the_devices_at_hand(tmp_path, capsys):
    argv = [
        "--config=tests/tiny.py:data=nowhere",
        "--stage=sft",
        "--topology=here",
        f"--json={tmp_path}/plan.json",
    ]
    main.main(["rlhfjax", "plan", *argv])
    output = capsys.readouterr().out
    assert "By hand: 7,728 parameters" in output and "Memory per device" in output
    assert f"by jaxlib {jaxlib.__version__}" in output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["compiler"] == f"jaxlib {jaxlib.__version__}"
    assert (plan["parameters"], plan["tokens_per_step"], plan["steps"]) == (
        7_728,
        8 * 32,
        6,
    )
    assert plan["six_n_d"] == 6 * 7_728 * 256
    (step,) = plan["programs"]
    # parameters and two moments in float32, the batch's five arrays, three counters and the key
    assert (
        step["memory"]["arguments"]
        == pytest.approx(3 * 4 * 7_728 + 5 * 4 * 256, abs=64)
        or plan["devices"] > 1
    )
    assert step["fits"] is None and step["flops"] > 0 and step["largest_buffers"]


def test_a_part_of_a_step(monkeypatch, named_compiler):
    """Two of PPO's five programs: what is left out is named, and no time is made of a part."""
    chosen = shapes.subject(tiny_sft(), "ppo")
    asked = []
    monkeypatch.setattr(
        compiler,
        "compile_program",
        lambda request: (
            asked.append(request.program)
            or compiler.CompilerOutput(NOTHING, BIG_BUFFER)
        ),
    )
    plan = predict.make_plan(chosen, A_CHIP, only=["know", "update"])
    assert [p.name for p in plan.programs] == asked == ["know", "update"]
    assert (
        plan.left_out == plan.as_dict()["left_out"] == ["rollout", "score", "prepare"]
    )
    assert (
        plan.step_seconds is None
        and "in none of these numbers: rollout, score, prepare" in tables.verdict(plan)
    )
    with pytest.raises(
        ConfigError,
        match="--programs=step: the programs of ppo are rollout, know, score",
    ):
        predict.make_plan(chosen, A_CHIP, only=["step"])


def test_the_arithmetic_alone(capsys):
    main.main(["rlhfjax", "plan", "--model=llama2-7b"])
    output = capsys.readouterr().out
    assert "6,738,415,616" in output and "26.08 GiB" in output and "77.49 GB" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "expected CHIP:SHAPE such as v5e:4x4.*chips are v4, v5e"),
        ("v5e", "expected CHIP:SHAPE"),
        pytest.param(
            "v5e:3x5", "v5e:3x5: .*divisible", marks=[needs_libtpu, pytest.mark.slow]
        ),
    ],
)
def test_topologies_that_there_are_not(name, message):
    with pytest.raises(ConfigError, match=message):
        topology.target(name)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[plan\]'"):
        topology.target("v5e:2x2")


TOO_LARGE = (  # libtpu's words
    "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (29.85G) exceeds available HBM (15.75G). HLO module: jit_f."
)


def test_what_does_not_fit_says_by_how_much_and_what_would_help(
    monkeypatch, named_compiler
):
    needed = compiler.Memory(9 * 2.0**30, 20.85 * 2.0**30, 1.0, 1.0, 29.85 * 2.0**30)
    monkeypatch.setattr(
        compiler,
        "compile_program",
        lambda request: compiler.CompilerOutput(needed, BIG_BUFFER, TOO_LARGE),
    )
    plan = predict.make_plan(shapes.subject(tiny_sft(), "sft"), A_CHIP)
    (step,) = plan.programs
    assert plan.fits is False and step.cost is None and plan.step_seconds is None
    assert step.memory == needed and step.buffers == [
        ("f32[1024] p", 4096.0),
        ("f32[1024] jit(f)/sum", 4096.0),
    ]
    assert step.capacity == pytest.approx(15.75 * 2**30)
    assert re.search(
        r"step needs 29\.\d GiB per device of 15\.8", plan.as_dict()["advice"][0]
    )
    assert "It does not fit." in tables.verdict(
        plan
    ) and "CompileTimeHbmOom" in tables.verdict(plan)
    assert plan.as_dict()["programs"][0]["compiler"] == TOO_LARGE


def test_what_other_programs_hold_counts(monkeypatch):
    """A rollout does not fit beside the value function, the reference and the reward model."""
    fits = compiler.Memory(1.0, 1.0, 1.0, 1.0, CHIPS["v5e"].hbm - 10_000)
    monkeypatch.setattr(
        compiler,
        "compile_program",
        lambda request: compiler.CompilerOutput(fits, BIG_BUFFER),
    )
    (rollout,) = predict.make_plan(
        shapes.subject(tiny_sft(), "ppo"), A_CHIP, only=["rollout"]
    ).programs
    assert rollout.held_by_others > 3 * 4 * 10_000 and rollout.fits is False
    (step,) = predict.make_plan(shapes.subject(tiny_sft(), "sft"), A_CHIP).programs
    assert step.held_by_others == 0 and step.fits


def test_products_take_at_least_what_the_mathematics_needs():
    """Loops of unknown length count once: of 5 FLOPs in the text and 12 in theory, 12 count."""
    cost = compiled.Cost(flops=5.0, hbm=7.0)
    assert (
        compiled._work(cost, 12.0) == (12.0, 7.0, 0.0, 0.0)
        and compiled._work(cost, 2.0).flops == 5.0
    )


def test_time_and_cost_from_a_roofline():
    """100 steps of 2 s on 16 chips are 200 s and 16 x 200 / 3600 chip-hours."""
    chosen, chip = shapes.subject(tiny_sft(), "sft"), CHIPS["v5e"]
    target = topology.Target("v5e:4x4", [None] * 16, chip, chip.hbm)
    step = predict.step_programs(chosen, make_layout(chosen.config.mesh))
    step = step._replace(steps=100, tokens=1000)
    roof = compiled.Roofline(compute=2.0, hbm=1.0, ici=0.5, dcn=0.0)
    memory = compiled.Memory(1.0, 1.0, 1.0, 1.0, 2.0)
    program = compiled.CompiledProgram(
        "step",
        memory,
        chip.hbm,
        True,
        compiled.Cost(),
        [],
        roof,
        0.4 * 32 * chip.flops,
        0.0,
    )
    out = predict.Plan(chosen, target, {}, step, [program]).as_dict()
    assert (
        out["step_seconds"] == 2.0
        and out["tokens_per_second"] == 500
        and out["mfu"] == pytest.approx(0.4)
    )
    assert out["hours"] == pytest.approx(200 / 3600) and out[
        "chip_hours"
    ] == pytest.approx(16 * 200 / 3600)
    assert (
        out["fits"] is True
        and out["advice"] == []
        and out["programs"][0]["bound"] == "compute"
    )


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_across_two_slices():
    """Data parallel over DCN, FSDP within: what crosses is the gradients' shards, in float32.

    Widths are multiples of 128 per device: a TPU pads narrower rows to that, and sends the padding.
    """
    config = tiny_sft()
    config["pretrain"]["mesh"] |= {"replica": 2, "fsdp": 4, "data": 1}
    config["pretrain"]["model"] |= {
        "scan_layers": True,
        "d_model": 512,
        "d_ff": 1024,
        "n_heads": 4,
    }
    plan = predict.make_plan(
        shapes.subject(config, "pretrain"), topology.target("v5e:2x2", 2)
    )
    (step,) = plan.programs
    assert plan.fits and len(plan.target.devices) == 8 and plan.target.chips == 8
    assert {link for _, link in step.cost.sent} == {"ici", "dcn"}
    # 320 x 512 + 4 x 512^2 + 3 x 512 x 1024 + 2 x 512 + 512 parameters. Every gradient crosses
    # once, a quarter from each device; the tied embedding's crosses twice, as input and as output.
    # The rest is a few rows and scalars.
    n, embedding = 2_786_816, 320 * 512
    assert memory.parameters(plan.subject.model) == n
    assert step.cost.link("dcn") == pytest.approx(4 * (n + embedding) / 4, rel=0.02)
    assert plan.step_seconds > 0 and 0 < plan.totals["mfu"] < 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_chip_answers(name):
    target = topology.target(name)
    assert target.chips == 4 and len(target.devices) == (
        8 if name.startswith("tpu7x") else 4
    )
    assert target.capacity == CHIPS[name.split(":")[0]].hbm / (
        2 if name.startswith("tpu7x") else 1
    )


@needs_libtpu
@pytest.mark.slow
def test_an_axis_may_lie_along_a_part_of_a_side():
    """32 of 4 x 4 x 4 chips: half the slice, whose chips are neighbors."""
    mesh = make_layout(
        MeshConfig(data=1, fsdp=2, tensor=32), topology.target("v5p:4x4x4").devices
    ).mesh
    assert mesh.shape["fsdp"] == 2 and mesh.shape["tensor"] == 32
    for half in mesh.devices.reshape(2, 32):
        assert sorted(
            len({chip.coords[side] for chip in half}) for side in range(3)
        ) == [2, 4, 4]


@needs_libtpu
@pytest.mark.slow
def test_a_group_with_adapters_on_a_tpu():
    """Every program compiles, and the base is no part of what is sent to be summed."""
    config = to_dict(tiny.get_config("data=nowhere"))
    own = {
        "stage": "group",
        "batch_size": 4,
        "samples_per_prompt": 4,
        "epochs": 1,
        "minibatches": 2,
        "lora": {"rank": 2},
    }
    known = {f.name for f in dataclasses.fields(group.Config)}
    config |= {
        "stages": (*config["stages"], "group"),
        "group": {k: v for k, v in config["ppo"].items() if k in known},
    }
    config["group"] |= own
    config["group"]["mesh"] |= {"data": 2, "fsdp": 2}
    plan = predict.make_plan(
        shapes.subject(config, "group"), topology.target("v5e:2x2")
    )
    assert [p.name for p in plan.programs] == [
        "rollout",
        "know",
        "score",
        "prepare",
        "update",
    ]
    assert plan.fits and plan.step_seconds > 0 and 0 < plan.totals["mfu"] < 1
    # Two adapters per layer of rank 2 on 16 x 16, reduced at most twice per minibatch; the base has
    # 40 KB.
    reduced = sum(
        n
        for (kind, _), n in plan.programs[-1].cost.sent.items()
        if kind in ("all-reduce", "reduce-scatter")
    )
    assert 0 < reduced < 4 * 7_728


@needs_libtpu
@pytest.mark.slow
def test_the_search_with_the_compiler(tmp_path, capsys):
    """A model of 40 KB fits one chip, and larger slices promise nothing: one compilation."""
    argv = [
        "--config=tests/tiny.py:data=nowhere",
        "--stage=sft",
        "--topology=search",
        "--chips=v5e,v6e",
    ]
    main.main(["rlhfjax", "plan", *argv, f"--json={tmp_path}/search.json"])
    result = json.loads((tmp_path / "search.json").read_text())
    assert result["smallest_by_chip"] == {
        "v5e": "v5e:1x1",
        "v6e": "v6e:1x1",
    } and result["best"] in ("v5e:1x1", "v6e:1x1")
    assert result["compiled"] == 2 and "Compiled 2 of" in capsys.readouterr().out
