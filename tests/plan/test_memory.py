"""Memory by hand: against published numbers, against real models, and against the paper."""

import dataclasses

import jax
import pytest

from rlhfjax.models import size
from rlhfjax.models.presets import PRESETS, preset
from rlhfjax.models.transformer import Model
from rlhfjax.plan import memory
from tests.models.families import FEATURES

LLAMA = preset("llama2-7b")


@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, "lm") for name in PRESETS), ("small", "scalar"), ("gpt1", "scalar")],
)
def test_the_count_by_hand_is_that_of_the_model(name, head):
    config = preset(name, scan_layers=True)
    tree = jax.eval_shape(Model(config, head).init, jax.random.key(0))
    assert memory.parameters(config, head) == sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", FEATURES)
def test_the_count_by_hand_has_every_option(name):
    model = Model(FEATURES[name])
    leaves = jax.tree.leaves(model.shapes())
    assert memory.parameters(model.config) == sum(x.size for x in leaves)


def test_llama_2_7b_by_hand():
    # 32 x (4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096) + 2 x 32000 x 4096 + 4096
    assert memory.parameters(LLAMA) == 6_738_415_616


def test_the_textbook_figures():
    lines = {line.what.strip(): line for line in memory.textbook(LLAMA)}
    printed = {
        "inference, fp32": (
            "GiB",
            26.1,
            26.95,
        ),  # the last: really needed, GB of 10^9, 6.738e9 parameters
        "inference, fp16": ("GiB", 13.0, 13.48),
        "inference, int8": ("GiB", 6.5, 6.74),
        "inference, int4": ("GiB", 3.26, 3.37),
        "training at int8: weights": ("GB", 7.0, 26.95),
        "gradients": ("GB", 7.0, 26.95),
        "AdamW": ("GB", 14.0, 53.91),
    }
    for what, (unit, figure, needed) in printed.items():
        digits = len(str(figure).partition(".")[2])
        assert (lines[what].unit, round(lines[what].textbook, digits)) == (unit, figure)
        assert round(lines[what].needed / memory.GB, 2) == needed
    a_sample = lines["activations per sample"]
    assert a_sample.textbook == 2048 * 32 * (4096 + 11008) / 1e9  # 0.98986
    assert round(a_sample.textbook, 2) == 0.99
    # "about 77": 7 + 7 + 14 + 50 x 0.98986 = 77.49
    assert round(lines["total, batch 50"].textbook, 2) == 77.49


def test_what_a_sample_of_llama_really_keeps():
    # bf16: 2 x 2048 tokens x (4096 + 4 x 4096 of attention, 4096 + 4 x 11008 of the MLP, 2 x 4096
    # of the norms), and the scores, 2 x 32 x 2048^2; 32 layers
    a_layer = 2 * 2048 * (5 * 4096 + 4096 + 4 * 11008 + 2 * 4096) + 2 * 32 * 2048**2
    line = next(line for line in memory.textbook(LLAMA) if "sample" in line.what)
    assert line.needed == 32 * a_layer == 18_656_264_192


def test_eq_1_of_korthikanti_for_a_gpt_with_dropout():
    c = preset("gpt3-1.3b", dropout=0.1)
    parts = size.layer_activations(c, batch=4, time=2048)
    sbh, a, h = 2048 * 4 * 2048, 16, 2048
    assert sum(parts.values()) == sbh * (34 + 5 * a * 2048 / h)
    assert parts["mlp"] == 19 * sbh and parts["norms"] == 4 * sbh  # section 4.1
    assert parts["attention"] + parts["scores"] == 11 * sbh + 5 * a * 2048**2 * 4
    assert memory.korthikanti(c, 4, 2048) == 24 * sum(parts.values())


def test_kernels_keep_no_scores():
    """But the log-sum-exp of each query and head, 4 bytes; all else is as it was."""
    plain = size.layer_activations(LLAMA, batch=2, time=32768)
    kernel = dataclasses.replace(LLAMA, attention="splash")
    parts = size.layer_activations(kernel, batch=2, time=32768)
    assert plain["scores"] == 2 * 2 * 32 * 32768**2  # 137 GB
    assert parts == plain | {"scores": 4 * 2 * 32 * 32768}


def test_eq_1_of_korthikanti_for_gpt3():
    c, sbh = preset("gpt3-175b"), 2048 * 12288
    assert 5 * c.n_heads * 2048 / c.d_model == 80  # section 5: "5as/h = 80" for GPT-3
    assert memory.korthikanti(c, 1, 2048) == 96 * sbh * (34 + 80)


def test_optimizers():
    assert memory.optimizer_bytes(1e9, "adamw") == 8e9
    assert memory.optimizer_bytes(1e9, "adamw", "int8") == 2e9
    assert memory.optimizer_bytes(2048, "adamw_8bit") == 2 * (2048 + 4)
    assert memory.optimizer_bytes(1e9, "sgd_momentum", "bf16") == 2e9
    assert memory.optimizer_bytes(1e9, "sgd") == 0


def test_every_precision_and_optimizer():
    n = memory.parameters(LLAMA)
    rows = memory.by_precision(LLAMA)
    assert list(rows) == ["fp32", "bf16", "fp16", "int8", "int4", "bf16 + fp32 master"]
    assert (
        rows["fp32"]["adamw"] == 16 * n
        and rows["int8"]["adamw"] == 4 * n
        and rows["bf16"]["sgd"] == 4 * n
    )
    assert (
        rows["bf16 + fp32 master"]["adamw"] == 16 * n
    )  # Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12
    assert rows["int4"]["weights"] == n / 2


def test_cache_and_logits():
    assert (
        size.kv_cache_bytes(LLAMA, 1, 4096) == 2 * memory.GIB
    )  # 2 x 32 x 4096 x 4096 x 2
    assert (
        size.kv_cache_bytes(preset("llama2-70b"), 1, 4096) == 1.25 * memory.GIB
    )  # 8 of 64 heads
    assert memory.logits_bytes(LLAMA, 1, 2048) == 2048 * 32000 * 4


def test_remat_keeps_the_inputs_of_layers():
    assert (
        size.activations(preset("llama2-7b", remat="full"), 1, 2048)
        == 32 * 2 * 2048 * 4096
    )
    assert size.activations(LLAMA, 1, 2048) == 18_656_264_192
