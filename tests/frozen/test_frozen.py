"""Stages compile the programs, and reach the numbers, that they did before the code was rearranged.

tests/plan/test_programs.py holds the same digests against what is planned.
"""

import json
import os
import re

import jax
import pytest

from rlhfjax import recipe
from tests.frozen import programs

QUICK = ("ppo", "group rloo")  # in every CI run; the others are nightly
# Another CPU rounds sums in another order, so metrics are near the stored ones and not equal to
# them.
RTOL, ATOL = 1e-2, 1e-3


def names():
    for name in programs.read():
        if name != "jax":
            yield pytest.param(
                name, marks=pytest.mark.slow if name in QUICK else pytest.mark.nightly
            )


@pytest.mark.parametrize("name", names())
def test_a_stage_runs_the_programs_that_it_ran(name, conversations, finished, tmp_path):
    table = programs.read()
    if table["jax"] != [jax.__version__]:
        said = f"the digests are of jax {table['jax'][0]}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(said)
    found = programs.variants(conversations, finished)
    reward = found[name].get("reward")
    if reward in ("compose", "ensemble"):
        recipe.run_stage(found[reward], tmp_path / reward)
    digests, metrics = programs.run(
        found[name], tmp_path / re.sub(r"\W", "_", name), tmp_path
    )
    assert digests == table[name]
    stored = json.loads(programs.METRICS.read_text())
    # On another CPU a near tie may sample another token, after which no metric is comparable.
    if stored["cpu"] == programs.cpu() or "max_new_tokens" not in found[name]:
        assert metrics == pytest.approx(stored[name], rel=RTOL, abs=ATOL, nan_ok=True)


def test_names_and_spellings_of_shardings_are_left_out():
    """One program with a mesh axis of size 1 named or not, and a key on the mesh or on none."""
    mesh = 'sdy.mesh @mesh = <["data"=4, "fsdp"=1]>'
    main = (
        "func.func public @main(%a: tensor<4xf32> "
        "{{sdy.sharding = #sdy.sharding<@{where}, [{{{axes}}}]>}}) {{"
    )
    texts = [
        f"module @jit_{name} {{\n  {mesh}\n{empty}  "
        f"{main.format(where=where, axes=axes)}\n    return\n  }}\n}}\n"
        for name, empty, where, axes in (
            ("f", "", "mesh", '"data", "fsdp"'),
            ("g", "  sdy.mesh @empty_mesh = <[]>\n", "mesh", '"data"'),
            ("h", "", "empty_mesh", '"data"'),
        )
    ]
    digests = [programs.digest(text) for text in texts]
    assert len(set(digests)) == 1
    other = texts[0].replace('"data"', '"other"', 2).replace("@jit_f", "@jit_f")
    assert programs.digest(other.replace("4xf32", "8xf32")) != digests[0]
