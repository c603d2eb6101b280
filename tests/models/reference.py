"""The Transformer again, in plain numpy float64, one token at a time: slow, short and written from
the papers alone.
"""

import math

import numpy as np


def forward(params, config, row, segments=None, positions=None):
    """Logits [t, v] of one row of tokens.

    `segments` as in the models; positions count within each segment.
    """
    p = _float64(params)
    t = len(row)
    segments = np.ones(t, int) if segments is None else np.asarray(segments)
    if positions is None:
        positions = [
            int((segments[:i] == segments[i]).sum()) if segments[i] else 0
            for i in range(t)
        ]
    embed = p["backbone"]["embed"]
    x = [embed["tokens"][token].copy() for token in row]
    if config.positions == "learned":
        x = [x[i] + embed["positions"][positions[i]] for i in range(t)]
    for i in range(config.n_layers):
        layer = p["backbone"]["layers"][f"layer_{i}"]
        x = LAYER[config.residual](layer, config, x, segments, positions)
    if config.residual != "post_norm":
        x = [norm(p["backbone"]["norm"], config, y) for y in x]
    hidden = np.stack(x)
    return hidden @ (
        embed["tokens"].T if config.tie_embeddings else p["head"]["kernel"]
    )


def pre_norm(p, config, x, segments, positions):
    mixed = attention(
        p["attention"],
        config,
        [norm(p["norm_1"], config, y) for y in x],
        segments,
        positions,
    )
    x = [y + z for y, z in zip(x, mixed, strict=True)]
    return [y + mlp(p["mlp"], config, norm(p["norm_2"], config, y)) for y in x]


def post_norm(p, config, x, segments, positions):
    mixed = attention(p["attention"], config, x, segments, positions)
    x = [norm(p["norm_1"], config, y + z) for y, z in zip(x, mixed, strict=True)]
    return [norm(p["norm_2"], config, y + mlp(p["mlp"], config, y)) for y in x]


def parallel(p, config, x, segments, positions):
    mixed = attention(
        p["attention"],
        config,
        [norm(p["norm_1"], config, y) for y in x],
        segments,
        positions,
    )
    return [
        y + z + mlp(p["mlp"], config, norm(p["norm_2"], config, y))
        for y, z in zip(x, mixed, strict=True)
    ]


LAYER = {"pre_norm": pre_norm, "post_norm": post_norm, "parallel": parallel}


def norm(p, config, x):
    if config.norm == "layernorm":
        mean = sum(x) / len(x)
        variance = sum((x - mean) ** 2) / len(x)
        return (x - mean) / np.sqrt(variance + config.norm_eps) * p["scale"] + p["bias"]
    return x / np.sqrt(sum(x**2) / len(x) + config.norm_eps) * p["scale"]


def affine(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def mlp(p, config, x):
    if config.mlp == "gelu":  # the tanh form of GPT-2
        up = affine(p["up"], x)
        return affine(
            p["down"],
            0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))),
        )
    if config.mlp == "gelu_exact":
        up = affine(p["up"], x)
        return affine(
            p["down"], np.array([u * (1 + math.erf(u / math.sqrt(2))) / 2 for u in up])
        )
    gate = affine(p["gate"], x)
    return affine(p["down"], gate / (1 + np.exp(-gate)) * affine(p["up"], x))


def rope(x, position, config):
    """Each pair (x_i, x_{i + n/2}) of the first n dimensions, a complex number, times exp(i
    position theta^(-2i/n)).
    """
    n = int(len(x) * config.rope_fraction)
    half = n // 2
    turned = x.copy()
    for i in range(half):
        z = complex(x[i], x[i + half]) * np.exp(
            1j * position * config.rope_theta ** (-2 * i / n)
        )
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def attention(p, config, x, segments, positions):
    heads, per = config.n_heads, config.n_heads // config.kv_heads
    out = []
    for i, query_input in enumerate(x):
        seen = [
            j
            for j in range(i + 1)
            if j == i or (segments[j] == segments[i] and segments[j] > 0)
        ]
        mixed = []
        for h in range(heads):
            q = project(p["query"], query_input, h)
            keys = [project(p["key"], x[j], h // per) for j in seen]
            if config.positions == "rope":
                q = rope(q, positions[i], config)
                keys = [
                    rope(k, positions[j], config)
                    for k, j in zip(keys, seen, strict=True)
                ]
            scores = np.array([q @ k / np.sqrt(config.head_dim) for k in keys])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(
                sum(
                    w * project(p["value"], x[j], h // per)
                    for w, j in zip(weights, seen, strict=True)
                )
            )
        y = sum(mixed[h] @ p["out"]["kernel"][h] for h in range(heads))
        out.append(y + p["out"].get("bias", 0.0))
    return out


def project(p, x, h):
    return x @ p["kernel"][:, h] + (p["bias"][h] if "bias" in p else 0.0)


def _float64(tree):
    return {
        k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64)
        for k, v in tree.items()
    }
