"""Tokenizers of the `tokenizers` library lose no text, invent no special, and pad is not eos."""

import itertools
import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from rlhfjax.chat import decode_stream
from rlhfjax.data import chat, examples, hf_tokenizer
from rlhfjax.data.built_in_templates import BUILT_IN, MARKERS
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from rlhfjax.errors import DataError
from tests.needs import needs

SMOLLM = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
]  # ids 0, 1, 2, 3, as SmolLM2 has them
CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
TEXTS = ["the cat sat on the mat, who ran? a happy dog sang.", "é🙂 <|im_end|> 12 345"]


def byte_bpe(specials=SMOLLM, **options) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 9, trainer)
    return backend


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] "
    "+ eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def llama2(scheme: str) -> tokenizers.Tokenizer:
    """Returns BPE over characters with a fallback to bytes, its ids in Llama 2's order."""
    characters = sorted(set("".join(TEXTS)) - {" ", "é", "🙂"} | {"▁"})
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *characters,
        "▁t",
        "▁th",
        "▁the",
        "▁c",
    ]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=False
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="module")
def smollm() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(
        byte_bpe(), CONFIG | {"pad_token": "<|im_end|>"}, template="chatml"
    )


ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([*SMOLLM, "Ġ", "  ", "\r\n", "<|", "the cat"]),
    )
)


@settings(max_examples=200, deadline=None)
@given(parts=ANY_TEXT)
def test_any_text_survives_the_round_trip_without_specials_and_its_bytes_add_up(
    smollm, parts
):
    text = "".join(parts)
    ids = smollm.encode(text)
    assert smollm.decode(ids) == text
    assert not {smollm.token_id(special) for special in SMOLLM} & set(ids)
    assert smollm.byte_lengths()[np.array(ids, int)].sum() == len(text.encode())


def test_the_protocol_and_the_specials(smollm):
    assert isinstance(smollm, Tokenizer)
    assert (smollm.unk_id, smollm.bos_id, smollm.eos_id) == (0, 1, 2)
    assert (
        smollm.vocab_size == smollm._backend.get_vocab_size()
        and smollm.token_id("<repo_name>") == 3
    )
    assert not smollm.byte_lengths()[:4].any() and smollm.byte_lengths()[4:].all()
    ids = [*smollm.encode("the cat"), 1, 2, 0, 3]
    assert (
        smollm.decode(ids) == "the cat<repo_name>"
    )  # pad, bos and eos are dropped, another special shows
    with pytest.raises(DataError, match=r"no piece '<\|tool\|>' among its 3"):
        smollm.token_id("<|tool|>")


