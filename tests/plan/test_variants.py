"""Ways to run a stage: what the search tries, and that it overlooks nothing that is better."""

import itertools
import shlex

import pytest
from ml_collections import ConfigDict

from rlhfjax import main
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, axis_sizes
from rlhfjax.models.presets import preset
from rlhfjax.plan import candidates, command, overrides, search, shapes, variants
from rlhfjax.plan.chips import CHIPS
from rlhfjax.plan.estimate import estimate
from rlhfjax.plan.price import Prices
from rlhfjax.plan.variants import Settings
from rlhfjax.strategy import AXES, FULL
from tests.plan.test_estimate import a_ppo
from tests.plan.test_search import sft

# 8 heads, so that `tensor` may be 8; remat and microbatches decide whether it fits.
SMALL = preset("gpt3-350m", n_heads=8, d_head=128, scan_layers=True)


def no_compiler(c):
    raise AssertionError(f"{c.topology} is compiled")


def exhaustive(subject, chip, counts):
    """All products of powers of 2 that divide rows, heads and widths, with all settings."""
    c = subject.model
    for n in counts:
        powers = [2**i for i in range(n.bit_length())]
        for data, fsdp, tensor in itertools.product(powers, repeat=3):
            if data * fsdp * tensor != n or c.n_heads % tensor or tensor > 8:
                continue
            axes = {
                **dict.fromkeys(AXES, 1),
                "data": data,
                "fsdp": fsdp,
                "tensor": tensor,
            }
            for remat, m in itertools.product(
                ("none", "full"), (1, 2, 4, 8, 16, 32, 64)
            ):
                if 64 % (m * data * fsdp):
                    continue
                changed = subject.with_models(remat=remat).with_config(microbatches=m)
                expected = estimate(changed, axes, chip)
                fits = expected.bytes <= FULL * chip.hbm
                yield n, expected.tokens / expected.seconds / n, expected.bytes, fits


@pytest.mark.parametrize("chip", ["v100-16gb", "h100"])
def test_nothing_better_is_overlooked(chip):
    """The best rate on every number of GPUs, and the least memory, are those of all products."""
    counts = (1, 2, 4, 8, 16)
    subject = sft(SMALL)
    all_ways = list(exhaustive(subject, CHIPS[chip], counts))
    assert {fits for *_, fits in all_ways} == {True, False}
    for c in candidates.candidates(subject, chip):
        of_count = [way for way in all_ways if way[0] == c.chips]
        if not of_count:
            continue
        rates = [rate for _, rate, _, fits in of_count if fits]
        if c.expected_to_fit:
            assert c.expected_rate <= max(rates) * (1 + 1e-12)
    found = search.search(subject, [chip], no_compiler)
    best = max(rate for _, rate, _, fits in all_ways if fits)
    fewest = min(n for n, _, _, fits in all_ways if fits)
    on_these = [c for c in found.fitting if c.chips in counts]
    assert max(c.rate for c in on_these) == pytest.approx(best, rel=1e-12)
    assert found.fewest.chips == fewest
    firsts = {name: group[0] for name, group in found.slices.items()}
    for n in counts:
        rates = [rate for count, rate, _, fits in all_ways if count == n and fits]
        assert firsts[f"{chip}:{n}"].expected_rate == pytest.approx(max(rates))


def test_where_nothing_fits_it_is_what_needs_least():
    """6.7B on one A100 of 40 GB: full remat and one row at a time."""
    subject = sft(preset("gpt3-6.7b", dtype="bfloat16", scan_layers=True))
    first = next(candidates.candidates(subject, "a100-40gb"))
    needed = [size for *_, size, _ in exhaustive(subject, CHIPS["a100-40gb"], (1,))]
    assert first.expected.bytes == min(needed) and not first.expected_to_fit
    assert first.settings == Settings(remat="full", microbatches=64)


def test_what_may_not_vary_stays():
    own = sft(SMALL, microbatches=4)
    kept = list(candidates.candidates(own, "h100", vary=()))
    assert {c.settings for c in kept} == {variants.AS_IT_IS}
    assert {c.topology: c.mesh for c in kept} == {
        f"h100:{n}": variants.mesh_for(own, n) for n in (1, 2, 4, 8, 16, 32, 64, 128)
    }
    given = sft(SMALL, mesh=MeshConfig(data=1, fsdp=8))
    assert {c.topology for c in candidates.candidates(given, "h100")} == {"h100:8"}
    named = sft(SMALL, mesh=MeshConfig(strategy="fsdp"))
    assert axis_sizes(variants.mesh_for(named, 4))["fsdp"] == 4
    # a policy stage cannot change the model that it gets
    assert variants.remats(a_ppo()) == ["full"]


