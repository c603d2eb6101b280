"""Parameter counts of the presets, from shapes alone (175B parameters are counted, not made)."""

import math
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.models import Model
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.presets import PRESETS, preset

# l layers, width d, MLP width f, vocabulary v, context t. Every formula: layers, then embeddings,
# then the final norm.


def gpt(l, d, v=50257, t=2048):
    """4 d^2 + 4 d of attention, 8 d^2 + 5 d of MLP and 4 d of norms a layer; tied output, learned
    positions.
    """
    return l * (12 * d**2 + 13 * d) + (v + t) * d + 2 * d


def gpt1(l, d):
    """The same without a final norm."""
    return gpt(l, d, 40478, 512) - 2 * d


def neox(l, d, v):
    """A GPT's layers; two embeddings, no learned positions."""
    return l * (12 * d**2 + 13 * d) + 2 * v * d + 2 * d


def llama(l, d, f, v, group=1, embeddings=1):
    """2 d^2 of queries and out, 2 d^2/group of keys and values, 3 d f of MLP and 2 d of norms a
    layer; no biases.
    """
    return (
        l * (2 * d**2 + 2 * d**2 // group + 3 * d * f + 2 * d) + embeddings * v * d + d
    )


def qwen2(l, d, f, v, group):
    """And biases on queries, keys and values."""
    return llama(l, d, f, v, group) + l * (d + 2 * d // group)


# Each preset's shape again, from its source, and what the formula gives. GPT-3's and Stiennon's are
# published in two or three digits; what the releases of the others hold is this.
COUNTS = {
    "tiny": (llama(4, 128, 352, 4096), 1_328_256),
    "small": (llama(6, 384, 1024, 8192), 13_767_552),
    "gpt1": (gpt1(12, 768), 116_534_784),
    "gpt2-124m": (gpt(12, 768, t=1024), 124_439_808),
    "gpt2-355m": (gpt(24, 1024, t=1024), 354_823_168),
    "gpt2-774m": (gpt(36, 1280, t=1024), 774_030_080),
    "gpt2-1.5b": (gpt(48, 1600, t=1024), 1_557_611_200),
    "gpt3-125m": (gpt(12, 768), 125_226_240),
    "gpt3-350m": (gpt(24, 1024), 355_871_744),
    "gpt3-760m": (gpt(24, 1536), 760_300_032),
    "gpt3-1.3b": (gpt(24, 2048), 1_315_723_264),
    "gpt3-2.7b": (gpt(32, 2560), 2_651_553_280),
    "gpt3-6.7b": (gpt(32, 4096), 6_658_404_352),
    "gpt3-13b": (gpt(40, 5120), 12_853_386_240),
    "gpt3-175b": (gpt(96, 12288), 174_604_259_328),
    "stiennon-1.3b": (gpt(24, 2048), 1_315_723_264),
    "stiennon-3b": (gpt(32, 2560), 2_651_553_280),
    "stiennon-6.7b": (gpt(32, 4096), 6_658_404_352),
    "stiennon-13b": (gpt(40, 5120), 12_853_386_240),
    "llama2-7b": (llama(32, 4096, 11008, 32000, embeddings=2), 6_738_415_616),
    "llama2-13b": (llama(40, 5120, 13824, 32000, embeddings=2), 13_015_864_320),
    "llama2-70b": (llama(80, 8192, 28672, 32000, 8, embeddings=2), 68_976_648_192),
    "llama3-8b": (llama(32, 4096, 14336, 128256, 4, embeddings=2), 8_030_261_248),
    "pythia-1b": (neox(16, 2048, 50304), 1_011_781_632),
    "pythia-2.8b": (neox(32, 2560, 50304), 2_775_208_960),
    "pythia-6.9b": (neox(32, 4096, 50432), 6_857_302_016),
    "qwen2.5-0.5b": (qwen2(24, 896, 4864, 151936, 7), 494_032_768),
    "smollm2-135m": (llama(30, 576, 1536, 49152, 3), 134_515_008),
    "smollm2-360m": (llama(32, 960, 2560, 49152, 3), 361_821_120),
    "smollm2-1.7b": (llama(24, 2048, 8192, 49152), 1_711_376_384),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    by_hand, total = COUNTS[name]
    assert count(preset(name, scan_layers=True)) == by_hand == total


def test_unrolled_layers_count_the_same():
    assert count(preset("small")) == COUNTS["small"][1]


# Families in which every head has 64 numbers.
OF_64 = ("gpt1", "gpt2", "smollm2", "qwen2.5")


def count(config):
    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "heads", "width"),
    [
        *[(name, None, 64) for name in PRESETS if name.startswith(OF_64)],
        *[(name, None, 128) for name in PRESETS if name.startswith("llama")],
        # Brown et al. 2020, Table 2.1: the column d_head
        ("gpt3-125m", 12, 64),
        ("gpt3-350m", 16, 64),
        ("gpt3-760m", 16, 96),
        ("gpt3-1.3b", 16, 128),
        ("gpt3-2.7b", 32, 80),
        ("gpt3-6.7b", 32, 128),
        ("gpt3-13b", 40, 128),
        ("gpt3-175b", 96, 128),
        # Biderman et al. 2023, Table 1: heads
        ("pythia-1b", 8, 256),
        ("pythia-2.8b", 32, 80),
        ("pythia-6.9b", 32, 128),
    ],
)
def test_heads(name, heads, width):
    """How many heads there are changes no count: pinned by their width instead."""
    c = preset(name)
    assert c.head_dim == width and c.head_dim * c.n_heads == c.d_model
    assert heads is None or c.n_heads == heads


def test_every_option_of_the_architecture_is_some_presets():
    configs = [preset(name) for name in PRESETS]
    hints = get_type_hints(TransformerConfig)
    for name in ("positions", "norm", "mlp", "residual"):
        assert {getattr(c, name) for c in configs} == set(get_args(hints[name]))
    for name in (
        "n_kv_heads",
        "rope_theta",
        "rope_fraction",
        "norm_eps",
        "bias",
        "qkv_bias",
        "tie_embeddings",
    ):
        assert len({getattr(c, name) for c in configs}) > 1, name


def test_the_family_table_names_every_preset():
    page = (
        (Path(__file__).parents[2] / "docs" / "models.md")
        .read_text()
        .partition("\n## ")[0]
    )
    cells = [
        line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ")
    ][1:]
    assert [name for cell in cells for name in cell.replace("`", "").split()] == [
        *list(PRESETS)[2:],
        "tiny",
        "small",
    ]


def test_changes_and_their_errors():
    assert preset("gpt2-124m", dropout=0.0).dropout == 0.0
    with pytest.raises(ConfigError, match="gpt5"):
        preset("gpt5")
    with pytest.raises(ConfigError, match=r"model\.width: no such option"):
        preset("tiny", width=3)
