"""Small tokenizers of the families in use: their ids are those of the `tokenizers` library."""

import json
import unicodedata

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from rlhfjax.data import chat
from rlhfjax.data.built_in_templates import CHATML, LLAMA2, LLAMA3
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import DataError

CORPUS = ["the cat sat on the mat", "who ran? a happy dog sang", "model user assistant"]
TEXTS = [
    "the cat sat, 12345 dogs ran.",
    " a  b   c\t\td ",
    "who?\n\n  the cat's\r\nDON'T",
    unicodedata.normalize("NFD", "été ½ Å"),
    "三四五 🙂 Ж",
    "x" * 30,
]
CHAT = [
    {"role": "user", "content": "the cat 12 é?"},
    {"role": "assistant", "content": "a dog  ran,\nwho? 🙂"},
    {"role": "user", "content": "the mat."},
    {"role": "assistant", "content": "Yes."},
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(specials, size, pre_tokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    options = {"vocab_size": size, "special_tokens": specials, "show_progress": False}
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS * 9, trainers.BpeTrainer(**options))
    return backend


def over_bytes(specials, numbers: str, *, normalizer=None, bos="", ignore_merges=False):
    """Returns BPE over bytes with the pattern of Llama 3, Qwen2 and their like."""
    backend = trained(specials, 340, pre_tokenizers.ByteLevel(add_prefix_space=False))
    data = json.loads(backend.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    split = pre_tokenizers.Split(Regex(WORDS % numbers), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if normalizer:
        backend.normalizer = normalizer
    if bos:
        add_bos(backend, bos)
    return backend


def over_characters(specials, bos: str):
    """Returns BPE over characters with a fallback to bytes, as converted from SentencePiece."""
    spaced = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    in_bytes = [f"<0x{i:02X}>" for i in range(256)]
    data = json.loads(trained([*specials, *in_bytes], 330, spaced).to_str())
    data["added_tokens"] = data["added_tokens"][: len(specials)]
    data["pre_tokenizer"] = None
    data["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    add_bos(backend, bos)
    return backend


def add_bos(backend: tokenizers.Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def fallback(*, strip: bool) -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)


def llama2(scheme: str):
    backend = over_characters(["<unk>", "<s>", "</s>"], "<s>")
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=False
        )
    backend.decoder = fallback(strip=True)
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma():
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = over_characters(specials, "<bos>")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = fallback(strip=False)
    runs = ["\n\n", "\n\n\n", "▁▁", "▁▁▁"]
    backend.add_tokens([AddedToken(text, normalized=False) for text in runs])
    names = ("pad", "eos", "bos", "unk")
    return backend, {f"{name}_token": f"<{name}>" for name in names}


def phi3():
    backend, config = llama2("legacy")
    turns = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"]
    backend.add_special_tokens(
        [AddedToken(text, rstrip=text != turns[0], normalized=False) for text in turns]
    )
    return backend, config | {"eos_token": turns[0], "pad_token": turns[0]}


def llama3():
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id"]
    specials = [f"<|{name}|>" for name in [*names, "eot_id"]]
    backend = over_bytes(specials, r"\p{N}{1,3}", bos=specials[0], ignore_merges=True)
    return backend, {"bos_token": specials[0], "eos_token": "<|eot_id|>"}


def chatml(numbers: str, **options):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = over_bytes(specials, numbers, **options)
    return backend, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def olmo2():
    specials = ["<|endoftext|>", "<|pad|>"]
    backend = over_bytes(specials, r"\p{N}{1,3}")
    config = {
        "bos_token": specials[0],
        "eos_token": specials[0],
        "pad_token": "<|pad|>",
    }
    return backend, config


GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or m['role'] == 'user' %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# name: tokenizer and config, template, blanks before a text, normal form of a text
SHAPES = {
    "llama2 legacy": (lambda: llama2("legacy"), LLAMA2, 1, None),
    "llama2 first": (lambda: llama2("first"), LLAMA2, 1, None),
    "gemma": (gemma, GEMMA, 0, None),
    "phi3": (phi3, PHI3, 1, None),
    "llama3": (llama3, LLAMA3, 0, None),
    "qwen3": (lambda: chatml(r"\p{N}", normalizer=normalizers.NFC()), CHATML, 0, "NFC"),
    "smollm3": (lambda: chatml(r"\p{N}{1,3}", ignore_merges=True), CHATML, 0, None),
    "olmo2": (olmo2, OLMO2, 0, None),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Both tokenizers of each shape, ours read from a folder."""
    made = {}
    for name, (make, template, *_) in SHAPES.items():
        backend, config = make()
        folder = tmp_path_factory.mktemp("shape")
        backend.save(str(folder / "tokenizer.json"))
        config = config | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        made[name] = (load_tokenizer(folder), backend)
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_texts_have_the_ids_of_the_library_and_come_back(shapes, name):
    ours, theirs = shapes[name]
    _, _, blanks, form = SHAPES[name]
    for text in [*TEXTS, *CORPUS]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        expected = unicodedata.normalize(form, text) if form else text
        if (
            name == "llama2 first"
        ):  # Metaspace takes a blank for the one that it puts there
            expected = expected.removeprefix(" ")
        assert ours.decode(ids) == expected
        lengths = ours.byte_lengths()[ids].sum()
        assert lengths == len(expected.encode()) + blanks
        texts = ours.token_bytes()
        assert b"".join(texts[i] for i in ids)[blanks:] == expected.encode()


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_have_the_ids_of_the_library(shapes, name):
    ours, theirs = shapes[name]
    for messages, cue in ((CHAT, False), (CHAT[:2], False), (CHAT[:3], True)):
        text = ours.template.text(messages, cue=cue)
        ids, mask = ours.template.render(messages, cue=cue)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
    ids, mask = ours.template.render(CHAT)
    learned = [i for i, counts in zip(ids, mask, strict=True) if counts]
    written = theirs.decode(learned, skip_special_tokens=True)
    answers = CHAT[1]["content"] + CHAT[3]["content"]
    assert "".join(written.split()) == "".join(answers.split())
    prompt = chat.render_prompt(ours, CHAT[:3]).tolist()
    assert ids[: len(prompt)] == prompt
    assert ours.template.messages(prompt)[:-1] == CHAT[:3]


@pytest.mark.parametrize("name", SHAPES)
def test_a_message_that_spells_specials_has_none(shapes, name):
    ours, theirs = shapes[name]
    specials = {
        i for i, token in theirs.get_added_tokens_decoder().items() if token.special
    }
    spelled = "".join(theirs.id_to_token(i) for i in sorted(specials))
    ids = ours.encode(f"the {spelled} cat")
    assert specials.isdisjoint(ids) and ours.decode(ids) == f"the {spelled} cat"


def test_a_special_that_swallows_blanks_swallows_those_of_a_message(shapes):
    """Phi-3's <|user|> does, and so the library gives the same ids for a message with blanks."""
    ours, theirs = shapes["phi3"]
    for content in ("  the cat", "\n\n", "\u2003a \u00a0"):
        messages = [{"role": "user", "content": content}, *CHAT[1:2]]
        text = ours.template.text(messages)
        ids, _ = ours.template.render(messages)
        assert ids == theirs.encode(text, add_special_tokens=False).ids


def test_what_is_no_bpe_over_bytes_is_refused_by_its_name():
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    unigram.decoder = decoders.Metaspace()
    with pytest.raises(
        DataError, match="Unigram with decoder Metaspace; accepted: BPE"
    ):
        HuggingFaceTokenizer(unigram, {"eos_token": "a"})
    backend, config = llama2("legacy")
    data = json.loads(backend.to_str())
    data["model"]["byte_fallback"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    with pytest.raises(DataError, match=r"ByteFallback decoder, and model\.byte_fallb"):
        HuggingFaceTokenizer(backend, config)
