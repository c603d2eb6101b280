"""The search with a compiler made of numbers: what it finds, and how often it asks."""

import dataclasses
import json

import jax
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import AXES, MeshConfig
from rlhfjax.models.presets import preset
from rlhfjax.plan import (
    candidates,
    chips,
    predict,
    search,
    search_tables,
    topology,
    variants,
)
from rlhfjax.plan.chips import CHIPS, GIB
from rlhfjax.plan.compiled import CompiledProgram, Memory
from rlhfjax.plan.estimate import Estimate
from rlhfjax.plan.programs import StepPrograms
from rlhfjax.stages.sft import Config
from tests.plan.subjects import subject_of

SHAPE = preset("gpt3-1.3b", dtype="bfloat16", scan_layers=True, remat="full")


def sft(model=SHAPE, **changes):
    return subject_of(
        Config(init_from="x", length=2048, steps=10, **{"batch_size": 64} | changes),
        x=model,
    )


def plan(fits, seconds=1.0):
    """What the compiler would say, of one program that takes so long a step of 1000 tokens."""
    memory, roof = (
        Memory(0.0, 0.0, 0.0, 0.0, GIB * (10 if fits else 20)),
        chips.Roofline(seconds, 0.0, 0.0, 0.0) if fits else None,
    )
    step = CompiledProgram("step", memory, 16 * GIB, fits, None, [], roof, 1.0, 0.0)
    target = topology.Target("stub", jax.devices()[:1], CHIPS["v5e"], 16 * GIB)
    return predict.Plan(
        sft(),
        target,
        dict.fromkeys(AXES, 1),
        StepPrograms([], 1000, 10, 1, 1, []),
        [step],
    )


def candidate(chips, gib, seconds=1.0, chip="v5e"):
    expected = Estimate({"all": gib * GIB}, seconds, 1000)
    return candidates.Candidate(
        f"{chip}:{chips}", chips, MeshConfig(), expected, 16 * GIB
    )


@pytest.mark.parametrize("first_that_fits", [1, 2, 4, 8, 16, 32, 64, None])
def test_the_smallest_is_found_wherever_arithmetic_begins(first_that_fits):
    """It compiles about as many slices as there are between the guess and the answer."""
    sizes = [1, 2, 4, 8, 16, 32, 64]
    for guess in sizes:
        ordered, asked = [candidate(n, 14 if n >= guess else 15) for n in sizes], []

        def fits(c, asked=asked):
            asked.append(c.chips)
            return first_that_fits is not None and c.chips >= first_that_fits

        found = search.smallest(ordered, fits)
        assert (found and found.chips) == first_that_fits
        away = abs(
            sizes.index(guess)
            - (sizes.index(first_that_fits) if first_that_fits else len(sizes))
        )
        assert len(asked) == len(set(asked)) <= away + 2


def stub(monkeypatch, table):
    """Candidates from {chip: [(chips, expected GiB, expected seconds)]}."""
    rows = {
        chip: [candidate(*row, chip=chip) for row in of] for chip, of in table.items()
    }
    monkeypatch.setattr(
        search, "candidates", lambda subject, chip, *options: iter(rows[chip])
    )


def test_it_compiles_a_good_guess_and_the_one_below(monkeypatch):
    """Rates per chip fall with the slice, so nothing larger is worth a compilation."""
    stub(monkeypatch, {"v5e": [(2**i, 56 / 2**i, 1.5**i) for i in range(6)]})
    asked = []

    def compiled(c):
        asked.append(c.chips)
        return plan(c.chips >= 4, seconds=c.expected.seconds)

    found = search.search(sft(), ["v5e"], compiled)
    assert asked == [4, 2]
    assert found.fewest.chips == found.best.chips == 4
    assert found.smallest == {"v5e": "v5e:4"} and not found.exhausted


