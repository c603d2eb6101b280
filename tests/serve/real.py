"""A tiny model with an opinion, served by the engine."""

import jax

from rlhfjax.models import Model
from rlhfjax.models.config import TransformerConfig
from rlhfjax.sampling import Sampling
from rlhfjax.serve.engine import Engine
from rlhfjax.serve.served import Served


def tiny_model(vocab_size, length=128):
    config = TransformerConfig(
        vocab_size=vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=2,
        d_ff=64,
        max_length=length,
        tie_embeddings=False,
        init_std=0.5,
    )
    model = Model(config)
    return model, model.init(jax.random.key(0))


def real_served(words, *, name="tiny", lanes=4, length=128, queue=64, chunk=16):
    model, params = tiny_model(words.vocab_size, length)
    engine = Engine(model, params, lanes=lanes, length=length, queue=queue, chunk=chunk)
    engine.warm_up()
    sampling = Sampling(max_new_tokens=16, eos_id=words.eos_id, pad_id=words.pad_id)
    return Served(name, engine, words, sampling)
