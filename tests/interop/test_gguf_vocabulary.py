"""Tokenizers in GGUF files: those of our exports, and SentencePiece's, against its library."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from rlhfjax.data import chat
from rlhfjax.data.built_in_templates import CHATML, OURS
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.gguf_pre import PRE
from rlhfjax.interop.gguf_tokenizer import gguf_tokenizer
from rlhfjax.interop.gguf_vocabulary import describe
from tests.data.conftest import conversation, tokenizer
from tests.interop.test_gguf import write
from tests.interop.test_gguf_tokenizer import SPECIALS, TEXTS, trained

__all__ = ["tokenizer"]  # a fixture
HARD = [
    *TEXTS,
    "<|user|> </s> <s> <0x41>",
    "  two  blanks ",
    "",
    " ",
    "\n",
    "ÿ\u2581 x",
]


def texts(seed, n=40):
    """Returns random texts of words of the training, digits and other characters."""
    rng = random.Random(seed)
    alphabet = ["the", "cat", " ", "  ", "12", "sat", "é", "🙂", "\n", "<s>", ".", "T"]
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(n)]


def read_back(path, metadata):
    """Returns the tokenizer of a file with this metadata."""
    return gguf_tokenizer(write(path, metadata, {}))


def test_our_sentencepiece_model_gives_the_same_ids(tokenizer, tmp_path):
    again = read_back(
        tmp_path / "x.gguf", describe(tokenizer, tokenizer.vocab_size + 7)
    )
    assert again.vocab_size == tokenizer.vocab_size  # without what pads the embeddings
    for name in ("pad_id", "bos_id", "eos_id", "unk_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.template.source == OURS
    for text in [*texts(0), *HARD]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == text
    assert again.byte_lengths().tolist() == tokenizer.byte_lengths().tolist()
    rng = random.Random(1)
    for turns in range(1, 6):
        messages = conversation(rng, turns)
        messages[0]["content"] += " </s><|user|>\u2581"
        for render in (chat.render_prompt, lambda *x: chat.render(*x)[0]):
            assert (
                render(again, messages).tolist() == render(tokenizer, messages).tolist()
            )


def foreign_model(**options):
    """Returns a SentencePiece model such as Llama 2 has: trained here, by BPE."""
    file = io.BytesIO()
    lines = ["The cat sat on the mat, 12 times.", "Who sat? The cats who sang.", *TEXTS]
    given = {
        "vocab_size": 360,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(lines).replace("\n", " ").split("  ") * 20),
        model_writer=file,
        **given,
    )
    return file.getvalue()


def file_of(path, model, **more):
    """Writes what llama.cpp's converter makes of a SentencePiece model."""
    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in content.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in content.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in content.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    for name, value in more.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    return write(path, metadata, {})


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_sentencepiece_library(prefix, tmp_path):
    """Of every text without U+2581 and without the model's special tokens."""
    model = foreign_model(
        add_dummy_prefix=prefix, user_defined_symbols=[] if prefix else ["\u2581\u2581"]
    )
    more = {} if prefix else {"add_space_prefix": False}
    found = gguf_tokenizer(file_of(tmp_path / "x.gguf", model, **more))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*texts(2), *HARD]:
        plain = text.replace("\u2581", "").replace("<s>", "").replace("</s>", "")
        if plain:
            assert found.encode(plain) == theirs.encode(plain), plain
            assert found.decode(theirs.encode(plain)) == plain
    assert found.unk_id == 0 and found.bos_id == 1 and found.eos_id == 2


def test_a_tokenizer_with_scores_is_exported_again(tmp_path):
    first = gguf_tokenizer(file_of(tmp_path / "x.gguf", foreign_model()))
    described = describe(first, first.vocab_size)
    assert described["tokenizer.ggml.add_space_prefix"] is True
    assert described["tokenizer.ggml.add_bos_token"] is True
    again = read_back(tmp_path / "y.gguf", described)
    for text in [*texts(3), *HARD]:
        assert again.encode(text) == first.encode(text)
    assert again.unk_id == first.unk_id


