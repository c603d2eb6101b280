"""`rlhfjax tokenize`: how tokenizers cut a text, one beside the other."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.console
import rich.markup
import rich.table
import rich.text

from rlhfjax import json_text, paths
from rlhfjax.data.chat import Message, render, render_prompt
from rlhfjax.data.hf_tokenizer import FILE
from rlhfjax.data.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.evals.text import count_runs
from rlhfjax.interop import foreign, store

# Backgrounds of neighboring pieces, which differ in terminals of 16 colors too.
_COLORS = ("bright_yellow", "bright_cyan", "bright_magenta", "bright_green")
_SPECIAL = "bold white on bright_black"
_LINE_END = "↵"


class Piece(NamedTuple):
    """A token and its part of the text."""

    id: int
    text: str  # bytes of a part of a character are spelled <0xE2>
    special: bool = False  # the text is its name


def run(names: Sequence[str], text: str, *, chat: bool, system: str = "") -> None:
    """Prints how each tokenizer cuts a text.

    Args:
      names: workdirs, tokenizers' folders or files, or foreign names (see `interop.foreign`).
      chat: render the text with the chat template: a user's message, or a JSON array of messages.
    Raises:
      DataError, CheckpointError: there is no tokenizer, or its template does not take the messages.
    """
    measured = {}
    for name in names:
        tokenizer = open_tokenizer(name)
        ids = encode(tokenizer, text, chat=chat, system=system)
        measured[name] = Cut(tokenizer, ids, "" if chat else text)
    if sys.stdout.isatty():
        rich.console.Console().print(_table(measured))
    else:
        print(_lines(measured))


def open_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of a workdir, a folder, a file or a foreign name.

    Raises:
      CheckpointError: there is none.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "hf":
        return load_tokenizer(rest)
    if model := foreign.find(name):
        return model.tokenizer()
    path = paths.path(name)
    stages = reversed(store.numbered(path))
    folders = [path, path / store.FOLDER]
    for stage in stages:
        folders += [stage / store.FOLDER, stage]
    if path.is_file():
        return load_tokenizer(path)
    for folder in folders:
        if (folder / FILE).is_file() or (folder / MODEL_FILE).is_file():
            return load_tokenizer(folder)
    raise CheckpointError(
        f"{name}: no tokenizer here; expected a workdir, a folder with {FILE} or {MODEL_FILE}, "
        "or hf:FOLDER, gguf:FILE, pip:PACKAGE"
    )


def encode(
    tokenizer: Tokenizer, text: str, *, chat: bool = False, system: str = ""
) -> list[int]:
    """Returns the ids of a text, or of a conversation in the chat template.

    A conversation that ends with a user's message is followed by the generation prompt.
    """
    if not chat:
        return tokenizer.encode(text)
    messages = _messages(text)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    if messages[-1]["role"] == "assistant":
        return render(tokenizer, messages)[0].tolist()
    return render_prompt(tokenizer, messages).tolist()


def _messages(text: str) -> list[Message]:
    if not text.lstrip().startswith("["):
        return [{"role": "user", "content": text}]
    messages = json_text.decode(text, "--chat", list[dict[str, str]], error=ConfigError)
    for message in messages:
        if set(message) != {"role", "content"}:
            raise ConfigError("--chat: expected messages with 'role' and 'content'")
    if not messages:
        raise ConfigError("--chat: expected at least one message")
    return messages


# ------------------------------------------------------------------ pieces


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """Returns the tokens with their texts.

    A character of several tokens is spelled in bytes, each with the token that has it.
    """
    names = {i: text for text, i in tokenizer.template.specials.items()}
    lengths = tokenizer.byte_lengths()
    result: list[Piece] = []
    before: list[int] = []  # the last whole group: it decides about a blank
    group: list[int] = []
    for position, i in enumerate(ids):
        if i in names:
            result.append(Piece(i, names[i], special=True))
            before = []
            continue
        group.append(i)
        text = tokenizer.decode([*before, *group])[len(tokenizer.decode(before)) :]
        following = ids[position + 1] if position + 1 < len(ids) else None
        is_last = following is None or following in names
        if text.endswith("\ufffd") and not is_last:
            continue
        result += _split(group, text, [int(lengths[i]) for i in group])
        before, group = group, []
    return result


def _split(group: Sequence[int], text: str, lengths: Sequence[int]) -> list[Piece]:
    """Returns the pieces of tokens that have a text together."""
    content = text.encode()
    if len(group) == 1 or sum(lengths) != len(content):
        rest = [Piece(i, "") for i in group[1:]]
        return [Piece(group[0], text), *rest]
    result = []
    start = 0
    for i, length in zip(group, lengths, strict=True):
        part = content[start : start + length]
        result.append(Piece(i, _with_bytes(part)))
        start += length
    return result


def _with_bytes(content: bytes) -> str:
    """Returns the text of some bytes; those of no whole character are spelled <0xE2>."""
    text = content.decode("utf-8", "surrogateescape")
    return re.sub(
        "[\udc80-\udcff]", lambda half: f"<0x{ord(half[0]) - 0xDC00:02X}>", text
    )


def colored(tokens: Iterable[Piece]) -> rich.text.Text:
    """Returns the pieces side by side, neighbors in different colors."""
    text = rich.text.Text()
    for number, piece in enumerate(tokens):
        color = _COLORS[number % len(_COLORS)]
        style = _SPECIAL if piece.special else f"black on {color}"
        shown = visible(piece.text, keep="\n")
        text.append(shown.replace("\n", _LINE_END), style)
        if "\n" in piece.text:
            text.append("\n")
    return text


def visible(text: str, keep: str = "\n\t") -> str:
    """Returns a text with escapes in place of control characters, which a terminal would obey.

    Args:
      keep: control characters that stay.
    """
    return "".join(
        char
        if char in keep or char.isprintable()
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def print_pieces(tokenizer: Tokenizer, ids: Sequence[int], file: Any) -> None:
    """Prints the pieces into a text file: in color in a terminal, else as a JSON array."""
    tokens = pieces(tokenizer, ids)
    if file.isatty():
        rich.console.Console(file=file).print(colored(tokens))
    else:
        print(json_text.encode([piece.text for piece in tokens], "pieces"), file=file)


# ------------------------------------------------------------------ what is printed


class Cut(NamedTuple):
    """A text as one tokenizer cuts it."""

    tokenizer: Tokenizer
    ids: list[int]
    text: str  # "" for a conversation, whose tokens are not those of a text alone

    def numbers(self) -> dict[str, str]:
        """Returns counts and ratios, by what they count."""
        count = len(self.ids)
        numbers = {
            "vocabulary": str(self.tokenizer.vocab_size),
            "tokens": str(count),
        }
        units = {
            "word": count_runs(self.text),
            "character": len(self.text),
            "byte": len(self.text.encode()),
        }
        for unit, units_in_text in units.items():
            if units_in_text:
                numbers[f"tokens per {unit}"] = f"{count / units_in_text:.3f}"
        return numbers


def _table(cuts: Mapping[str, Cut]) -> rich.table.Table:
    """Returns a table with one column per tokenizer."""
    table = rich.table.Table("", *map(rich.markup.escape, cuts))
    numbers = [cut.numbers() for cut in cuts.values()]
    for name in numbers[0]:
        table.add_row(name, *(column[name] for column in numbers))
    table.add_section()
    tokens = [colored(pieces(cut.tokenizer, cut.ids)) for cut in cuts.values()]
    table.add_row("pieces", *tokens, end_section=True)
    table.add_row("ids", *(" ".join(map(str, cut.ids)) for cut in cuts.values()))
    return table


def _lines(cuts: Mapping[str, Cut]) -> str:
    """Returns the same as text, one tokenizer after the other."""
    lines = []
    for name, cut in cuts.items():
        tokens = pieces(cut.tokenizer, cut.ids)
        rows = cut.numbers()
        rows["pieces"] = json_text.encode([piece.text for piece in tokens], "pieces")
        rows["ids"] = " ".join(map(str, cut.ids))
        lines.append(name)
        lines += [f"  {label:20} {value}" for label, value in rows.items()]
    return "\n".join(lines)
