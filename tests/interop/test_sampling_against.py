"""Repetition penalty, min_p and several ends against `transformers` (pytest -m transformers)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.interop.hf import save_hf
from rlhfjax.models import Model
from rlhfjax.sampling import Sampling, generate
from rlhfjax.sampling.choose import keep_min_p, penalize_seen
from tests.interop.test_hf import FAMILIES, random_params
from tests.needs import needs

pytestmark = [
    pytest.mark.transformers,
    needs("torch", "transformers", extra="transformers"),
]
NEW = 26


def test_the_processors_give_our_logits():
    import torch
    import transformers

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 50)).astype(np.float32)
    ids = rng.integers(0, 50, (3, 20))
    seen = np.zeros((3, 50), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = theirs(torch.tensor(ids), torch.tensor(logits))
    got = penalize_seen(jnp.asarray(logits), jnp.asarray(seen), 1.3)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    expected = transformers.MinPLogitsWarper(0.2)(None, torch.tensor(logits))
    got = keep_min_p(jnp.asarray(logits), 0.2)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    assert 0 < np.isfinite(got).sum() < got.size


def test_greedy_responses_with_a_penalty_and_two_ends_are_theirs(tmp_path):
    import torch
    import transformers

    model = Model(FAMILIES["llama"])
    params = random_params(model)
    save_hf(tmp_path / "x", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    rows = np.random.default_rng(1).integers(2, model.config.vocab_size, (4, 6))

    def ours(**settings):
        sampling = Sampling(max_new_tokens=NEW, pad_id=0, temperature=0.0, **settings)
        samples = jax.jit(lambda *x: generate(model, *x, sampling))(
            params,
            jnp.asarray(rows, jnp.int32),
            jnp.ones(rows.shape, jnp.int32),
            jax.random.split(jax.random.key(0), len(rows)),
        )
        return np.asarray(samples.tokens)

    endless = ours(eos_id=-1, repetition_penalty=1.4)
    ends = [int(endless[0, 12]), int(endless[1, 20])]
    got = ours(eos_id=ends[0], extra_eos_ids=(ends[1],), repetition_penalty=1.4)
    expected = theirs.generate(
        torch.tensor(rows),
        attention_mask=torch.ones(rows.shape, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        repetition_penalty=1.4,
        eos_token_id=ends,
        pad_token_id=0,
    )
    expected = expected[:, rows.shape[1] :].numpy()
    width = expected.shape[1]
    np.testing.assert_array_equal(got[:, :width], expected)
    assert not got[:, width:].any() and (got == 0).any() and (got != endless).any()
