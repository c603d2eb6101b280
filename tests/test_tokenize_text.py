"""`rlhfjax tokenize`: pieces, their texts, and several tokenizers side by side."""

import io
import itertools
import json

import pytest
import rich.console
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlhfjax import tokenize_text
from rlhfjax.data.chat import render, render_prompt
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.tokenize_text import colored, open_tokenizer, pieces
from tests.test_main import call, refused

TEXTS = [
    "tea and rain and tea",
    "wörld 🌧!",
    "a\tb\n\nc",
    " two  blanks ",
    "<|user|>",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a SentencePiece model, and one with byte-level BPE beside it."""
    root = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(["tea and rain and tea"], root / "ours", vocab_size=290)
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*specials, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    (root / "bytes").mkdir()
    backend.save(str(root / "bytes" / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (root / "bytes" / "tokenizer_config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("kind", ["ours", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_whole_characters_are_the_text(folder, kind, text):
    tokenizer = open_tokenizer(str(folder / kind))
    ids = tokenizer.encode(text)
    got = pieces(tokenizer, ids)
    assert [piece.id for piece in got] == ids
    spelled = "".join(piece.text for piece in got)
    for char in "ö🌧":
        in_bytes = "".join(f"<0x{byte:02X}>" for byte in char.encode())
        spelled = spelled.replace(in_bytes, char)
    assert spelled == text


def test_bytes_of_a_character_stand_with_their_tokens(folder):
    tokenizer = open_tokenizer(str(folder / "bytes"))
    got = [piece.text for piece in pieces(tokenizer, tokenizer.encode("aö b"))]
    assert got == ["a", "<0xC3>", "<0xB6>", " ", "b"]
    cut = [piece.text for piece in pieces(tokenizer, tokenizer.encode("ö")[:1])]
    assert len(cut) == 1


def test_a_conversation_has_its_special_tokens(folder):
    tokenizer = open_tokenizer(str(folder / "ours"))
    ids = tokenize_text.encode(tokenizer, "tea", chat=True, system="rain")
    messages = [
        {"role": "system", "content": "rain"},
        {"role": "user", "content": "tea"},
    ]
    assert ids == render_prompt(tokenizer, messages).tolist()
    got = pieces(tokenizer, ids)
    specials = [piece.text for piece in got if piece.special]
    assert specials == [
        "<s>",
        "<|system|>",
        "</s>",
        "<|user|>",
        "</s>",
        "<|assistant|>",
    ]
    messages.append({"role": "assistant", "content": "tea"})
    ids = tokenize_text.encode(tokenizer, json.dumps(messages), chat=True)
    assert ids == render(tokenizer, messages)[0].tolist()
    for text in ("[", "[]", "[1]", '[{"role": "user"}]'):
        with pytest.raises(ConfigError, match=r"^--chat: "):
            tokenize_text.encode(tokenizer, text, chat=True)


def test_neighbors_have_different_colors_and_no_piece_commands_the_terminal(folder):
    tokenizer = open_tokenizer(str(folder / "ours"))
    ids = tokenizer.encode("a\x1b[2J\n")
    text = colored(pieces(tokenizer, ids))
    styles = [str(span.style) for span in text.spans]
    assert len(styles) == len(ids)
    assert all(a != b for a, b in itertools.pairwise(styles))
    assert "\x1b" not in text.plain and text.plain.endswith("↵\n")


def test_tokenizers_side_by_side(folder):
    cuts = {}
    for kind in ("ours", "bytes"):
        tokenizer = open_tokenizer(str(folder / kind))
        ids = tokenizer.encode("tea tea")
        cuts[kind] = tokenize_text.Cut(tokenizer, ids, "tea tea")
    out = io.StringIO()
    rich.console.Console(file=out, width=100).print(tokenize_text._table(cuts))
    table = {}
    for line in out.getvalue().splitlines():
        cells = [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        if len(cells) == 3:
            table[cells[0]] = cells[1:]
    assert table[""] == ["ours", "bytes"]
    assert table["tokens"] == [str(len(cuts["ours"].ids)), "7"]
    assert table["tokens per word"][1] == "3.500"
    assert table["tokens per byte"][1] == "1.000"
    assert table["pieces"] == ["tea tea"] * 2


def test_the_command(folder, capsys):
    """A text as arguments anywhere, or on the standard input; two tokenizers."""
    ours, bytes_ = (f"--model={folder}/{kind}" for kind in ("ours", "bytes"))
    code, out, _ = call(capsys, "tokenize", ours, "tea", bytes_, "rain")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{folder}/ours" and f"{folder}/bytes" in lines
    shown = [line.split(None, 1)[1] for line in lines if line.startswith("  pieces")]
    assert json.loads(shown[1]) == list("tea rain")
    assert "  tokens per character 1.000" in lines
    code, out, _ = call(capsys, "tokenize", "--chat", ours, "--text=tea")
    assert code == 0 and '"<|user|>"' in out and "per word" not in out


def test_a_finished_recipe_has_a_tokenizer(finished):
    names = (finished, finished / "00_tokenizer", finished / "05_ppo" / "model")
    first, *others = (open_tokenizer(str(name)) for name in names)
    assert all(other == first for other in others)


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    assert "tokenize: give --model" in refused(capsys, "tokenize", "x")
    line = refused(capsys, "tokenize", f"--model={tmp_path}", "x", code=1)
    assert f"{tmp_path}: no tokenizer here" in line
    line = refused(capsys, "tokenize", f"--model={folder}/bytes", "--chat", "x", code=1)
    assert "no chat template" in line
    with pytest.raises(CheckpointError):
        open_tokenizer("pip:no-such-package")
