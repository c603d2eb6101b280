"""Plans by hand: GPUs, one card, money, and a run's budget, against numbers computed by hand."""

import dataclasses
import json

import pytest

from rlhfjax import commands, main
from rlhfjax.errors import ConfigError
from rlhfjax.footprint import layer_parameters
from rlhfjax.mesh import MeshConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.presets import preset
from rlhfjax.models.size import parameters, token_flops
from rlhfjax.plan import budget, by_hand, one_card, price
from rlhfjax.plan.chips import CHIPS, GIB
from rlhfjax.plan.estimate import estimate
from rlhfjax.plan.price import Prices
from tests.plan.test_estimate import MODEL, ONE, N, a_ppo, an_sft

RECIPE = "--config=tests/tiny.py:data=nowhere"


# ------------------------------------------------------------------ GPUs


@pytest.mark.parametrize(
    ("name", "nodes"), [("h100:8", 1), ("h100:4", 1), ("h100:64", 8), ("b200:1", 1)]
)
def test_gpus_by_name(name, nodes):
    found = by_hand.cluster(name)
    chip, count = name.split(":")
    assert (found.chip, found.count) == (CHIPS[chip], int(count))
    assert found.nodes == nodes


def test_names_of_no_gpus():
    assert by_hand.cluster("v5e:4x4") is None and by_hand.cluster("here") is None
    for name in ("h100", "h100:0", "h100:12", "h100:2x4", "h100:9999999"):
        with pytest.raises(ConfigError, match="expected h100:COUNT, up to 8 GPUs"):
            by_hand.cluster(name)


def test_a_plan_by_hand():
    """1.3B on 8 H100, ZeRO-3: 16 bytes per parameter over 8, and 4 passes at the peak."""
    mesh = MeshConfig(data=1, fsdp=-1)
    gpus = by_hand.cluster("h100:8")
    plan = by_hand.plan_by_hand(an_sft(mesh=mesh), gpus, price=3.0)
    state = 4 * N + 8 * N + 4 * N
    parts = plan.expected.parts
    kept = ("parameters", "optimizer and average", "gradients")
    assert sum(parts[name] for name in kept) == state / 8
    assert plan.mesh["fsdp"] == 8 and plan.fits
    model_flops = 64 * 2048 * token_flops(N, MODEL, 2048)
    seconds = 4 / 3 * model_flops / (8 * 989.5e12)
    assert plan.expected.seconds == pytest.approx(seconds)
    assert plan.mfu == pytest.approx(0.75)  # remat=full: 3 of 4 passes count
    out = json.loads(json.dumps(plan.as_dict()))
    assert out["compiler"] == "by hand, not compiled"
    # 10 steps
    assert out["chip_hours"] == pytest.approx(10 * seconds * 8 / 3600)
    assert out["money"] == pytest.approx(3 * out["chip_hours"])
    assert out["days"] == pytest.approx(10 * seconds / 86_400)


def test_meshes_of_a_plan_by_hand():
    h100 = CHIPS["h100"].hbm
    auto = an_sft(mesh=MeshConfig(strategy="auto"))
    # 1.3B with its moments fits a device of 80 GiB, so gradients alone are sent; one of 16 does not
    assert by_hand.axes_of(auto, 8, h100)["data"] == 8
    assert by_hand.axes_of(auto, 8, 16 * GIB)["fsdp"] == 8
    named = an_sft(mesh=MeshConfig(strategy="fsdp"))
    assert by_hand.axes_of(named, 8, h100)["fsdp"] == 8
    tensor = MeshConfig(data=1, fsdp=4, tensor=2)
    gpus = by_hand.cluster("h100:8")
    with pytest.raises(ConfigError, match="tensor=2 does not divide a vocabulary: set"):
        by_hand.plan_by_hand(an_sft(mesh=tensor), gpus)
    whole = dataclasses.replace(tensor, rules={"vocab": ()})
    assert by_hand.plan_by_hand(an_sft(mesh=whole), gpus).mesh["tensor"] == 2
    for mesh in (MeshConfig(data=1, fsdp=16), MeshConfig(devices="0:4")):
        with pytest.raises(ConfigError, match="mesh"):
            by_hand.plan_by_hand(an_sft(mesh=mesh), gpus)
    with pytest.raises(ConfigError, match="does not divide the 4 rows of a microbatch"):
        by_hand.plan_by_hand(an_sft(batch_size=4), gpus)


