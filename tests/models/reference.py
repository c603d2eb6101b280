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
    if config.scale_embedding:
        x = [np.sqrt(config.d_model) * y for y in x]
    if config.positions == "learned":
        x = [x[i] + embed["positions"][positions[i]] for i in range(t)]
    for i in range(config.n_layers):
        layer = p["backbone"]["layers"][f"layer_{i}"]
        kind = config.attention_pattern[i % len(config.attention_pattern)]
        x = LAYER[config.residual](layer, config, x, segments, positions, kind)
    if config.residual != "post_norm":
        x = [norm(p["backbone"]["norm"], config, y) for y in x]
    hidden = np.stack(x)
    return cap(
        hidden @ (embed["tokens"].T if config.tie_embeddings else p["head"]["kernel"]),
        config.logit_softcap,
    )


def cap(x, most):
    return x if most is None else most * np.tanh(x / most)


def pre_norm(p, config, x, *where):
    normed = [norm(p["norm_1"], config, y) for y in x]
    x = add(x, attention(p["attention"], config, normed, *where))
    return [y + mlp(p["mlp"], config, norm(p["norm_2"], config, y)) for y in x]


def post_norm(p, config, x, *where):
    x = add(x, attention(p["attention"], config, x, *where))
    x = [norm(p["norm_1"], config, y) for y in x]
    return [norm(p["norm_2"], config, y + mlp(p["mlp"], config, y)) for y in x]


def parallel(p, config, x, *where):
    normed = [norm(p["norm_1"], config, y) for y in x]
    mixed = attention(p["attention"], config, normed, *where)
    beside = [mlp(p["mlp"], config, norm(p["norm_2"], config, y)) for y in x]
    return add(add(x, mixed), beside)


def norm_after(p, config, x, *where):
    mixed = attention(p["attention"], config, x, *where)
    x = add(x, [norm(p["norm_1"], config, y) for y in mixed])
    return [y + norm(p["norm_2"], config, mlp(p["mlp"], config, y)) for y in x]


def sandwich(p, config, x, *where):
    normed = [norm(p["norm_1"], config, y) for y in x]
    mixed = attention(p["attention"], config, normed, *where)
    x = add(x, [norm(p["norm_2"], config, y) for y in mixed])
    inner = [mlp(p["mlp"], config, norm(p["norm_3"], config, y)) for y in x]
    return add(x, [norm(p["norm_4"], config, y) for y in inner])


