"""GGUF import against llama.cpp's computation on the same file, in plain numpy float64.

llama.cpp has another order of the rows of Q and K, and interleaved RoPE.
"""

import os
import struct
import sys
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.gguf import describe_gguf, half_split, load_gguf, neighbors
from rlhfjax.interop.gguf_file import open_gguf
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
        bool: gguf.GGUFValueType.BOOL,
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
    """llama.cpp has 0, 2, 1, 3 of a head of four, and 0, 4, 1, 5, ... of a head of eight."""
    heads = np.arange(8.0, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(half_split(heads[:, [0, 2, 1, 3]]), heads)
    head = np.arange(8.0, dtype=np.float32)
    np.testing.assert_array_equal(half_split(head[[0, 4, 1, 5, 2, 6, 3, 7]]), head)
    np.testing.assert_array_equal(neighbors(half_split(heads)), heads)


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
            "longrope",
            "cannot do what llama.rope.scaling.type = 'longrope' says; accepted is 'none'",
        ),
        ("llama.rope.scaling.factor", 0.5, "llama.rope.scaling.factor = 0.5"),
        ("llama.rope.scaling.factor", float("nan"), "rope.scaling.factor = nan"),
        ("llama.rope.scaling.attn_factor", 2.0, "accepted is 1.0 without yarn"),
        ("llama.expert_count", 8, "model.n_experts is llama.expert_count"),
        ("llama.attention.scale", 0.5, "llama.attention.scale = 0.5"),
        (
            "llama.rope.dimension_count",
            4,
            "llama.rope.dimension_count = 4 says; accepted is the width of a head, 8",
        ),
        (
            "llama.attention.head_count_kv",
            3,
            "model.n_kv_heads = 3 does not divide model.n_heads = 4",
        ),
        (
            "llama.attention.head_count_kv",
            [2, 2],
            r"head_count_kv is \[2, 2\]: expected int",
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
        ("split.count", "2", "split.count is '2': merge the parts first"),
        ("general.alignment", 0, "general.alignment is 0: accepted are powers of 2"),
        ("general.alignment", 24, "general.alignment is 24: accepted are powers of 2"),
        ("llama.block_count", 2.0, r"block_count is 2.0: expected int"),
        ("llama.block_count", 1024, "there is no tensor blk.1023.attn_norm.weight"),
        ("llama.context_length", 0, r"model.max_length=0.* is llama.context_length\)"),
        ("llama.attention.head_count", 5, "accepted is the width of a head, 6"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "norm_eps=nan: exp"),
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
            "there is no tensor blk.0.attn_k.bias",
        ),
        (
            "rope_freqs.weight",
            np.full(4, 3, np.float32),
            "rope_freqs.weight is not that of Llama 3.1 with the factor 3.0",
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
    other = write(tmp_path / "other.gguf", {}, {}, architecture="mamba")
    with pytest.raises(
        CheckpointError,
        match=r"general.architecture is 'mamba' \(it has state-space layers\): accepted",
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


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(body: bytes, tensors=0, keys=0, magic=b"GGUF", version=3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    """Returns a file whose one value is an array."""
    return header(text(b"k") + struct.pack("<IIQ", 9, kind, count) + body, keys=1)


def tensor(*dims: int, name=b"w", code=0, offset=0) -> bytes:
    """Returns a file of one tensor, without its data."""
    axes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return header(text(name) + axes + struct.pack("<IQ", code, offset), tensors=1)


MANY = 2**63
PROMISES = {
    "the list of 9223372036854775808 tensors": header(b"", tensors=MANY),
    "the list of 0 tensors and 9223372036854775808 k": header(b"", keys=MANY),
    "65537 keys: accepted are 65536": header(bytes(13 * 65537), keys=65537),
    "key 0 needs": header(struct.pack("<QQ", MANY, 0), keys=1),
    "k needs 9223372036854775808": header(
        text(b"k") + struct.pack("<IQ", 8, MANY), keys=1
    ),
    "k, 9223372036854775808 elements, needs": array(8, MANY),
    "k, 4611686018427387904 elements, needs": array(0, 2**62),
    "k needs 9223372036854775816 ": array(8, 1, struct.pack("<Q", MANY)),
    "k is an array of arrays": array(9, MANY, struct.pack("<IQ", 9, MANY)),
    "k is an array of the unknown type 77": array(77, 1),
    "k: all arrays together": array(0, 2**21, bytes(2**21)),
    "k is of the unknown type 13": header(text(b"k") + bytes([13, 0, 0, 0]), keys=1),
    "k is not UTF-8": header(text(b"k") + struct.pack("<I", 8) + text(b"\xff"), keys=1),
    "k is there twice": header(
        (text(b"k") + struct.pack("<IB", 0, 1)) * 2 + bytes(9), keys=2
    ),
    "version 1 of GGUF": header(b"", version=1),
    "version 0 of GGUF": header(b"", version=0),
    "it starts with b'GGML'": header(b"", magic=b"GGML"),
    "w has 5 axes: accepted are 4": tensor(1, 1, 1, 1, 1),
    "w has 4294967295 axes": header(
        text(b"w") + struct.pack("<IIQ", 2**32 - 1, 0, 0), tensors=1
    ),
    "w has an axis of length 0": tensor(0, 2**62),
    "w needs 18446744073709551616 bytes": tensor(2**62),
    "w needs 85070591730234615865843651857942052864": tensor(2**62, 2**62, 1, 1),
    "w needs 4 bytes, and 0 are left": tensor(1, offset=2**62),
    "w is of the unknown type 999": tensor(1, code=999),
    "w has rows of 33: Q8_0 has blocks of 32": tensor(33, code=8),
    "a tensor is called": tensor(1, name=b"w" * 129),
    "a tensor is called 'w.nw'": tensor(1, name=b"w\nw"),
    "w starts at 4: must be a multiple of 32": tensor(1, offset=4) + bytes(128),
}


@pytest.mark.parametrize("message", PROMISES)
def test_what_a_file_promises_is_compared_with_what_it_holds(message, tmp_path):
    """At once, where the gguf package's reader hangs or fills the memory."""
    path = tmp_path / "x.gguf"
    path.write_bytes(PROMISES[message])
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"^\S*x\.gguf: .*{message}") as caught:
        open_gguf(path)
    assert time.process_time() - start < 1
    assert "\n" not in str(caught.value)


def test_a_tensor_within_another_and_one_that_is_there_twice(tmp_path, grouped):
    whole = write(tmp_path / "x.gguf", GROUPED, grouped[0]).read_bytes()
    name = b"blk.0.attn_k.weight"
    info = whole.index(name) + len(name) + 4 + 16 + 4  # axes, their lengths, the type
    for content, message in (
        (whole[:info] + bytes(8) + whole[info + 8 :], "overlaps"),
        (whole.replace(b"blk.1.attn_k", b"blk.0.attn_k"), f"{name.decode()} is there"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_gguf(tmp_path / "x.gguf")


def test_any_changed_or_missing_byte_gives_a_config_or_one_line(tmp_path, grouped):
    path = write(tmp_path / "x.gguf", GROUPED, grouped[0])
    whole = path.read_bytes()
    end = whole.index(b"blk.0.attn_q")
    numbers = iter(np.random.default_rng(0).integers(0, 256, 10**5).tolist())
    contents = [whole[:n] for n in range(0, end, 3)]
    for i in range(end):
        contents.append(whole[:i] + bytes([next(numbers)]) + whole[i + 1 :])
        contents.append(whole[:i] + struct.pack("<Q", 2**62) + whole[i + 8 :])
    for content in contents[::13]:
        path.write_bytes(content)
        try:
            assert isinstance(describe_gguf(path), TransformerConfig)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_the_metadata_and_tensors_are_those_of_the_gguf_package(tmp_path, grouped):
    path = write(tmp_path / "x.gguf", WIDE, grouped[0], ["token_embd.weight"])
    metadata, tensors = open_gguf(path)
    theirs = gguf.GGUFReader(path)
    for key, value in metadata.items():
        texts = value and isinstance(value, list) and isinstance(value[0], bytes)
        value = [text.decode() for text in value] if texts else value
        assert value == theirs.fields[key].contents()
    assert len(tensors) == len(theirs.tensors)
    for other in theirs.tensors:
        found = tensors[other.name]
        assert (found.kind, found.shape) == (other.tensor_type, (*other.shape[::-1],))
        np.testing.assert_array_equal(found.data, other.data.view(np.uint8))


@pytest.mark.parametrize("kind", ["a folder", "a device or a pipe"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "x.gguf"
    path.mkdir() if kind == "a folder" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match=f"x.gguf: is {kind}; expected a file"):
        load_gguf(path)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigError,
        match=r"x.gguf: the gguf package is not installed; pip install -e '\.\[gguf\]'",
    ):
        load_gguf("x.gguf")