def test_the_command_for_gpus(tmp_path, capsys):
    out = tmp_path / "plan.json"
    argv = [RECIPE, "--stage=ppo", "--topology=h100:8", "--price=2", f"--json={out}"]
    main.main(["rlhfjax", "plan", *argv])
    printed = " ".join(capsys.readouterr().out.split())
    assert "by hand, not compiled" in printed and "It should fit." in printed
    plan = json.loads(out.read_text())
    assert plan["money"] == 2 * plan["chip_hours"] and plan["chips"] == 8


# ------------------------------------------------------------------ one card


def fit(subject, text, chip=None, prices=price.NO_PRICES):
    return one_card.fit(subject, one_card.parse_card(text, chip), prices=prices)


def test_cards():
    assert one_card.parse_card("16GiB") == one_card.Card("16GiB", 16 * GIB, None)
    assert one_card.parse_card("24GB").memory == 24e9
    assert one_card.parse_card("10GiB", "h100").chip == CHIPS["h100"]
    a100 = one_card.parse_card("a100-40gb")
    assert a100 == one_card.Card("a100-40gb", 40 * GIB, CHIPS["a100-40gb"])
    assert one_card.parse_card("tpu7x").memory == 96 * GIB  # a device is half of a chip
    for text in ("16", "GiB", "0GiB", "16XB", "h300"):
        with pytest.raises(
            ConfigError, match=f"--fits={text}: expected a size such as"
        ):
            one_card.parse_card(text)