def test_a_chip_is_chosen_by_money():
    """An A100 has a third of the speed: at a quarter of the price it is cheaper, at half not."""
    for price, cheaper in ((1.0, "a100-80gb"), (2.0, "h100")):
        prices = Prices(of_chips={"h100": 4.0, "a100-80gb": price})
        found = search.search(
            sft(SMALL), ["h100", "a100-80gb"], no_compiler, prices=prices
        )
        assert found.best.chip == cheaper
        cost = found.best.cost()
        # 10 steps of 64 x 2048 tokens
        seconds = 10 * 64 * 2048 / (found.best.rate * found.best.chips)
        assert cost.chip_hours == pytest.approx(seconds * found.best.chips / 3600)
        assert cost.money == pytest.approx(prices.of(cheaper) * cost.chip_hours)
        assert cost.days == pytest.approx(seconds / 86_400)


# ------------------------------------------------------------------ the command to run


def built(line, stage):
    """The typed config of a stage on a printed command line."""
    words = shlex.split(line)
    command_, fv = main.parse(words)
    assert command_.run.__name__ == words[1]
    models = {"model": "gpt3-125m"}
    return shapes.subject(fv.config, stage, **models).config


RECIPE = "tests/tiny.py:data=nowhere"


@pytest.mark.parametrize("name", ["gpu", "single"])
def test_the_printed_command_has_the_config_that_was_found(name, tmp_path, capsys):
    file = RECIPE
    if name == "single":
        file = tmp_path / "sft.py"
        file.write_text(
            "from rlhfjax.stages import stage_config\n"
            "def get_config(arg=None):\n"
            "    return stage_config('sft', init_from='nowhere', length=32, batch_size=48,\n"
            "        steps=2, sources=(), overrides={'dropout': 0.0})\n"
        )
    stage = "sft" if name == "gpu" else None
    given = (
        "--config.sft.steps=7" if name == "gpu" else "--config.overrides.dropout=0.1"
    )
    argv = [f"--config={file}", given, "--model=gpt3-125m", "--topology=search"]
    argv += ["--chips=v100-16gb,h100"] + ([f"--stage={stage}"] if stage else [])
    main.main(["rlhfjax", "plan", *argv])
    lines = capsys.readouterr().out.splitlines()
    (plan_line,) = (x[9:] for x in lines if x.startswith("plan it: "))
    (run_line,) = (x[9:] for x in lines if x.startswith("run it:  "))
    main.main(shlex.split(plan_line))
    assert "It should fit." in capsys.readouterr().out
    config = built(run_line, stage)
    assert config == built(plan_line, stage)
    if name == "gpu":
        assert config.steps == 7
    else:
        assert config.overrides["dropout"] == 0.1


def test_overrides_as_a_person_would_type_them():
    config = ConfigDict(
        {
            "stage": "sft",
            "overrides": {"dropout": 0.5},
            "mesh": {"rules": {}, "fsdp": 1},
        }
    )
    changed = {"overrides.remat": "full", "mesh.fsdp": 8, "mesh.rules": {"vocab": ()}}
    words = overrides.overrides(config, "sft", changed, given=["overrides.dropout"])
    assert words == [
        "--config.overrides={'dropout': 0.5, 'remat': 'full'}",
        "--config.mesh.fsdp=8",
        "--config.mesh.rules={'vocab': ()}",
    ]
    text = overrides.line(["rlhfjax", *words, "--x=$HOME 'a'"])
    assert shlex.split(text) == ["rlhfjax", *words, "--x=$HOME 'a'"]
    recipe = ConfigDict({"stages": ("a", "b"), "a": {"model": {"remat": "none"}}})
    words = overrides.overrides(recipe, "a", {"model.remat": "full"})
    assert words == ["--config.a.model.remat=full"]
    assert to_dict(recipe)["a"]["model"]["remat"] == "none"  # the config stays as it is


def test_unknown_names_are_errors():
    options = command.Options(topology="search", vary=("remats",), model="gpt3-125m")
    config = ConfigDict(
        to_dict(main.parse(["", "plan", f"--config={RECIPE}"])[1].config)
    )
    with pytest.raises(ConfigError, match="--vary=remats: expected some of remat, mic"):
        command.run(config, RECIPE, options)
