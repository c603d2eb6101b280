"""Readers of other people's models: Hugging Face folders, adapters, GGUF files, chat templates."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhfjax.data.built_in_templates import BUILT_IN, CHATML
from rlhfjax.data.template import Template
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.interop import foreign, gguf_tokenizer, hf, peft
from rlhfjax.interop import gguf as our_gguf
from rlhfjax.interop.hf_config import write
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from tests.fuzz.inputs import (
    binary_bytes,
    fields_bytes,
    json_bytes,
    sized_json_bytes,
)
from tests.fuzz.readers.table import Table, file_reader, text_reader
from tests.interop.recent import RECENT

TABLE: Table = {}
FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MAP_FILE, TEMPLATE_FILE = "special_tokens_map.json", "chat_template.jinja"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
NAMES = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<pad>",
}
TALK = [
    {"role": "user", "content": " who sat? "},
    {"role": "assistant", "content": "the cat <|im_end|> é🙂"},
    {"role": "user", "content": "who?"},
]
CONFIG = TransformerConfig(
    vocab_size=40, d_model=8, n_layers=1, n_heads=2, d_ff=16, max_length=32
)


def _params(model: Model, init: Callable) -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes
    )


def use(tokenizer: Any) -> None:
    """Does what a stage does with a tokenizer."""
    tokenizer.decode(tokenizer.encode("who sat? <|im_end|> é🙂"))
    tokenizer.byte_lengths()
    if tokenizer.template.source:
        ids, _ = tokenizer.template.render(TALK, cue=True)
        tokenizer.template.messages(ids)


# ------------------------------------------------------------------ Hugging Face


def _hf(file: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    model = Model(CONFIG)
    target = folder / "hf"
    size = 2_000 if file == hf.INDEX else hf.SHARD_BYTES
    hf.save_hf(target, model, _params(model, model.init), shard_bytes=size)

    def read() -> None:
        foreign.find(f"hf:{target}")
        hf.load_hf(target)

    return target / file, [(target / file).read_bytes()], read


def hf_config_seeds(seeds: Sequence[bytes]) -> Any:
    """Also configs with keys of other releases."""
    values = json.loads(seeds[0])
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    more = [
        values | {"rope_scaling": rope | {"original_max_position_embeddings": 8192}},
        values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        values | {"id2label": {"0": "reward"}, "num_labels": 1},
        values | {"quantization_config": {"bits": 4}, "sliding_window": None},
        *(write(Model(config), "float32", {})[1] for config in RECENT.values()),
    ]
    return json_bytes([*seeds, *(json.dumps(value).encode() for value in more)])


file_reader(
    TABLE,
    "hf_config",
    hf_config_seeds,
    functools.partial(_hf, "config.json"),
    examples=75,
)
file_reader(
    TABLE, "hf_index", json_bytes, functools.partial(_hf, hf.INDEX), examples=40
)
file_reader(
    TABLE,
    "safetensors",
    sized_json_bytes,
    functools.partial(_hf, hf.WEIGHTS),
    examples=75,
)


def _byte_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=266,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    return backend


def _tokenizer(file: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    config = NAMES | {"chat_template": CHATML, "model_max_length": 10**30}
    (folder / FILE).write_text(_byte_bpe().to_str())
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    token = {"content": "<|im_end|>", "lstrip": False, "special": True}
    seeds = {
        FILE: (folder / FILE).read_text(),
        CONFIG_FILE: json.dumps(config | {"eos_token": token}),
        MAP_FILE: json.dumps(NAMES | {"eos_token": token}),
        TEMPLATE_FILE: CHATML,
    }
    return folder / file, [seeds[file].encode()], lambda: use(load_tokenizer(folder))


def _named(seeds: Sequence[bytes]) -> Any:
    """Also configs with several named templates."""
    values = json.loads(seeds[0])
    several = values | {
        "chat_template": [
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": "x"},
        ]
    }
    return json_bytes([*seeds, json.dumps(several).encode()])


for _name, _file, _strategy, _count in (
    ("hf_tokenizer", FILE, json_bytes, 20),
    ("hf_tokenizer_config", CONFIG_FILE, _named, 30),
    ("hf_special_tokens", MAP_FILE, json_bytes, 30),
    ("hf_template_file", TEMPLATE_FILE, binary_bytes, 30),
):
    _read = functools.partial(_tokenizer, _file)
    file_reader(TABLE, _name, _strategy, _read, examples=_count)

# ------------------------------------------------------------------ adapters


def _peft(file: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    plain = Model(CONFIG)
    adapted = Model(CONFIG, "lm", LoraConfig(rank=2, alpha=4.0, targets="query|value"))
    target = folder / "peft"
    peft.save_peft(target, adapted, _params(adapted, adapted.init_trained))

    def read() -> None:
        peft.load_peft(target, plain)

    return target / file, [(target / file).read_bytes()], read


file_reader(
    TABLE, "peft_config", json_bytes, functools.partial(_peft, peft.CONFIG), examples=40
)
file_reader(
    TABLE,
    "peft_weights",
    sized_json_bytes,
    functools.partial(_peft, peft.WEIGHTS),
    examples=40,
)

# ------------------------------------------------------------------ GGUF


def write_gguf(path: Path) -> bytes:
    """Writes a small Llama with its tokenizer, and returns the file's bytes."""
    backend = json.loads(_byte_bpe().to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(0.01)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template(CHATML)
    shapes = {"token_embd": (len(tokens), 8), "output_norm": (8,)}
    layer = {"attn_norm": (8,), "attn_output": (8, 8), "ffn_norm": (8,)}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (8, 8))
    layer |= {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def write_scored_gguf(path: Path) -> bytes:
    """Writes a small Gemma 3 with a tokenizer that has scores, and returns the file's bytes."""
    pieces = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    in_bytes = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<pad>", *SPECIALS[1:3], "<unk>", *in_bytes, *pieces]
    kinds = [3] * 3 + [2] + [6] * 256 + [1] * len(pieces)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_key_length(4)
    writer.add_layer_norm_rms_eps(0.01)
    writer.add_sliding_window(8)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHATML)
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    layer = dict.fromkeys(norms, (8,)) | {"attn_q_norm": (4,), "attn_k_norm": (4,)}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (8, 8))
    layer |= {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
    shapes = {"token_embd": (len(tokens), 8), "output_norm": (8,)}
    shapes |= {f"blk.{i}.{x}": shape for i in range(2) for x, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_FEW = 3  # members of an array whose lengths are fields


def gguf_fields(content: bytes) -> list[tuple[int, int]]:
    """Returns the places of counts, lengths, types and integers in a GGUF file."""
    places = [(4, 4), (8, 8), (16, 8)]  # version, tensors, metadata
    at = 24

    def number(width: int, keep: bool = True) -> int:
        nonlocal at
        if keep:
            places.append((at, width))
        at += width
        return int.from_bytes(content[at - width : at], "little")

    def skip(kind: int, keep: bool = True) -> None:
        nonlocal at
        if kind == _STRING:
            size = number(8, keep)
            at += size
        elif kind == _ARRAY:
            member, count = number(4), number(8)
            for i in range(count):
                skip(member, i < _FEW)
        else:
            number(_WIDTHS[kind], keep)

    for _ in range(int.from_bytes(content[16:24], "little")):
        skip(_STRING)
        skip(number(4))
    for _ in range(int.from_bytes(content[8:16], "little")):
        skip(_STRING)
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return places


def _gguf_bytes(seeds: Sequence[bytes]) -> Any:
    return fields_bytes(seeds, gguf_fields)


def _gguf(read: Callable[[Path], Any]) -> Callable:
    def prepare(folder: Path) -> tuple[Path, list[bytes], Callable]:
        file = folder / "x.gguf"
        seeds = [write_gguf(file), write_scored_gguf(file)]
        return file, seeds, lambda: read(file)

    return prepare


file_reader(
    TABLE,
    "gguf_model",
    _gguf_bytes,
    _gguf(lambda file: our_gguf.load_gguf(file)),
    examples=50,
)
file_reader(
    TABLE,
    "gguf_tokenizer",
    _gguf_bytes,
    _gguf(lambda file: use(gguf_tokenizer.gguf_tokenizer(file))),
    examples=50,
)

# ------------------------------------------------------------------ chat templates

JINJA = (
    *("{{ bos_token }}", "{{ x }}", "{{ messages }}", "{{", "}}", "{%", "%}", "{#"),
    *("{% for m in messages %}", "{% for i in range(10**9) %}", "{% endfor %}"),
    *("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}",),
    *("{% if true %}", "{% else %}", "{% endif %}", "{% break %}", "{% continue %}"),
    *("{% set x = 1 %}", "{% set ns = namespace(a=1) %}", "{% set ns.a = 2 %}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% generation %}"),
    *("{% endgeneration %}", "{% include 'x' %}", "{% extends 'x' %}"),
    *("{% import 'x' as y %}", "{{ self }}", "{{ 'a' * 10**9 }}", "{{ 9**9**9 }}"),
    *("{{ messages * 10**8 }}", "{{ 'a'.center(10**9) }}", "{{ 'a'|center(10**9) }}"),
    *("{{ '%1000000000d' % 1 }}", "{{ '{:1000000000}'.format(1) }}"),
    *("{{ lipsum(n=10000) }}", "{{ lipsum }}", "{{ cycler('a') }}", "{{ joiner() }}"),
    *("{{ raise_exception('no') }}", "{{ raise_exception(1) }}", "{{ 1/0 }}"),
    *("{{ strftime_now('%Y') }}", "{{ strftime_now(1) }}", "{{ strftime_now('%' ) }}"),
    *("{{ messages|tojson(indent=10**8) }}", "{{ messages|tojson }}", "{{ x.y.z }}"),
    *("{{ messages[0].__class__.__mro__ }}", "{{ messages[9]['role'] }}"),
    *("{{ ''.join(messages) }}", "{{ messages|length }}", "{{ range(10**8)|list }}"),
    *("{{ messages|map('upper')|join }}", "{{ (x for x in y) }}", "{% raw %}"),
    *("{{ '\\ud800' }}", "{{ 'a'|indent(10**9) }}", "{{ 'a\n'*9|indent(10**8) }}"),
    *("{{ 'a b'|wordwrap(1) }}", "{{ 'x'|batch(10**9)|list }}", "{{ dict(a=1) }}"),
    *("{{ messages|groupby('role') }}", "{{ m['content']|replace('', 'x'*10**5) }}"),
    *("{{ m['content'] }}", "{{ m.role }}", "<|im_start|>", "<|im_end|>", "|trim"),
    *("{{ [1]|random }}", "{{ 'x'|urlize }}", "{{ 'x'|slice(10**9)|list }}"),
)


def _render(source: str) -> None:
    """Renders with a tokenizer of characters, some of which are specials."""
    template = Template(
        source,
        specials={"<|im_start|>": 1, "<|im_end|>": 2, "<|user|>": 3},
        names=NAMES,
        encode=lambda text, before: [ord(letter) + 10 for letter in text],
        decode=lambda ids: "".join(chr(i - 10) for i in ids),
    )
    ids, _ = template.render(TALK, cue=True)
    template.messages(ids)
    template.edges(TALK, 1)


_SOURCES = [CHATML, BUILT_IN["llama2"].replace("[INST]", "<|im_start|>")]
text_reader(TABLE, "chat_template", _SOURCES[:1], JINJA, _render, "[}%]}", examples=50)
