"""Training continues at a longer context, with rope scaling."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.interop.store import SavedModel
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.config import RopeScaling
from rlhfjax.stages import stage_config

ONE = make_layout(MeshConfig(), jax.devices()[:1])
SHORT, FACTOR = 32, 2
LONGER = {
    "max_length": SHORT * FACTOR,
    "rope_scaling": {"kind": "linear", "factor": float(FACTOR)},
}


def test_a_model_of_32_tokens_goes_on_at_64(finished, conversations, tmp_path, caplog):
    """The model that is left has the new options. At every second position it computes what the
    model of 32 tokens computes at all of its positions."""
    short = str(finished / "01_pretrain")
    text = {"spec": f"text:{conversations}/train.jsonl", "kind": "text", "split": "all"}
    config = stage_config(
        "pretrain",
        init_from=short,
        overrides=LONGER,
        sources=(text,),
        eval_sources=(text,),
        eval_batches=1,
        length=SHORT * FACTOR,
        batch_size=8,
        steps=1,
        optim={"learning_rate": 0.0},
    )
    with caplog.at_level(logging.INFO, "rlhfjax"):
        recipe.run(config, tmp_path / "longer")
    before, after = (store.load(place, ONE) for place in (short, tmp_path / "longer"))
    assert after.model.config.max_length == SHORT * FACTOR
    assert after.model.config.rope_scaling == RopeScaling("linear", float(FACTOR))
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    change = "max_length=64 (was 32), rope_scaling.kind=linear (was none), "
    assert f"{short}: read with {change}" in caplog.text
    assert np.abs(hidden(before, 1) - hidden(after, 1)).max() > 1e-3
    np.testing.assert_allclose(hidden(before, 1), hidden(after, FACTOR), atol=1e-5)


def hidden(saved: SavedModel, stride: int):
    """Returns the last hidden states of 32 tokens at positions that are `stride` apart."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, saved.model.config.vocab_size, (2, SHORT))
    positions = jnp.broadcast_to(jnp.arange(SHORT) * stride, tokens.shape)
    ids = jnp.ones(tokens.shape, jnp.int32)
    return saved.model.hidden(
        saved.params, jnp.asarray(tokens, jnp.int32), positions.astype(jnp.int32), ids
    )


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"mlp": "geglu"}, "x: mlp belongs to the parameters: accepted are attention, "),
        ({}, {"norm_eps": 1e-3}, "x: norm_eps belongs"),
        ({"positions": "learned"}, {"max_length": 64}, "x: max_length would make another model"),
        ({}, {"rope_scaling": {"kind": "dynamic"}}, "x.rope_scaling.kind='dynamic'"),
    ],
)  # fmt: skip
def test_what_a_stage_may_not_change(config, changes, message):
    tiny = TransformerConfig(
        vocab_size=8,
        d_model=8,
        n_layers=1,
        n_heads=2,
        d_ff=8,
        max_length=SHORT,
        **config,
    )
    with pytest.raises(ConfigError, match=message):
        store.overridden(Model(tiny), changes, "x")


def test_what_a_stage_may_change_leaves_the_parameters():
    tiny = TransformerConfig(
        vocab_size=8, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_length=SHORT
    )
    changes = LONGER | {"rope_theta": 5e5, "dtype": "bfloat16", "mlp": tiny.mlp}
    other = store.overridden(Model(tiny), changes, "x")
    assert (other.config.rope_theta, other.config.dtype) == (5e5, "bfloat16")
    assert other.shapes() == Model(tiny).shapes()
