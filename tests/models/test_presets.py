"""Parameter counts of the presets, from shapes alone (175B parameters are counted, not made)."""

import math

import jax
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.models import Model
from rlhfjax.models.presets import PRESETS, preset

# 12 l d^2 + 13 l d + (v + t) d + 2 d for the GPTs (tied embeddings, biases); GPT-2's published 124,439,808 is one.
COUNTS = {
    "tiny": 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 4096 * 128 + 128,
    "small": 6 * (4 * 384**2 + 3 * 384 * 1024 + 2 * 384) + 8192 * 384 + 384,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "llama2-7b": 6_738_415_616,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    assert count(preset(name, scan_layers=True)) == COUNTS[name]


def test_unrolled_layers_count_the_same():
    assert count(preset("small")) == COUNTS["small"]


def count(config):
    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt")])
def test_gpt_counts_follow_the_formula(name):
    c = preset(name)
    n, d = c.n_layers, c.d_model
    assert COUNTS[name] == 12 * n * d**2 + 13 * n * d + (c.vocab_size + c.max_length) * d + 2 * d


def test_changes_and_their_errors():
    assert preset("gpt2-124m", dropout=0.0).dropout == 0.0
    with pytest.raises(ConfigError, match="gpt5"):
        preset("gpt5")
    with pytest.raises(ConfigError, match="width is not a field"):
        preset("tiny", width=3)
