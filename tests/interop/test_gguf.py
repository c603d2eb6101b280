"""GGUF import against llama.cpp's computation on the same file, in plain numpy float64.

llama.cpp has another order of the rows of Q and K, and interleaved RoPE.
"""

import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.gguf import half_split, load_gguf
from rlhfjax.models import Model, TransformerConfig

D, FF, LAYERS, HEADS, EPS = 32, 64, 2, 4, 0.01
LLAMA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 48,
    "llama.embedding_length": D,
    "llama.feed_forward_length": FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.layer_norm_rms_epsilon": EPS,
}
GROUPED = LLAMA | {
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 500.0,
    "llama.rope.dimension_count": 8,
    "llama.vocab_size": 61,
}
# Heads wider than d_model / n_heads, one key head each; the vocabulary is the tokenizer's.
WIDE = LLAMA | {
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "tokenizer.ggml.tokens": [f"<{i}>" for i in range(61)],
}
PASSAGE = np.random.default_rng(1).integers(0, 61, 40)


def permute(w, n_head):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:])
        .swapaxes(1, 2)
        .reshape(w.shape)
    )


def weights(n_kv, width, tied):
    """Returns random weights by name; Q and K are made in half-split order and permuted."""
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return rng.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def scale():
        return rng.uniform(0.5, 1.5, D).astype(np.float32)

    out = {"token_embd.weight": matrix(61, D), "output_norm.weight": scale()}
    if not tied:
        out["output.weight"] = matrix(61, D)
    for i in range(LAYERS):
        layer = {
            "attn_norm": scale(),
            "attn_q": permute(matrix(HEADS * width, D), HEADS),
            "attn_k": permute(matrix(n_kv * width, D), n_kv),
            "attn_v": matrix(n_kv * width, D),
            "attn_output": matrix(D, HEADS * width),
            "ffn_norm": scale(),
            "ffn_gate": matrix(FF, D),
            "ffn_up": matrix(FF, D),
            "ffn_down": matrix(D, FF),
        }
        out |= {f"blk.{i}.{name}.weight": w for name, w in layer.items()}
    return out