def add(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


LAYER = {
    layer.__name__: layer
    for layer in (pre_norm, post_norm, parallel, norm_after, sandwich)
}


def norm(p, config, x):
    if config.norm == "layernorm":
        mean = sum(x) / len(x)
        variance = sum((x - mean) ** 2) / len(x)
        return (x - mean) / np.sqrt(variance + config.norm_eps) * p["scale"] + p["bias"]
    gain = 1 + p["scale"] if config.norm_plus_one else p["scale"]
    return x / np.sqrt((x**2).mean() + config.norm_eps) * gain


def affine(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def mlp(p, config, x):
    if config.n_experts:
        return mixture(p, config, x)
    if config.mlp == "gelu":
        return affine(p["down"], tanh_gelu(affine(p["up"], x)))
    if config.mlp == "geglu":
        gated = tanh_gelu(affine(p["gate"], x)) * affine(p["up"], x)
        return affine(p["down"], gated)
    if config.mlp == "gelu_exact":
        up = affine(p["up"], x)
        return affine(
            p["down"], np.array([u * (1 + math.erf(u / math.sqrt(2))) / 2 for u in up])
        )
    gate = affine(p["gate"], x)
    return affine(p["down"], gate / (1 + np.exp(-gate)) * affine(p["up"], x))


def mixture(p, config, x):
    """The k experts of the largest probabilities, one after the other; of equal ones the first."""
    logits = x @ p["router"]["kernel"]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    left, chosen = list(range(config.n_experts)), []
    for _ in range(config.experts_per_token):
        best = max(left, key=lambda e: (probabilities[e], -e))
        left.remove(best)
        chosen.append(best)
    total = sum(probabilities[e] for e in chosen) if config.normalize_routing else 1.0
    y = np.zeros(len(x))
    for e in chosen:
        gate, up, down = (p[name]["kernel"][e] for name in ("gate", "up", "down"))
        if config.mlp == "geglu":
            gated = tanh_gelu(x @ gate)
        else:
            gated = x @ gate / (1 + np.exp(-x @ gate))
        y += probabilities[e] / total * (gated * (x @ up) @ down)
    return y


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rope(x, position, config, kind):
    """Each pair (x_i, x_{i + n/2}) of the first n dimensions, a complex number, times exp(i
    position theta^(-2i/n)).
    """
    if config.positions != "rope" or kind == "full_no_rope":
        return x
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind == "window" and config.window_rope_theta:
        theta, scaling = config.window_rope_theta, None
    n = int(len(x) * config.rope_fraction)
    half = n // 2
    turned = x.copy()
    for i in range(half):
        frequency, factor = scaled(theta, i, n, scaling)
        z = complex(x[i], x[i + half]) * np.exp(1j * position * frequency) * factor
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def scaled(theta, i, n, scaling):
    """The frequency of pair i of n / 2, and the factor of its rotation."""
    frequency = theta ** (-2 * i / n)
    if scaling is None or scaling.kind == "none":
        return frequency, 1.0
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow, 1.0
    if scaling.kind == "llama3":
        wavelength, length = 2 * np.pi / frequency, scaling.original_length
        if wavelength > length / scaling.low_frequency:
            return slow, 1.0
        if wavelength < length / scaling.high_frequency:
            return frequency, 1.0
        smooth = (length / wavelength - scaling.low_frequency) / (
            scaling.high_frequency - scaling.low_frequency
        )
        return (1 - smooth) * slow + smooth * frequency, 1.0

    def dimension(turns):
        length = scaling.original_length / (turns * 2 * np.pi)
        return n * np.log(length) / (2 * np.log(theta))

    low = max(np.floor(dimension(scaling.beta_fast)), 0)
    high = min(np.ceil(dimension(scaling.beta_slow)), n - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    factor = scaling.attention_factor or 0.1 * np.log(scaling.factor) + 1
    return ramp * slow + (1 - ramp) * frequency, factor


def attention(p, config, x, segments, positions, kind):
    heads, per = config.n_heads, config.n_heads // config.kv_heads
    out = []
    for i, query_input in enumerate(x):
        seen = [
            j
            for j in range(i + 1)
            if j == i or (segments[j] == segments[i] and segments[j] > 0)
            if kind != "window" or i - j < config.window
        ]
        mixed = []
        for h in range(heads):
            q = rope(
                project(p, config, "query", query_input, h), positions[i], config, kind
            )
            keys = [
                rope(
                    project(p, config, "key", x[j], h // per),
                    positions[j],
                    config,
                    kind,
                )
                for j in seen
            ]
            scale = config.attention_scale or config.head_dim**-0.5
            scores = np.array([q @ k * scale for k in keys])
            scores = cap(scores, config.attention_softcap)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(
                sum(
                    w * project(p, config, "value", x[j], h // per)
                    for w, j in zip(weights, seen, strict=True)
                )
            )
        y = sum(mixed[h] @ p["out"]["kernel"][h] for h in range(heads))
        out.append(y + p["out"].get("bias", 0.0))
    return out


def project(p, config, name, x, h):
    """Head h of a projection, with the norm of queries and keys."""
    y = np.einsum("d,dhk->hk", x, p[name]["kernel"]) + p[name].get("bias", 0.0)
    if name == "value" or config.qk_norm == "none":
        return y[h]
    scale = p[f"{name}_norm"]
    if config.qk_norm == "head":
        return norm(scale, config, y[h])
    return norm(scale, config, y)[h]


def _float64(tree):
    return {
        k: _float64(v) if isinstance(v, dict) else np.asarray(v, np.float64)
        for k, v in tree.items()
    }