def test_a_larger_slice_with_more_tokens_a_chip_is_found(monkeypatch):
    """8 chips take a fifth of 4 chips' time, estimated and compiled; 16 promise less."""
    stub(monkeypatch, {"v5e": [(4, 10, 10.0), (8, 5, 2.0), (16, 3, 1.5), (32, 2, 1.4)]})
    asked = []

    def compiled(c):
        asked.append(c.chips)
        return plan(True, seconds=2 * c.expected.seconds)

    found = search.search(sft(), ["v5e"], compiled)
    assert asked == [4, 8]
    assert found.fewest.chips == 4 and found.best.chips == 8
    assert found.best.rate == pytest.approx(1000 / 4 / 8)


def test_chips_are_compared_and_each_has_its_smallest(monkeypatch):
    """v5p fits on fewer chips; v5e makes more of each."""
    stub(
        monkeypatch,
        {"v5e": [(8, 17, 1.0), (16, 10, 0.1)], "v5p": [(2, 10, 10.0), (4, 5, 6.0)]},
    )
    found = search.search(
        sft(), ["v5e", "v5p"], lambda c: plan(c.chips != 8, seconds=c.expected.seconds)
    )
    assert found.smallest == {"v5e": "v5e:16", "v5p": "v5p:2"}
    assert (found.fewest.topology, found.best.topology) == ("v5p:2", "v5e:16")
    assert set(found.plans) == {
        "v5p:2",
        "v5e:16",
        "v5e:8",
    }  # neither v5p:4, slower by arithmetic
    out = json.loads(json.dumps(found.as_dict()))
    assert (out["compiled"], out["considered"], out["smallest"], out["best"]) == (
        3,
        4,
        "v5p:2",
        "v5e:16",
    )
    assert [row.get("fits") for row in out["candidates"]] == [False, True, True, None]


def test_no_more_is_compiled_than_allowed(monkeypatch):
    stub(monkeypatch, {"v5e": [(2**i, 1, 1.0) for i in range(6)]})
    asked = []
    found = search.search(
        sft(), ["v5e"], lambda c: [asked.append(c.chips), plan(False)][1], most=3
    )
    assert asked == [1, 2, 4] and found.exhausted
    assert found.fewest is None and found.best is None and found.smallest == {}


def axes(mesh):
    return mesh and (mesh.data, mesh.fsdp, mesh.tensor, dict(mesh.rules))


def test_meshes_of_slices():
    """64 rows: FSDP over up to 64 devices, then tensor, which does not divide 50257."""
    assert axes(variants.mesh_for(sft(), 16)) == (1, 16, 1, {})
    assert axes(variants.mesh_for(sft(), 128)) == (1, 64, 2, {"vocab": ()})
    assert axes(
        variants.mesh_for(sft(dataclasses.replace(SHAPE, vocab_size=50304)), 128)
    ) == (1, 64, 2, {})
    assert axes(variants.mesh_for(sft(microbatches=4), 64)) == (1, 16, 4, {"vocab": ()})
    assert variants.mesh_for(sft(batch_size=2), 64) is None  # 32 devices for 16 heads


def test_meshes_that_the_config_gives():
    mesh = MeshConfig(data=1, fsdp=-1, tensor=2)
    assert axes(variants.mesh_for(sft(mesh=mesh), 16)) == (1, 8, 2, {"vocab": ()})
    assert variants.mesh_for(sft(mesh=mesh), 1) is None
    fixed = MeshConfig(data=1, fsdp=8)
    assert [n for n in (4, 8, 16) if variants.mesh_for(sft(mesh=fixed), n)] == [8]