def write(
    path,
    metadata,
    tensors,
    quantized=(),
    architecture="llama",
    order=gguf.GGUFEndian.LITTLE,
):
    """Writes a GGUF file; the tensors named in `quantized` as Q8_0. Returns its path."""
    writer = gguf.GGUFWriter(path, architecture, endianess=order)
    kinds = {
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for name, w in tensors.items():
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q8_0(w):
    """Returns w rounded as in Q8_0 (ggml's quantize_row_q8_0).

    Every 32 numbers share d = max |w| / 127, kept in half precision.
    """
    blocks = w.reshape(-1, 32)
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    return (np.round(blocks / d) * d.astype(np.float16).astype(np.float32)).reshape(
        w.shape
    )


def llama_cpp(w, tokens, n_kv, width, theta):
    """Returns logits [t, v] as llama.cpp does: Q and K as in the file, neighbors rotated."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    t, per = len(tokens), HEADS // n_kv

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale

    def rope(x):  # [t, heads, width]
        angle = np.arange(t)[:, None] * theta ** (-np.arange(0, width, 2) / width)
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["token_embd.weight"][tokens]
    for i in range(LAYERS):
        layer = {
            name: w[f"blk.{i}.{name}.weight"]
            for name in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        y = norm(x, w[f"blk.{i}.attn_norm.weight"])
        q = rope((y @ layer["attn_q"].T).reshape(t, HEADS, width))
        k = rope((y @ layer["attn_k"].T).reshape(t, n_kv, width))
        v = (y @ layer["attn_v"].T).reshape(t, n_kv, width)
        heads = []
        for h in range(HEADS):
            scores = q[:, h] @ k[:, h // per].T / np.sqrt(width)
            e = np.exp(np.where(np.tri(t, dtype=bool), scores, -np.inf))
            heads.append(e / e.sum(-1, keepdims=True) @ v[:, h // per])
        x = x + np.concatenate(heads, -1) @ layer["attn_output"].T
        y = norm(x, w[f"blk.{i}.ffn_norm.weight"])
        gate = y @ w[f"blk.{i}.ffn_gate.weight"].T
        x = (
            x
            + gate
            / (1 + np.exp(-gate))
            * (y @ w[f"blk.{i}.ffn_up.weight"].T)
            @ w[f"blk.{i}.ffn_down.weight"].T
        )
    return (
        norm(x, w["output_norm.weight"])
        @ w.get("output.weight", w["token_embd.weight"]).T
    )


def ours(config, params, tokens):
    model = Model(config)
    run = jax.jit(
        lambda params, tokens: model.logits(params, model.hidden(params, tokens))
    )
    return np.asarray(run(params, jnp.asarray(tokens, jnp.int32)[None]), np.float64)[0]


def nats(logits, tokens):
    """Returns the mean negative log-likelihood of every token but the first, in nats."""
    logits = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    return float(
        np.mean(
            np.log(np.exp(logits).sum(-1))
            - logits[np.arange(len(tokens) - 1), tokens[1:]]
        )
    )


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Returns weights with grouped keys and a tied output, the loaded model, and our logits."""
    w = weights(n_kv=2, width=8, tied=True)
    path = write(tmp_path_factory.mktemp("gguf") / "grouped.gguf", GROUPED, w)
    config, params = load_gguf(path)
    return w, config, params, ours(config, params, PASSAGE)


def test_pitfall_31_gguf_queries_and_keys_are_put_back_in_our_order(grouped):
    w, _, _, logits = grouped
    theirs = llama_cpp(w, PASSAGE, n_kv=2, width=8, theta=500.0)
    assert nats(logits, PASSAGE) == pytest.approx(nats(theirs, PASSAGE), abs=1e-5)
    np.testing.assert_allclose(logits, theirs, atol=1e-4)


def test_half_split_by_hand():
    """llama.cpp has rows 0, 2, 1, 3 of heads of four, and rows 0, 4, 1, 5, ...

    Of heads of eight.
    """
    rows = np.arange(8.0, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(half_split(rows[[0, 2, 1, 3, 4, 6, 5, 7]], 2), rows)
    np.testing.assert_array_equal(half_split(rows[[0, 4, 1, 5, 2, 6, 3, 7]], 1), rows)


def test_the_config_and_the_tree_are_those_of_the_file(grouped):
    _, config, params, _ = grouped
    assert config == TransformerConfig(
        61, D, LAYERS, HEADS, FF, 48, n_kv_heads=2, rope_theta=500.0, norm_eps=EPS
    )
    init = jax.eval_shape(Model(config).init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), init
    )
    assert all(
        type(x) is np.ndarray for x in jax.tree.leaves(params)
    )  # nothing is left of the mapped file


def test_quantized_untied_and_wide_heads(tmp_path):
    """Q8_0, an untied output, heads wider than d_model / n_heads, and absent optional keys."""
    w = weights(n_kv=4, width=16, tied=False)
    quantized = [name for name in w if "norm" not in name]
    config, params = load_gguf(write(tmp_path / "wide.gguf", WIDE, w, quantized))
    assert config == TransformerConfig(
        61,
        D,
        LAYERS,
        HEADS,
        FF,
        48,
        n_kv_heads=4,
        d_head=16,
        norm_eps=EPS,
        tie_embeddings=False,
    )
    rounded = {name: q8_0(x) if name in quantized else x for name, x in w.items()}
    theirs = llama_cpp(rounded, PASSAGE, n_kv=4, width=16, theta=10000.0)
    logits = ours(config, params, PASSAGE)
    np.testing.assert_allclose(logits, theirs, atol=1e-4)
    assert nats(logits, PASSAGE) == pytest.approx(nats(theirs, PASSAGE), abs=1e-5)
    assert (
        np.abs(llama_cpp(w, PASSAGE, n_kv=4, width=16, theta=10000.0) - theirs).max()
        > 1e-3
    )  # rounding shows


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "llama.rope.scaling.type",
            "linear",
            "cannot do what llama.rope.scaling.type = 'linear' says",
        ),
        ("llama.rope.scaling.factor", 4.0, "llama.rope.scaling.factor = 4.0"),
        ("llama.expert_count", 8, "llama.expert_count = 8"),
        (
            "llama.attention.sliding_window",
            4096,
            "llama.attention.sliding_window = 4096",
        ),
        (
            "llama.rope.dimension_count",
            4,
            "llama.rope.dimension_count is 4, and the width of a head is 8",
        ),
        (
            "llama.attention.head_count_kv",
            3,
            "model.n_kv_heads = 3 does not divide model.n_heads = 4",
        ),
        (
            "llama.attention.head_count_kv",
            [2, 2],
            r"head_count_kv is \[2, 2\]: expected one int",
        ),
        (
            "llama.vocab_size",
            62,
            r"token_embd.weight is \[61, 32\], and by the metadata \[62, 32\]",
        ),
        ("llama.feed_forward_length", None, "there is no llama.feed_forward_length"),
        ("llama.block_count", 3, "there is no tensor blk.2.attn_norm.weight"),
        ("general.type", "adapter", "general.type is 'adapter': accepted is 'model'"),
        ("split.count", 2, "split.count is 2: merge the parts first"),
    ],
)
def test_metadata_that_our_transformer_cannot_express_are_refused(
    tmp_path, grouped, key, value, message
):
    metadata = {k: v for k, v in (GROUPED | {key: value}).items() if v is not None}
    with pytest.raises(CheckpointError, match=rf"^\S*x\.gguf: .*{message}"):
        load_gguf(write(tmp_path / "x.gguf", metadata, grouped[0]))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.1.attn_k.weight", None, "there is no tensor blk.1.attn_k.weight"),
        (
            "blk.1.attn_k.weight",
            np.zeros((32, 32), np.float32),
            r"attn_k.weight is \[32, 32\], .* \[16, 32\]",
        ),
        (
            "blk.0.attn_q.bias",
            np.zeros(32, np.float32),
            "no place for the tensor blk.0.attn_q.bias",
        ),
        (
            "rope_freqs.weight",
            np.ones(4, np.float32),
            "rope_freqs.weight: it scales the frequencies of RoPE",
        ),
        (
            "blk.0.ffn_up.weight",
            np.zeros((64, 32), np.int32),
            "blk.0.ffn_up.weight is of type I32",
        ),
    ],
)
def test_tensors_other_than_the_expected_are_refused(
    tmp_path, grouped, name, tensor, message
):
    tensors = {k: v for k, v in (grouped[0] | {name: tensor}).items() if v is not None}
    with pytest.raises(CheckpointError, match=rf"^\S*x\.gguf: .*{message}"):
        load_gguf(write(tmp_path / "x.gguf", GROUPED, tensors))


