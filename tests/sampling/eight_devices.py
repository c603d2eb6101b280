"""Run as a program, on 8 devices that XLA makes of one CPU: sampling on meshes against one device,
a JSON line each.

tokens     are they equal to one device's
logprobs   the largest difference, nats
lengths    how many different lengths the responses have
whole      does any device hold an array with the shape of one layer's whole cache
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.sampling import Sampling, generate
from tests.models.families import shaken
from tests.sampling.test_generate import PAD, keys, left_padded

CONFIG = TransformerConfig(
    vocab_size=16,
    d_model=32,
    n_layers=1,
    n_heads=8,
    n_kv_heads=4,
    d_ff=48,
    max_length=32,
    init_std=0.3,
)
PROMPTS, PLACES, NEW, EOS = 16, 15, 9, 7
CASES = (
    ({"decode_batch": 8}, {"data": 8}),
    ({"samples_per_prompt": 2}, {"data": 2, "tensor": 4}),
    (
        {"samples_per_prompt": 2, "decode_batch": 16},
        {"data": 1, "fsdp": 4, "tensor": 2},
    ),
)


def main():
    model = Model(CONFIG)
    params = shaken(model.init(jax.random.key(0)))
    tokens, segments = left_padded((7, 1, 4, 6, 2, 5, 3, 7) * 2)
    prompts = tokens % CONFIG.vocab_size, segments
    for way, mesh in CASES:
        drawn = keys(PROMPTS * way.get("samples_per_prompt", 1))

        def sample(*x, way=way):
            settings = {"max_new_tokens": NEW, "eos_id": EOS, "pad_id": PAD}
            sampling = Sampling(temperature=4.0, **settings, **way)
            return generate(model, *x, sampling)

        one = jax.device_get(jax.jit(sample)(params, *prompts, drawn))
        layout = make_layout(MeshConfig(**mesh))
        placed = jax.tree.map(
            lambda x, n, to=layout: jax.device_put(x, to.sharding(*n)),
            params,
            model.axes(),
        )
        rows = [jax.device_put(x, layout.sharding("batch")) for x in (*prompts, drawn)]
        with layout.use():
            program = jax.jit(sample).lower(placed, *rows).compile()
        got = jax.device_get(program(placed, *rows))
        line = {
            "tokens": bool((got.tokens == one.tokens).all()),
            "logprobs": float(np.abs(got.logprobs - one.logprobs).max()),
            "lengths": len(set(one.mask.sum(1).tolist())),
            "whole": f"f32[{way.get('decode_batch') or len(drawn)},4,{PLACES},4]"
            in program.as_text(),
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