def test_candidates_of_a_chip():
    """1.3B with moments and gradients has 21 GB and fits no single v5e."""
    found = {}
    for c in candidates.candidates(sft(), "v5e"):
        found.setdefault(c.topology, c)  # the first of a slice is the best
    assert list(found) == [f"v5e:{s}" for s in candidates.FLAT]
    assert not found["v5e:1x1"].expected_to_fit and found["v5e:4x4"].expected_to_fit
    assert found["v5e:4x4"].chips == found["v5e:4x4"].mesh.fsdp == 16
    # two devices a chip
    half = next(c for c in candidates.candidates(sft(), "tpu7x"))
    assert (
        half.topology == "tpu7x:2x2x1"
        and half.chips == 4
        and half.mesh.fsdp == 8
        and half.capacity == CHIPS["tpu7x"].hbm / 2
    )
    with pytest.raises(ConfigError, match="--chips=v9: chips are v4, v5e"):
        list(candidates.candidates(sft(), "v9"))


def test_nothing_to_choose_from():
    with pytest.raises(
        ConfigError, match="no slice of v5e divides batch and model of sft"
    ):
        search.search(
            sft(mesh=MeshConfig(data=1, fsdp=3)), ["v5e"], lambda c: plan(True)
        )


# ------------------------------------------------------------------ several ways on one slice


def test_a_way_that_should_fit_by_what_was_compiled_is_tried_next(monkeypatch):
    """20 GiB were compiled for 14: of the others 12 would be 17, and 8 would be 11."""
    stub(monkeypatch, {"v5e": [(4, 14, 1.0), (4, 12, 2.0), (4, 8, 3.0), (4, 7, 4.0)]})
    asked = []

    def compiled(c):
        asked.append(c.expected.seconds)
        return plan(c.expected.seconds == 3.0, seconds=3.0)

    found = search.search(sft(), ["v5e"], compiled)
    assert asked == [1.0, 3.0]
    assert found.best is found.fewest is found.candidates[2]
    assert found.smallest == {"v5e": "v5e:4"} and found.compilations == 2


def test_a_slice_is_given_up_after_three_attempts(monkeypatch):
    """Each compilation says 20 GiB. By the ratio 8, then 5, then 3 estimated ones should fit."""
    stub(monkeypatch, {"v5e": [(4, 14, 1.0), (4, 8, 2.0), (4, 5, 3.0), (4, 3, 4.0)]})
    asked = []
    found = search.search(
        sft(), ["v5e"], lambda c: [asked.append(c.expected.seconds), plan(False)][1]
    )
    assert asked == [1.0, 2.0, 3.0] and found.best is None
    assert len(asked) == search.ATTEMPTS


def test_a_faster_way_may_fit_where_the_estimate_says_no(monkeypatch):
    """15.5 GiB are above the margin of 16, but the compiler needs less than estimated."""
    stub(monkeypatch, {"v5e": [(4, 12.5, 2.0), (4, 15.5, 1.0), (4, 25, 0.5)]})
    asked = []

    def compiled(c):
        asked.append(c.expected.seconds)
        return plan(True, seconds=c.expected.seconds)

    found = search.search(sft(), ["v5e"], compiled)
    # 10 GiB were compiled for 12.5, so 15.5 would be 12.4, and 25 would be 20
    assert asked == [2.0, 1.0]
    assert found.best is found.candidates[1]


def test_the_tables_say_why(monkeypatch):
    stub(monkeypatch, {"v5e": [(1, 14, 4.0), (4, 9, 1.0), (8, 5, 1.0)]})
    monkeypatch.setitem(candidates.SLICES, "v5e", ("1", "4", "8", "16"))
    found = search.search(sft(), ["v5e"], lambda c: plan(c.chips > 1, 1.0))
    assert [c.chips for c in search_tables.ranked(found)] == [4, 8]
    rows = dict(_rows(search_tables.why_not(found, ["v5e"])))
    assert rows == {
        "v5e:1": "compiled, 20.00 GiB of 16.00; by hand: all 14.00",
        "v5e:16": "no mesh divides the batch and the models",
    }
    text = search_tables.answers(found)
    assert "Smallest that fits: v5e:4. By chip: v5e:4." in text
    assert "Compiled 2 of 3 candidates on 3 slices." in text


def _rows(table):
    slices, reasons = table.columns[0], table.columns[2]
    return zip(slices.cells, reasons.cells, strict=True)
