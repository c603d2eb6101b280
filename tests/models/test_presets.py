"""Parameter counts of the presets, from shapes alone (175B parameters are counted, not made)."""

import math
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.models import Model
from rlhfjax.models.config import Attention, TransformerConfig
from rlhfjax.models.presets import PRESETS, preset
from rlhfjax.models.size import active_parameters, parameters

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


def wide(l, d, f, v, q, kv, embeddings=1, norms=2, qk=0):
    """A Llama's layers whose heads have q numbers of queries and kv of keys in all, not d: 2 d q of
    queries and out, 2 d kv of keys and values; qk gains of the norms of queries and keys.
    """
    layer = 2 * d * q + 2 * d * kv + 3 * d * f + norms * d + qk
    return l * layer + embeddings * v * d + d


def qwen3(l, d, f, heads, embeddings=1):
    """8 heads of keys, all of 128 numbers, whose norms have 128 gains each."""
    return wide(l, d, f, 151936, heads * 128, 8 * 128, embeddings, qk=2 * 128)


def experts(l, d, f, e):
    """3 d f of each expert and d of its column in the router, in place of one MLP."""
    return l * (e * (3 * d * f + d) - 3 * d * f)


QWEN3_MOE = wide(48, 2048, 768, 151936, 32 * 128, 4 * 128, embeddings=2, qk=2 * 128)
MIXTRAL = llama(32, 4096, 14336, 32000, 4, embeddings=2)

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
    "llama3.1-8b": (llama(32, 4096, 14336, 128256, 4, embeddings=2), 8_030_261_248),
    "llama3.2-1b": (llama(16, 2048, 8192, 128256, 4), 1_235_814_400),
    "llama3.2-3b": (llama(28, 3072, 8192, 128256, 3), 3_212_749_824),
    "pythia-1b": (neox(16, 2048, 50304), 1_011_781_632),
    "pythia-2.8b": (neox(32, 2560, 50304), 2_775_208_960),
    "pythia-6.9b": (neox(32, 4096, 50432), 6_857_302_016),
    "qwen2.5-0.5b": (qwen2(24, 896, 4864, 151936, 7), 494_032_768),
    "smollm2-135m": (llama(30, 576, 1536, 49152, 3), 134_515_008),
    "smollm2-360m": (llama(32, 960, 2560, 49152, 3), 361_821_120),
    "smollm2-1.7b": (llama(24, 2048, 8192, 49152), 1_711_376_384),
    "smollm3-3b": (llama(36, 2048, 11008, 128256, 4), 3_075_098_624),
    "qwen3-0.6b": (qwen3(28, 1024, 3072, 16), 596_049_920),
    "qwen3-1.7b": (qwen3(28, 2048, 6144, 16), 1_720_574_976),
    "qwen3-4b": (qwen3(36, 2560, 9728, 32), 4_022_468_096),
    "qwen3-8b": (qwen3(36, 4096, 12288, 32, embeddings=2), 8_190_735_360),
    "qwen3-30b-a3b": (QWEN3_MOE + experts(48, 2048, 768, 128), 30_532_122_624),
    "mixtral-8x7b": (MIXTRAL + experts(32, 4096, 14336, 8), 46_702_792_704),
    "mistral-7b": (llama(32, 4096, 14336, 32000, 4, embeddings=2), 7_241_732_096),
    "gemma-2b": (llama(18, 2048, 16384, 256000, 8), 2_506_172_416),
    "gemma2-2b": (wide(26, 2304, 9216, 256000, 2048, 1024, norms=4), 2_614_341_888),
    "gemma2-9b": (wide(42, 3584, 14336, 256000, 4096, 2048, norms=4), 9_241_705_984),
    "gemma3-1b": (
        wide(26, 1152, 6912, 262144, 1024, 256, norms=4, qk=2 * 256),
        999_885_952,
    ),
    "phi3-mini": (llama(32, 3072, 8192, 32064, embeddings=2), 3_821_079_552),
    # Norms of queries and keys over all heads: 2 d gains a layer.
    "olmo2-1b": (
        wide(16, 2048, 8192, 100352, 2048, 2048, embeddings=2, qk=2 * 2048),
        1_484_916_736,
    ),
    "olmo2-7b": (
        wide(32, 4096, 11008, 100352, 4096, 4096, embeddings=2, qk=2 * 4096),
        7_298_617_344,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    by_hand, total = COUNTS[name]
    assert count(preset(name, scan_layers=True)) == by_hand == total


@pytest.mark.parametrize(
    ("name", "active", "idle"),
    [
        # Published as 3.3 billion and 13 billion.
        ("qwen3-30b-a3b", 3_353_032_704, 48 * (128 - 8) * 3 * 2048 * 768),
        ("mixtral-8x7b", 12_879_925_248, 32 * (8 - 2) * 3 * 4096 * 14336),
    ],
)
def test_active_parameters_leave_out_the_experts_that_are_not_chosen(
    name, active, idle
):
    config = preset(name)
    assert active_parameters(config) == active == parameters(config) - idle
    dense = preset("small")
    assert active_parameters(dense) == parameters(dense) == COUNTS["small"][1]


def test_unrolled_layers_count_the_same():
    assert count(preset("small")) == COUNTS["small"][1]


def test_the_bands_of_gpt3_are_an_option():
    """Every second layer, from the second on (Brown et al. 2020, section 2.1); no parameters."""
    assert preset("gpt3-125m").kinds == ("full",)
    banded = preset("gpt3-125m", attention_pattern=("full", "window"), window=256)
    assert [banded.kind(i) for i in range(4)] == ["full", "window"] * 2
    assert count(banded) == COUNTS["gpt3-125m"][1]


# Families in which every head has 64 numbers.
OF_64 = ("gpt1", "gpt2", "smollm2", "qwen2.5", "llama3.2-1b")
OF_128 = ("llama", "qwen3", "mistral", "mixtral", "olmo2", "smollm3")


def count(config):
    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "heads", "width"),
    [
        *[(name, None, 64) for name in PRESETS if name.startswith(OF_64)],
        *[
            (name, None, 128)
            for name in PRESETS
            if name.startswith(OF_128) and not name.startswith(OF_64)
        ],
        *[(name, None, 256) for name in PRESETS if name.startswith("gemma")],
        ("phi3-mini", 32, 96),
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
    assert c.head_dim == width
    assert c.d_head == width or c.head_dim * c.n_heads == c.d_model
    assert heads is None or c.n_heads == heads


def test_every_option_of_the_architecture_is_some_presets():
    configs = [preset(name) for name in PRESETS]
    hints = get_type_hints(TransformerConfig)
    for name in ("positions", "norm", "mlp", "residual", "qk_norm"):
        assert {getattr(c, name) for c in configs} == set(get_args(hints[name]))
    assert {kind for c in configs for kind in c.kinds} == set(get_args(Attention))
    for name in (
        "n_kv_heads",
        "rope_theta",
        "rope_fraction",
        "norm_eps",
        "bias",
        "qkv_bias",
        "tie_embeddings",
        "rope_scaling",
        "window_rope_theta",
        "attention_softcap",
        "norm_plus_one",
        "scale_embedding",
        "logit_softcap",
        "n_experts",
        "experts_per_token",
        "router_loss",
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
