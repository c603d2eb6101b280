"""Hugging Face folders against `transformers`, both ways, every family (pytest -m transformers)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.models import Model
from rlhfjax.sampling import Sampling, generate
from tests.interop.kinds import KINDS, VOCAB
from tests.interop.test_hf import FAMILIES, random_params
from tests.needs import needs

pytestmark = [
    pytest.mark.transformers,
    needs("torch", "transformers", extra="transformers"),
]

NEW = 64


@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def transformers():
    import transformers

    return transformers


def build(torch, transformers, kind, auto="AutoModelForCausalLM", **more):
    """Returns a model of theirs, all parameters random: a tensor in the wrong place shows."""
    gain = 0.0 if kind.startswith("gemma") else 1.0  # Gemma multiplies by 1 + gain
    name, values = KINDS[kind]
    config = getattr(transformers, name)(
        **values, bos_token_id=None, eos_token_id=None, **more
    )
    model = getattr(transformers, auto).from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(gain if "norm" in name or "ln_" in name else 0.0, 0.2)
    return model


def tokens(rows, length, seed=1):
    return np.random.default_rng(seed).integers(1, VOCAB, (rows, length))


def logits(model, params, x):
    return np.asarray(
        jax.jit(lambda p, x: model.logits(p, model.hidden(p, x)))(
            params, jnp.asarray(x, jnp.int32)
        )
    )


def scores(model, params, x, segments):
    """Returns the scalars of last tokens, which `transformers` calls logits too."""
    run = jax.jit(
        lambda p, x, segments: model.scalar(p, model.last_hidden(p, x, segments))
    )
    return np.asarray(
        run(params, jnp.asarray(x, jnp.int32), jnp.asarray(segments, jnp.int32))
    )


def their_logits(torch, model, x):
    with torch.no_grad():
        return model(torch.tensor(x)).logits.float().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_is_ours_and_ours_is_theirs(
    torch, transformers, tmp_path, kind, optimized
):
    """Loaded: equal logits and the same greedy continuation. Saved again: the same bits."""
    theirs = build(torch, transformers, kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    model, params = load_hf(tmp_path / "theirs", None)
    x = tokens(3, 40)
    expected = their_logits(torch, theirs, x)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(model, params, x), expected, atol=1e-4)

    prompt = tokens(2, 8, seed=2)
    with torch.no_grad():
        greedy = theirs.generate(
            torch.tensor(prompt), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
    ours = generate(
        model,
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(prompt, jnp.int32),
        jnp.ones(prompt.shape, jnp.int32),
        jax.random.split(jax.random.key(0), 2),
        Sampling(max_new_tokens=NEW, eos_id=-1, pad_id=0, temperature=0.0),
    )
    np.testing.assert_array_equal(ours.tokens, greedy[:, 8:])

    save_hf(tmp_path / "ours", model, params)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    state = theirs.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    np.testing.assert_array_equal(their_logits(torch, again.eval(), x), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_exported_has_our_logits(torch, transformers, tmp_path, name):
    """Models made by us, layers stacked, in several files."""
    model = Model(dataclasses.replace(FAMILIES[name], scan_layers=True))
    params = random_params(model)
    save_hf(
        tmp_path / "x",
        model,
        params,
        shard_bytes=8000,
        special_ids={"pad": 0, "eos": 2},
    )
    assert (tmp_path / "x/model.safetensors.index.json").exists()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "x", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (
        theirs.config.pad_token_id,
        theirs.config.bos_token_id,
        theirs.config.eos_token_id,
    ) == (0, None, 2)
    x = tokens(3, 30)
    expected = logits(model, params, x)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        their_logits(torch, theirs.eval(), x), expected, atol=1e-4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_scores_the_same_there(torch, transformers, tmp_path, name):
    """Rows of several lengths, padded on the right; RMSNorm models lack the constant."""
    model = Model(FAMILIES[name], "scalar")
    params = random_params(model)
    params["head"]["kernel"] *= 5  # scores that differ
    folds = name in ("gpt2", "neox")
    save_hf(tmp_path / "x", model, params, special_ids={"pad": 0}, drop_bias=not folds)
    auto = transformers.AutoModelForSequenceClassification
    theirs, report = auto.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.num_labels == 1
    lengths = np.array([5, 30, 12, 1])
    mask = np.arange(30) < lengths[:, None]
    x = tokens(4, 30) * mask
    ours = scores(model, params, x, mask) - (0 if folds else params["head"]["bias"])
    with torch.no_grad():
        found = theirs.eval()(
            torch.tensor(x), attention_mask=torch.tensor(mask.astype(np.int64))
        ).logits
    assert found.shape == (4, 1) and np.std(ours) > 0.1
    np.testing.assert_allclose(found[:, 0].numpy(), ours, atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["llama", "smollm2", "qwen2", "gpt2", "gpt1", "pythia", "gemma3"]
)
def test_their_reward_scores_the_same_here(torch, transformers, tmp_path, kind):
    theirs = build(
        torch,
        transformers,
        kind,
        "AutoModelForSequenceClassification",
        num_labels=1,
        pad_token_id=0,
    )
    theirs.save_pretrained(tmp_path / "x")
    model, params = load_hf(tmp_path / "x", None)
    assert model.head == "scalar" and params["head"]["bias"] == 0
    x = tokens(3, 20)
    ours = scores(model, params, x, np.ones((3, 20)))
    np.testing.assert_allclose(ours, their_logits(torch, theirs, x)[:, 0], atol=1e-4)


def test_half_precision_comes_as_it_is_there(torch, transformers, tmp_path):
    theirs = build(torch, transformers, "smollm2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_hf(tmp_path / "theirs", None)
    save_hf(tmp_path / "ours", model, params, "bfloat16")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto"
    )
    assert again.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    wide = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32
    )
    x = tokens(2, 20)
    np.testing.assert_allclose(
        logits(model, params, x), their_logits(torch, wide.eval(), x), atol=1e-4
    )


def test_their_config_says_what_ours_said(transformers, tmp_path):
    """What we read is the same after `transformers` has loaded and saved it."""
    for name, config in FAMILIES.items():
        model = Model(config)
        save_hf(tmp_path / name, model, random_params(model))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / name)
        theirs.save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert config.positions == "learned" or written.keys() & {
            "rope_parameters",
            "rope_theta",
        }
        assert load_hf(tmp_path / name, None)[0].config.rope_theta == config.rope_theta
