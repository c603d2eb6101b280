"""Kernels for attention that others keep, against ours: equal at every position that is not
padding, gradients too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig, transformer
from rlhfjax.models.attention import Scoring, causal_attention
from rlhfjax.models.kernels import cudnn_attention, splash_attention
from rlhfjax.supervised import validate_kernel
from tests.models.families import random_params

KERNELS = {
    "cudnn": functools.partial(
        cudnn_attention, implementation="xla"
    ),  # the same call, by XLA in the place of cuDNN
    "splash": functools.partial(splash_attention, interpret=True),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(True, id="packed"),
        pytest.param(False, id="causal", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_is_our_attention_and_so_is_its_gradient(kernel, packed):
    """140 positions: two blocks of splash, the second one padded; two documents and padding; two
    queries a key head.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    q, weight = (jax.random.normal(key, (2, 4, 140, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 2, 140, 16)) for key in keys[2:])
    segments = (
        jnp.array([[1] * 50 + [2] * 85 + [0] * 5, [0] * 3 + [1] * 137])
        if packed
        else None
    )
    real = (segments > 0)[:, None, :, None] if packed else True

    def out(attend, *qkv):
        return jnp.where(real, attend(*qkv, segments), 0.0)

    @jax.jit
    def both(q, k, v):
        def value_and_pulled(attend):
            value, pull = jax.vjp(functools.partial(out, attend), q, k, v)
            return value, pull(weight)

        return value_and_pulled(KERNELS[kernel]), value_and_pulled(causal_attention)

    with jax.default_matmul_precision("highest"):
        (got, pulled), (expected, pulled_ours) = both(q, k, v)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(pulled, pulled_ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


WINDOWS = {
    "cudnn": {"window": 30, "scoring": Scoring(scale=0.4)},
    "splash": {"window": 30, "scoring": Scoring(scale=0.4, softcap=1.5)},
}


@pytest.mark.parametrize(
    "kernel", ["splash", pytest.param("cudnn", marks=pytest.mark.slow)]
)
def test_a_kernel_has_our_window_scale_and_cap(kernel):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 4, 140, 16))
    k, v = (jax.random.normal(key, (1, 2, 140, 16)) for key in keys[1:])

    @jax.jit
    def pulled(q, k, v):
        def gradients(attend):
            out = functools.partial(attend, **WINDOWS[kernel])
            value, pull = jax.vjp(out, q, k, v)
            return value, *pull(jnp.cos(value))

        return gradients(KERNELS[kernel]), gradients(causal_attention)

    with jax.default_matmul_precision("highest"):
        got, expected = pulled(q, k, v)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_sharded_model_by_splash_is_the_model_by_einsum(monkeypatch):
    """Batch and heads over four devices: every device runs the kernel on its own part."""
    monkeypatch.setitem(transformer.ATTENTION, "splash", KERNELS["splash"])
    config = TransformerConfig(
        vocab_size=50,
        d_model=32,
        n_layers=1,
        n_heads=4,
        d_ff=64,
        max_length=64,
        n_kv_heads=2,
    )
    params = random_params(Model(config))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, 50)
    expected = jax.jit(Model(config).hidden)(params, tokens)
    layout = make_layout(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    splash = Model(dataclasses.replace(config, attention="splash"))
    with layout.use():
        got = jax.jit(splash.hidden)(params, tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_what_a_kernel_cannot_do_is_one_line():
    plain = TransformerConfig(
        vocab_size=50, d_model=32, n_layers=1, n_heads=4, d_ff=64, max_length=64
    )
    splash, one = (
        dataclasses.replace(plain, attention="splash"),
        make_layout(MeshConfig(), jax.devices()[:1]),
    )
    with pytest.raises(
        ConfigError,
        match=r"sft: model.attention='splash' is a kernel of TPUs, and these devices are cpu",
    ):
        validate_kernel(splash, one, "sft")
    validate_kernel(plain, one, "sft")
    with pytest.raises(
        ConfigError,
        match=r"model.attention = 'splash' has no dropout: model.dropout is 0.1",
    ):
        dataclasses.replace(plain, attention="splash", dropout=0.1)
    with pytest.raises(
        ConfigError,
        match=r"model.attention = 'cudnn' is for model.dtype = 'bfloat16', not 'float32'",
    ):
        dataclasses.replace(plain, attention="cudnn")


def test_a_model_trained_with_a_kernel_is_read_where_there_is_none(tmp_path, caplog):
    """As one with our own attention, and not in silence."""
    tokenizer = train_sentencepiece(
        ["who knows which words a model knows"] * 9, tmp_path / "words", vocab_size=290
    )
    config = TransformerConfig(
        290, d_model=8, n_layers=1, n_heads=1, d_ff=8, max_length=8, attention="splash"
    )
    model = Model(config)
    params = random_params(model)
    store.save(tmp_path / "model", store.SavedModel(model, params, tokenizer))
    saved = store.load(tmp_path / "model", make_layout(MeshConfig(), jax.devices()[:1]))
    assert saved.model.config == dataclasses.replace(config, attention="einsum")
    jax.tree.map(np.testing.assert_array_equal, saved.params, params)
    assert (
        "these cpu devices have no 'splash' attention; read as 'einsum'" in caplog.text
    )