@pytest.mark.parametrize(
    "specials, config, template, pad, eos",
    [
        # SmolLM2: the file's pad is its eos; <|endoftext|> becomes the pad.
        (
            SMOLLM,
            CONFIG | {"pad_token": "<|im_end|>"},
            "chatml",
            "<|endoftext|>",
            "<|im_end|>",
        ),
        # Qwen2.5: the file's pad is right. Its eos ends documents; turns end otherwise.
        (
            SMOLLM,
            {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
            "chatml",
            "<|endoftext|>",
            "<|im_end|>",
        ),
        # GPT-2 has one special for everything, so the byte 0xFF is the pad.
        (
            ["<|endoftext|>"],
            {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
            "",
            "ÿ",
            "<|endoftext|>",
        ),
        # Pythia has a special that is called padding.
        (
            ["<|endoftext|>", "<|padding|>"],
            {"eos_token": "<|endoftext|>"},
            "",
            "<|padding|>",
            "<|endoftext|>",
        ),
    ],
)
def test_pitfall_02_the_pad_is_never_the_eos(
    specials, config, template, pad, eos, tmp_path
):
    tokenizer = HuggingFaceTokenizer(byte_bpe(specials), config, template=template)
    assert (
        tokenizer.pad_id
        == tokenizer.token_id(pad)
        != tokenizer.eos_id
        == tokenizer.token_id(eos)
    )
    assert (
        tokenizer.decode(tokenizer.encode("ÿé🙂\u00ff")) == "ÿé🙂\u00ff"
    )  # whatever the pad is, no text has it
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer


def bos_first(specials, bos) -> tokenizers.Tokenizer:
    """Returns a tokenizer whose post-processor writes bos before a text, as Llama 3's does."""
    backend = byte_bpe(specials)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


TEXT_END, TURN_END = "<|endoftext|>", "<|im_end|>"
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", *MARKERS[BUILT_IN["llama3"]]]


@pytest.mark.parametrize(
    ("backend", "config", "template", "start", "end"),
    [
        # SmolLM2-Instruct: its bos_token is a marker, which no document begins with.
        (byte_bpe(), CONFIG, "chatml", None, TEXT_END),
        # Qwen2.5, base and instruct, without a bos.
        (byte_bpe(), {"eos_token": TEXT_END}, "chatml", None, TEXT_END),
        (byte_bpe(), {"eos_token": TURN_END}, "chatml", None, TEXT_END),
        # Llama 3, base and instruct; the same where a config denies the bos.
        (
            bos_first(LLAMA3, "<|begin_of_text|>"),
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
            "llama3",
            "<|begin_of_text|>",
            "<|end_of_text|>",
        ),
        (
            bos_first(LLAMA3, "<|begin_of_text|>"),
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            "llama3",
            "<|begin_of_text|>",
            "<|end_of_text|>",
        ),
        (
            bos_first(SMOLLM, "<|im_start|>"),
            CONFIG | {"add_bos_token": False},
            "chatml",
            None,
            TEXT_END,
        ),
        # GPT-2 has one special for everything.
        (
            byte_bpe([TEXT_END]),
            {"bos_token": TEXT_END, "eos_token": TEXT_END},
            "",
            None,
            TEXT_END,
        ),
        # Mistral ends turns and documents alike.
        (
            llama2("legacy"),
            LLAMA2 | {"add_bos_token": True},
            "llama2",
            "<s>",
            "</s>",
        ),
    ],
)
def test_a_document_stands_between_the_tokens_of_its_vocabulary(
    backend, config, template, start, end, tmp_path
):
    tokenizer = HuggingFaceTokenizer(backend, config, template=template)
    before = [tokenizer.token_id(start)] if start else []
    after = [tokenizer.token_id(end)]
    text = tokenizer.encode("the cat")
    row = examples.document(tokenizer, {"text": "the cat"})
    assert row.tolist() == [*before, *text, *after]
    tokenizer.save(tmp_path)
    again = examples.document(load_tokenizer(tmp_path), {"text": "the cat"})
    assert again.tolist() == row.tolist()


def test_a_special_that_the_rules_arrive_at_is_cut(tmp_path):
    """With ignore_merges, as in Llama 3, a word that is a piece is that piece, special or not."""
    data = json.loads(byte_bpe(["<|endoftext|>", "endmark"]).to_str())
    data["model"]["ignore_merges"] = True
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer = HuggingFaceTokenizer(backend, {"eos_token": "endmark"})
    assert tokenizer.eos_id not in tokenizer.encode("an,endmark endmark,endmark")
    assert (
        tokenizer.decode(tokenizer.encode("an,endmark endmark,endmark"))
        == "an,endmark endmark,endmark"
    )


def test_an_added_token_that_is_no_special_is_text_and_one_that_the_template_writes_is_not():
    backend = byte_bpe(SMOLLM[:1])
    backend.add_tokens(
        [
            AddedToken("\t\t", normalized=False),
            AddedToken("<|im_start|>"),
            AddedToken("<|im_end|>"),
        ]
    )
    tokenizer = HuggingFaceTokenizer(
        backend, {"eos_token": "<|endoftext|>"}, template="chatml"
    )
    tabs, start, end = (
        tokenizer.token_id(piece) for piece in ("\t\t", "<|im_start|>", "<|im_end|>")
    )
    ids = tokenizer.encode("the\t\t<|im_start|>cat<|im_end|>")
    assert tabs in ids and start not in ids and end not in ids
    assert tokenizer.byte_lengths()[ids].sum() == len(
        "the\t\t<|im_start|>cat<|im_end|>"
    )
    assert tokenizer.eos_id == end


def test_pitfall_42_bytes_of_pieces_that_are_not_spelled_in_bytes():
    """A piece with a character that spells no byte is decoded as it stands; unk has no bytes."""
    data = json.loads(byte_bpe(SMOLLM[:1]).to_str())
    first = 1 + max(data["model"]["vocab"].values())
    data["model"]["vocab"] |= {"今é": first, "<none>": first + 1}
    data["model"]["unk_token"] = "<none>"
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer = HuggingFaceTokenizer(backend, {"eos_token": "<|endoftext|>"})
    assert tokenizer.decode([first]) == "今é"
    assert tokenizer.byte_lengths()[
        [first, first + 1, tokenizer.token_id("Ġ")]
    ].tolist() == [
        5,
        0,
        1,
    ]


def test_what_is_saved_is_what_is_read(smollm, tmp_path):
    smollm.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again == smollm and hash(again) == hash(smollm)
    assert again.template.source == smollm.template.source
    copied = pickle.loads(
        pickle.dumps(smollm)
    )  # a pickled backend alone would take specials in a text for specials
    assert copied == smollm and copied.encode("<|im_end|>") == smollm.encode(
        "<|im_end|>"
    )
    assert smollm != HuggingFaceTokenizer(
        byte_bpe(), CONFIG, template="{{ bos_token }}" + smollm.template.source
    )


def test_the_template_is_found_where_hugging_face_puts_it(smollm, tmp_path):
    smollm.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    source = config.pop("chat_template")
    names = {
        name: config.pop(name)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    path.write_text(
        json.dumps(
            config | {"chat_template": [{"name": "default", "template": source}]}
        )
    )
    objects = {name: {"content": text, "lstrip": False} for name, text in names.items()}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(objects))
    assert load_tokenizer(tmp_path) == smollm
    (tmp_path / "chat_template.jinja").write_text(
        source.replace("user", "user") + "{# newer #}"
    )
    assert load_tokenizer(tmp_path).template.source.endswith("{# newer #}")


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
def test_llama_2s_blanks(scheme):
    """BPE over characters puts a blank before the first word only, not after a turn's opening."""
    tokenizer = HuggingFaceTokenizer(llama2(scheme), LLAMA2, template="llama2")
    alone = ["t", "h", "e"] if scheme == "never" else ["▁the"]
    assert [tokenizer._backend.id_to_token(i) for i in tokenizer.encode("the")] == alone
    assert tokenizer.pad_id == tokenizer.token_id(
        "<unk>"
    ) and tokenizer.eos_id == tokenizer.token_id("</s>")
    tokens, _ = chat.render(
        tokenizer,
        [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cé"}],
    )
    shown = [tokenizer._backend.id_to_token(int(i)) for i in tokens]
    opening = (
        ["<s>", "▁", "<0x5B>"] if scheme in ("always", "legacy") else ["<s>", "<0x5B>"]
    )
    assert shown[: len(opening)] == opening and "▁the" in shown
    assert shown[-5:] == ["▁c", "<0xC3>", "<0xA9>", "▁", "</s>"]
    text = "the é🙂 </s>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + (
        scheme != "never"
    )


def test_a_streamed_answer_holds_unfinished_characters_back(smollm):
    text = "the cat 🙂 é!"
    pieces = list(decode_stream(smollm, [*smollm.encode(text), smollm.eos_id]))
    assert (
        "".join(pieces) == text
        and all("\ufffd" not in piece for piece in pieces)
        and len(pieces) > 3
    )


def test_errors_are_one_line(smollm, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: there is no such file"):
        hf_tokenizer.read_folder(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.model: there is no such file"):
        load_tokenizer(tmp_path)
    smollm.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json: expected a JSON object"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    words = tokenizers.Tokenizer(
        models.WordLevel({"the": 0, "<eos>": 1}, unk_token="the")
    )
    with pytest.raises(
        DataError, match="WordLevel with decoder none; accepted: BPE with a ByteLevel"
    ):
        HuggingFaceTokenizer(words, {"eos_token": "<eos>"})
    with pytest.raises(DataError, match="neither an eos_token nor a chat template"):
        HuggingFaceTokenizer(byte_bpe(), {})
    with pytest.raises(DataError, match="no token is free to be the pad"):
        HuggingFaceTokenizer(
            llama2("first"),
            {"eos_token": "<unk>", "bos_token": "<s>", "unk_token": "</s>"},
        )
    swallowing = byte_bpe(SMOLLM[:1])
    swallowing.add_special_tokens(
        [AddedToken("<|im_start|>", lstrip=True), AddedToken("<|im_end|>")]
    )
    with pytest.raises(
        DataError, match=r"'<\|im_start\|>' of its chat template swallows the blanks"
    ):
        HuggingFaceTokenizer(swallowing, CONFIG, template="chatml")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], r"tokenizer\.json: expected a JSON object, got \[\]"),
        (("normalizer",), ["x"], r"normalizer is \['x'\]: expected a JSON object"),
        (
            ("pre_tokenizer",),
            None,
            "a ByteLevel decoder, and no ByteLevel pre_tokenizer",
        ),
        (("decoder",), "x", "decoder is 'x': expected a JSON object"),
        (("model",), None, "not a tokenizer"),
        (("model", "vocab"), {}, "not a tokenizer"),
        (("model", "vocab", "!"), 5, "both have the id 5"),
        (("model", "vocab", "!"), -1, "not a tokenizer"),
        (("model", "vocab", "!"), 2**31, "! has the id 2147483648: must be < 16777216"),
        (("model", "vocab", "!"), 10**30, "not a tokenizer"),
        (("model", "merges"), ["a b c"], "not a tokenizer"),
        (("model", "dropout"), 0.5, "model.dropout is 0.5: accepted is null"),
        (("model", "unk_token"), "<u>", "model.unk_token '<u>' is none of its tokens"),
        # The library panics, with its own traceback.
        (
            ("model", "continuing_subword_prefix"),
            "##",
            "prefix is '##': accepted is null",
        ),
        (("model", "end_of_word_suffix"), "</w>", "suffix is '</w>': accepted is null"),
        (("added_tokens", 3, "id"), 7000, "<repo_name>' has the id 7000, where 3 is"),
        (("added_tokens", 3, "special"), 1, "not a tokenizer"),
        (("added_tokens", 3), 1, "not a tokenizer"),
    ],
)
def test_a_tokenizer_json_that_is_none_is_one_line(
    smollm, tmp_path, path, value, message
):
    smollm.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = part = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    if path:
        part[path[-1]] = value
    file.write_text(json.dumps(data if path else value))
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"null", "expected a JSON object, got None"),
        (b"", "not JSON: "),
        (b"\xff\xfe{\0}\0", "not JSON: it is UTF-16.*expected UTF-8"),
        (
            b'{"bos_token": 1}',
            "bos_token is 1: expected text, or an object with content",
        ),
        (b'{"eos_token": {}}', "eos_token is {}: expected text, or an object"),
        (b'{"pad_token": ["x"]}', r"pad_token is \['x'\]: expected text"),
        (
            b'{"unk_token": {"content": null}}',
            "unk_token is {'content': None}: expected",
        ),
        (
            b'{"chat_template": false}',
            "chat_template is False: expected text, or several",
        ),
        (b'{"chat_template": []}', r"chat_template is \[\]: expected text, or several"),
        (b'{"chat_template": ["x"]}', r"chat_template\[0\]: input should be a valid d"),
        (
            b'{"chat_template": [{"name": "x"}]}',
            r"chat_template\[0\]: expected an object",
        ),
        (
            b'{"chat_template": {"tools": "x"}}',
            ".*several with the name 'default' among",
        ),
        (
            b'{"chat_template": {"default": 1}}',
            ".*several with the name 'default' among",
        ),
    ],
)
def test_a_config_of_a_tokenizer_that_is_none_is_one_line(
    smollm, tmp_path, name, content, message
):
    smollm.save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "invalid UTF-8 at byte 0; expected Jinja source"),
        ("x".encode("utf-16"), "it is UTF-16 .*; expected Jinja source in UTF-8"),
        (None, "is a folder; expected a file"),
    ],
)
def test_a_template_file_that_is_no_text_is_one_line(
    smollm, tmp_path, content, message
):
    smollm.save(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=rf"chat_template\.jinja: {message}"):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_is_no_content(smollm, tmp_path):
    smollm.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(tmp_path) == smollm


def test_a_sentencepiece_model_is_still_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@needs("transformers", extra="transformers")
@pytest.mark.transformers
def test_transformers_reads_what_is_saved_and_encodes_the_same(smollm, tmp_path):
    from transformers import AutoTokenizer

    smollm.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    for name, (template, scheme) in enumerate(
        itertools.product(("llama2", ZEPHYR), ("first", "always", "legacy"))
    ):
        tokenizer = HuggingFaceTokenizer(llama2(scheme), LLAMA2, template=template)
        (tmp_path / str(name)).mkdir()
        tokenizer.save(tmp_path / str(name))
        messages = [
            {"role": r, "content": c}
            for r, c in [("user", "the cat"), ("assistant", "the é"), ("user", "on")]
        ]
        ids = AutoTokenizer.from_pretrained(tmp_path / str(name)).apply_chat_template(
            messages, return_dict=False
        )
        assert chat.render(tokenizer, messages)[0].tolist() == ids
    for text in [*TEXTS, "a  b\n\n c<|im_start|>", " é\r\n🙂"]:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        assert ids == smollm.encode(text)
        assert theirs.decode(ids) == text