def test_llama_2s_own_spelling_of_blanks_is_exported(tmp_path):
    """tokenizer.json of Llama 2: blanks become U+2581, and one is put before a text."""
    model = foreign_model()
    first = gguf_tokenizer(file_of(tmp_path / "x.gguf", model))
    data = first.content()
    spelled = json.loads(json.dumps(data["model"]).replace(" \\u2581", " "))
    spelled["vocab"] = {
        k.replace(" ", "\u2581"): i for k, i in spelled["vocab"].items()
    }
    spelled["merges"] = [
        [half.replace(" ", "\u2581") for half in pair] for pair in spelled["merges"]
    ]
    backend = tokenizers.Tokenizer.from_str(json.dumps(data | {"model": spelled}))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True}
    llama2 = HuggingFaceTokenizer(backend, config)
    assert describe(llama2, 360) == describe(first, 360)


def byte_level(pre, **options):
    """Returns a byte-level BPE with a pre-tokenizer that GGUF has a name for."""
    vocabulary, merges = trained()
    described = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.token_type": [3 if x in SPECIALS else 1 for x in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
    }
    described["tokenizer.ggml.token_type"] = [
        3 if text in SPECIALS else 1 for text in described["tokenizer.ggml.tokens"]
    ]
    return described | options


@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "dbrx", "gpt-4o", "tekken"]
)
def test_byte_level_bpe_comes_back(pre, tmp_path):
    first = gguf_tokenizer(write(tmp_path / "x.gguf", byte_level(pre), {}))
    described = describe(first, first.vocab_size + 3)
    assert described["tokenizer.ggml.pre"] == pre
    assert described["tokenizer.ggml.add_bos_token"] is PRE[pre].adds_bos
    again = read_back(tmp_path / "y.gguf", described)
    for text in [*texts(4), *HARD]:
        assert again.encode(text) == first.encode(text)
    for name in ("pad_id", "bos_id", "eos_id", "vocab_size"):
        assert getattr(again, name) == getattr(first, name)
    assert again.template.source == CHATML


def test_other_spellings_of_a_pre_tokenizer_are_known(tmp_path):
    """Offsets do not matter, nor whether matches are kept or what is between them removed."""
    first = gguf_tokenizer(write(tmp_path / "x.gguf", byte_level("dbrx"), {}))
    backend = tokenizers.Tokenizer.from_str(json.dumps(first.content()))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE["dbrx"].pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(False, trim_offsets=False, use_regex=False),
        ]
    )
    again = HuggingFaceTokenizer(backend, {"chat_template": CHATML})
    assert describe(again, 400)["tokenizer.ggml.pre"] == "dbrx"
    for text in [*texts(5), *HARD]:
        assert again.encode(text) == first.encode(text)


CASED = "camelCase HTMLParser isn't IT'S 12345 a/b\n/x"
CASED_CUTS = {  # by hand, from the patterns: where the case changes a word ends
    "gpt-4o": ["camel", "Case", " HTMLParser", " isn't", " IT'S", " ", "123", "45"],
    "tekken": ["camel", "Case", " HTMLParser", " isn", "'t", " IT", "'S", " ", "1"],
}


@pytest.mark.parametrize("pre", CASED_CUTS)
def test_patterns_in_which_case_matters(pre, tmp_path):
    found = gguf_tokenizer(write(tmp_path / "x.gguf", byte_level(pre), {}))
    spans = found._backend.pre_tokenizer.pre_tokenize_str(CASED)
    cuts = [CASED[start:end] for _, (start, end) in spans]
    assert cuts[: len(CASED_CUTS[pre])] == CASED_CUTS[pre]


def test_added_words_are_found_whole(tmp_path):
    described = byte_level("gpt-2")
    described["tokenizer.ggml.tokens"] += ["the cat"]
    described["tokenizer.ggml.token_type"] += [4]
    found = gguf_tokenizer(write(tmp_path / "x.gguf", described, {}))
    assert found.vocab_size - 1 in found.encode("xthe caty")
    again = describe(found, found.vocab_size)
    assert again["tokenizer.ggml.token_type"][-1] == 4
    assert again["tokenizer.ggml.tokens"][-1] == "the cat"