def test_the_first_kind_that_fits_is_the_fastest_of_its_kind():
    """1.3B has 19.6 GiB of state: 40 GiB hold it without remat in small microbatches."""
    subject = an_sft(dataclasses.replace(MODEL, remat="none"))
    found = fit(subject, "a100-40gb", prices=Prices(everywhere=2.0))
    best = found.best
    assert set(best.options) == {"microbatches"} and found.fits(best)
    m = best.options["microbatches"]
    changed = subject.with_config(microbatches=m, mesh=MeshConfig(data=1))
    assert best.expected == estimate(changed, ONE, CHIPS["a100-40gb"])
    more = subject.with_config(microbatches=m // 2)
    assert estimate(more, ONE, CHIPS["v5e"]).bytes > 0.9 * 40 * GIB
    cost = found.cost(best)
    assert cost.money == pytest.approx(2 * 10 * best.expected.seconds / 3600)


def test_a_card_too_small_for_the_state_takes_adapters():
    """Of 8 GiB: 16 bytes per parameter do not fit, 4 of a frozen base and its adapters do."""
    found = fit(an_sft(), "8GiB")
    assert found.best.options["lora.rank"] == one_card.ADAPTERS
    assert "lora.base" not in found.best.options
    assert found.seconds(found.best) is None and found.cost(found.best) is None
    smaller = fit(an_sft(), "5GiB").best
    assert smaller.options["lora.base"] == "int8"
    # 3 bytes less for every number of the layers
    adapted = an_sft(lora=LoraConfig(rank=16, base="int8"))
    base = estimate(adapted, ONE, CHIPS["v5e"]).parts["parameters"]
    assert smaller.expected.parts["parameters"] == base
    whole = estimate(an_sft(lora=LoraConfig(rank=16)), ONE, CHIPS["v5e"])
    assert whole.parts["parameters"] - base == 3 * 24 * layer_parameters(MODEL)


def test_nothing_fits_and_what_is_nearest():
    found = fit(an_sft(), "2GiB")
    assert found.best is None and found.as_dict()["fits"] is False
    sizes = [choice.expected.bytes for kind in found.kinds for choice in kind]
    assert found.nearest.expected.bytes == min(sizes) > 0.9 * 2 * GIB
    assert found.nearest.options["lora.base"] == "nf4"


def test_a_float32_model_may_compute_in_bfloat16():
    subject = an_sft(dataclasses.replace(MODEL, dtype="float32"))
    options = [kind[0].options for kind in fit(subject, "2GiB").kinds]
    assert [o.get("overrides.dtype") for o in options] == [None, "bfloat16"] * 4


def test_all_models_of_a_policy_stage_are_on_the_card():
    """Meshes of its own go; neither remat nor dtype of the models can be changed there."""
    mesh = MeshConfig(devices="0:1")
    found = fit(a_ppo(frozen_mesh=mesh), "h200")
    reward = parameters(preset("gpt3-6.7b"), "scalar")
    kind = found.kinds[0][0]
    assert kind.options["frozen_mesh"] is None
    assert kind.expected.parts["parameters"] == 4 * (2 * N + 2 * reward)
    names = {name for kind in found.kinds for c in kind for name in c.options}
    assert names == {"frozen_mesh", "microbatches", "lora.rank", "lora.base"}


def test_the_command_for_a_card(tmp_path, capsys):
    out = tmp_path / "fits.json"
    argv = [RECIPE, "--stage=sft", "--fits=1MiB", "--chips=h100", f"--json={out}"]
    main.main(["rlhfjax", "plan", *argv])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Nothing that was tried fits. The nearest miss is" in printed
    found = json.loads(out.read_text())
    assert not found["fits"] and found["nearest"]["step_seconds"] > 0
    main.main(["rlhfjax", "plan", RECIPE, "--stage=sft", "--fits=1GiB"])
    assert "run it: rlhfjax run --config=tests/tiny.py" in capsys.readouterr().out


# ------------------------------------------------------------------ money and budgets


def test_prices():
    assert price.parse(None).of("v5e") is None
    assert price.parse("2.5").of("h100") == 2.5
    both = price.parse("v5e:1.2,h100:3")
    assert (both.of("v5e"), both.of("h100")) == (1.2, 3.0)
    with pytest.raises(
        ConfigError, match="--price: none for v6e; expected a number, or"
    ):
        both.of("v6e")
    for text in ("free", "-1", "0", "nan", "inf", "v5e:x"):
        with pytest.raises(ConfigError, match="expected a number, or CHIP:NUMBER"):
            price.parse(text)
    with pytest.raises(ConfigError, match="--price=h300:1: chips are v4"):
        price.parse("h300:1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=here"], "--price: the speed of . x cpu is not known"),
        (["--fits=16GiB"], "--price: --fits has a size alone; name a chip"),
        (
            ["--topology=h100:8", "--slices=2"],
            "--slices and --programs: not for h100:8",
        ),
        (
            ["--fits=16GiB", "--chips=h100,v5e"],
            "--chips: with --fits expected one chip",
        ),
        ([], "--topology is required, or --fits"),
        (["--fits=16GiB", "--tokens=1e9"], "with --model alone, without --config"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    _, fv = main.parse(["rlhfjax", "plan", RECIPE, "--stage=sft", "--price=2", *flags])
    with pytest.raises(ConfigError, match=message):
        commands.plan(fv)


def test_a_day_of_a_hundred_chips():
    assert price.cost(86_400.0, 100, 2.0) == price.Cost(1.0, 2400.0, 4800.0)
    assert price.cost(86_400.0, 100).as_dict() == {"days": 1.0, "chip_hours": 2400.0}


def test_gpt3_in_days(capsys):
    """At 19.7 % MFU 10,000 V100 take 14.8 days, with the preset's 174.6B parameters."""
    model = preset("gpt3-175b")
    flops = 6 * parameters(model) * 300e9
    took = budget.seconds(flops, budget.fleet("v100-32gb:10000"), 0.197)
    assert took / 86_400 == pytest.approx(14.8, abs=0.05)
    argv = ["--model=gpt3-175b", "--tokens=300e9"]
    main.main(["rlhfjax", "plan", *argv])
    output = capsys.readouterr().out
    assert "3.143e+23 FLOPs = 3,638 PF-days" in output and "days," not in output
    where = ["--topology=v100-32gb:10000", "--mfu=0.197", "--price=0.5"]
    main.main(["rlhfjax", "plan", *argv, *where])
    # 14.774 days x 24 x 10,000 x 0.5
    assert "14.8 days, 3.545e+06 chip-hours, costs 1.773e+06" in capsys.readouterr().out
    for wrong, message in (
        (["--mfu=0.4"], "give both --topology=CHIP:COUNT and --mfu"),
        (["--topology=v100:8", "--mfu=0.4"], "with --tokens expected CHIP:COUNT"),
    ):
        with pytest.raises(ConfigError, match=message):
            budget.text(model, 1e9, *_parsed(wrong))


def _parsed(words):
    values = dict(word.removeprefix("--").split("=") for word in words)
    return values.get("topology"), float(values["mfu"])