def test_values_that_change_nothing_are_accepted(tmp_path, grouped):
    more = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "general.name": "tiny",
    }
    assert (
        load_gguf(write(tmp_path / "x.gguf", GROUPED | more, grouped[0]))[0]
        == grouped[1]
    )


def test_other_files_are_refused(tmp_path, grouped):
    other = write(tmp_path / "other.gguf", {}, {}, architecture="qwen2")
    with pytest.raises(
        CheckpointError,
        match=r"other.gguf: general.architecture is 'qwen2': accepted is 'llama'",
    ):
        load_gguf(other)
    swapped = write(
        tmp_path / "swapped.gguf", GROUPED, grouped[0], order=gguf.GGUFEndian.BIG
    )
    with pytest.raises(
        CheckpointError, match=r"swapped.gguf: its bytes are in the other order"
    ):
        load_gguf(swapped)
    with pytest.raises(CheckpointError, match=r"none.gguf: there is no such file"):
        load_gguf(tmp_path / "none.gguf")
    whole = write(tmp_path / "whole.gguf", GROUPED, grouped[0]).read_bytes()
    broken = tmp_path / "broken.gguf"
    for content in (
        b"",
        b"GG",
        b"a text that is no model\n",
        *(whole[:n] for n in (4, 9, 30, 100, 700, len(whole) - 40)),
    ):
        broken.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"broken.gguf: not a whole GGUF file: ."
        ) as caught:
            load_gguf(broken)
        assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError,
        match=r"x.gguf: the gguf package is not installed; pip install 'rlhfjax\[gguf\]'",
    ):
        load_gguf("x.gguf")