def test_what_llama_cpp_cannot_have_is_refused(tmp_path):
    first = gguf_tokenizer(write(tmp_path / "x.gguf", byte_level("gpt-2"), {}))

    def changed(change):
        backend = tokenizers.Tokenizer.from_str(json.dumps(first.content()))
        change(backend)
        return HuggingFaceTokenizer(backend, {"chat_template": CHATML})

    def lowered(backend):
        backend.normalizer = normalizers.Lowercase()

    def swallows(backend):
        backend.add_tokens([AddedToken("the cat", lstrip=True)])

    with pytest.raises(ConfigError, match="its pre-tokenizer is none of those"):
        describe(changed(lowered), 400)
    with pytest.raises(ConfigError, match="'the cat' swallows the blanks beside it"):
        describe(changed(swallows), 400)
    content = first.content()
    content["model"] |= {"merges": []}
    bare = tokenizers.Tokenizer.from_str(json.dumps(content))
    with pytest.raises(ConfigError, match="model's tokenizer: it has no merges"):
        describe(HuggingFaceTokenizer(bare, {"chat_template": CHATML}), 400)
    unigram = train_sentencepiece(
        ["the cat sat on the mat"] * 20,
        tmp_path / "unigram",
        vocab_size=275,
        model_type="unigram",
    )
    with pytest.raises(
        ConfigError, match="cannot have the model's tokenizer: it is not"
    ):
        describe(unigram, 275)


def test_merges_without_scores_are_refused(tmp_path):
    """`ab` is merged before `a`, `b` may be: no score of a token says both."""
    tokens = {"<s>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    tokens |= {
        text: 257 + i for i, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])
    }
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]  # and not ("a", "bc")
    bpe = models.BPE(vocab=tokens, merges=merges, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>"])
    found = HuggingFaceTokenizer(
        backend, {"eos_token": "<s>", "pad_token": "a"}, context="x"
    )
    with pytest.raises(ConfigError, match="its merges are not those of scores"):
        describe(found, 300)


BYTES = [f"<0x{i:02X}>" for i in range(256)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scores": [0.5]}, r"360 tokens and 1 scores"),
        ({"scores": [float("nan")] * 360}, r"scores has nan: expected numbers"),
        (
            {"scores": [1.0] * 360},
            r"scores: '.*' and '.*' have the same: which is merged",
        ),
        ({"token_type": [2, 3, 3] + [1] * 357}, r"tokens: <0x00> is missing"),
        ({"tokens": ["a" * 257] * 360}, r"360 tokens, 1 of them distinct"),
        (
            {"tokens": [*BYTES, "a" * 257], "token_type": [6] * 256 + [1]},
            r"tokens: 'a+… has 257 characters: accepted are 256",
        ),
        ({"add_bos_token": 1}, r"add_bos_token is 1: expected a bool"),
        ({"precompiled_charsmap": [1]}, r"a tokenizer that changes characters"),
        ({"tokens": [" ", "\u2581"] + [f"{i}" for i in range(358)]}, r"359 of them"),
    ],
)
def test_scores_that_cannot_be_read_are_one_line(more, message, tmp_path):
    path = file_of(tmp_path / "x.gguf", foreign_model(), **more)
    with pytest.raises(CheckpointError, match=message) as error:
        gguf_tokenizer(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_phi_3s_tokens_that_swallow_blanks_are_not_passed_over(tmp_path):
    """llama.cpp knows them by the file's name for the model, since no key says it."""
    model = foreign_model(control_symbols=["<|end|>", "<|user|>", "<|assistant|>"])
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    path = file_of(tmp_path / "x.gguf", model)
    described = {"general.name": "Phi-3 Mini", "tokenizer.chat_template": template}
    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    described |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in content.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in content.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in content.pieces],
        "tokenizer.ggml.eos_token_id": 2,
    }
    path = write(tmp_path / "x.gguf", described, {})
    found = gguf_tokenizer(path)
    messages = [{"role": "user", "content": "the cat"}]
    ids = [found.token_id(text) for text in ("<|user|>", "<|end|>", "<|assistant|>")]
    prompt = [ids[0], *found.encode("the cat"), *ids[1:]]
    assert chat.render_prompt(found, messages).tolist() == prompt
    with pytest.raises(ConfigError, match="swallows the blanks beside it"):
        describe(found, 360)
    described["general.name"] = "another"
    other = gguf_tokenizer(write(path, described, {}))
    assert chat.render_prompt(other, messages).tolist() != prompt


def test_a_tokenizer_of_another_kind_is_named():
    names = "vocab_size pad_id bos_id eos_id unk_id template encode decode token_id"
    names += " byte_lengths token_bytes save export document_start document_end extra_eos_ids"
    other = type("Other", (), dict.fromkeys(names.split(), print))()
    with pytest.raises(ConfigError, match="its class is Other"):
        describe(other, 9)


def test_the_model_file_of_a_sentencepiece_tokenizer_is_kept(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert SentencePieceTokenizer(tmp_path / "tokenizer.model").model == tokenizer.model
