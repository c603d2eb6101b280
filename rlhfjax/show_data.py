"""`rlhfjax data`: what a source is read as, its first example, and what is in it."""

import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import rich.console
import rich.text

from rlhfjax.data import formats, survey
from rlhfjax.data.rows import SPLITS, Row
from rlhfjax.data.sources import CheckedSource, open_source
from rlhfjax.data.survey import Survey, encoded
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError
from rlhfjax.tokenize_text import open_tokenizer, pieces, visible

MOST_TOKENS = 1000
"""Tokens of an example that are shown, the first ones."""
_STYLES = {False: "dim", True: "black on bright_green"}
_MARKS = ("⟦", "⟧")  # around what is learned, where there are no colors


class Options(NamedTuple):
    """What is looked at, see `data.sources.open_source`."""

    source: str
    kind: str | None = None
    form: str | None = None
    columns: Mapping[str, str] = {}
    split: str = "train"
    tokenizer: str = ""
    length: int = 0  # tokens of a training example; 0: nothing is cut
    documents: str = "file"
    data_dir: str | None = None
    limit: int = 0  # rows that are read, the first ones; 0: all

    def open(self, split: str) -> CheckedSource:
        """Returns a split; its rows are validated when they are read."""
        return open_source(
            self.source,
            kind=self.kind,
            split=split,
            columns=self.columns,
            data_dir=self.data_dir,
            documents=self.documents,
            validate=False,
            form=self.form,
        )


def run(options: Options) -> None:
    """Prints what a source is read as, its first example, and what is in it.

    Raises:
      ConfigError, DataError: the source cannot be opened, or it has no row that can be read.
    """
    tokenizer = open_tokenizer(options.tokenizer) if options.tokenizer else None
    source = options.open(options.split)
    first = first_row(source)
    for name, value in recognized(options, source).items():
        print(f"{name:12} {value}")
    print()
    print_example(tokenizer, source.kind, first)
    print(flush=True)
    counts = Survey(source, tokenizer, options.length, options.limit)
    for name, value in numbers(options, source.kind, counts):
        print(f"{name:12} {value}")
    for other, split in other_splits(options):
        duplicates = survey.shared(counts.hashes, other.hashes)
        print(f"{'in ' + split:12} {duplicates:,} of {other.rows:,} rows are here too")


def first_row(source: CheckedSource) -> Row:
    """Returns the first row that can be read. Raises DataError with the first reason if none."""
    reason: DataError | None = None
    for index in range(len(source)):
        try:
            return source[index]
        except DataError as error:
            reason = reason or error
    raise reason or DataError("there is no row")


def recognized(options: Options, source: CheckedSource) -> dict[str, str]:
    """Returns what was recognized, by what it is."""
    mapped = [f"{ours} = {column}" for ours, column in options.columns.items()]
    found = ", ".join(source.columns())
    return {
        "source": f"{options.source}, {options.split}",
        "format": formats.parse(options.source).scheme,
        "form": source.form or "none",
        "kind": source.kind,
        "columns": f"{found}; {', '.join(mapped)}" if mapped else found,
    }


def numbers(options: Options, kind: str, counts: Survey) -> Iterator[tuple[str, str]]:
    """Yields the names of counts with their texts."""
    yield "rows", f"{counts.rows:,}"
    yield "skipped", f"{counts.skipped:,}"
    for reason in counts.reasons:
        yield "", visible(reason)
    yield (
        "merged",
        f"{counts.merged:,} turns joined to the turn before of the same role",
    )
    yield "duplicates", f"{counts.duplicates:,}"
    if not options.tokenizer:
        yield "tokens", "give --tokenizer to count them"
        return
    if values := counts.percentiles():
        names = [f"{percent} %" for percent in survey.PERCENTILES]
        names[0], names[-1] = "least", "most"
        pairs = zip(names, values, strict=True)
        yield "tokens", ", ".join(f"{name}: {value:,}" for name, value in pairs)
    if options.length:
        share = counts.cut / max(counts.examples, 1)
        verb = "are split" if kind == "text" else "lose tokens"
        yield (
            "cut",
            f"{share:.1%} of {counts.examples:,} examples {verb} at {options.length} tokens",
        )


def other_splits(options: Options) -> Iterator[tuple[Survey, str]]:
    """Yields the other splits that there are; none beside "all"."""
    if options.split not in SPLITS:
        return
    for split in SPLITS:
        if split == options.split:
            continue
        try:
            source = options.open(split)
        except DataError:  # there is no such split
            continue
        yield Survey(source, None, 0, options.limit), split


# ------------------------------------------------------------------ the example


def print_example(tokenizer: Tokenizer | None, kind: str, row: Row) -> None:
    """Prints a row with its loss mask: as tokens, or without a tokenizer as its texts."""
    console = rich.console.Console() if sys.stdout.isatty() else None
    legend = "green" if console else f"between {_MARKS[0]} and {_MARKS[1]}"
    print(f"first example; what counts in the loss is {legend}")
    for text in texts_of(tokenizer, kind, row):
        if console:
            console.print(text)
        else:
            print(marked(text))


def texts_of(
    tokenizer: Tokenizer | None, kind: str, row: Row
) -> Iterator[rich.text.Text]:
    """Yields the sequences of a row as tokens, or without a tokenizer its parts as texts."""
    if tokenizer is None:
        for label, content, learned in parts_of(kind, row):
            text = rich.text.Text()
            if label:
                text.append(f"{label}: ", _STYLES[False])
            yield text.append(visible(content[: 4 * MOST_TOKENS]), _STYLES[learned])
        return
    sequences = encoded(tokenizer, kind, row)
    for (tokens, mask), label in zip(sequences, labels_of(kind, row), strict=True):
        if label:
            yield rich.text.Text().append(f"--- {label}", _STYLES[False])
        yield colored(tokenizer, tokens, mask)


def labels_of(kind: str, row: Row) -> list[str]:
    """Returns what stands above each sequence of a row."""
    if kind == "preferences":
        return [f"score {score:g}" for score in row["scores"]]
    if kind == "unpaired":
        return ["desirable" if row["desirable"] else "undesirable"]
    if kind == "steps":
        return ["labels " + ", ".join(f"{label:g}" for label in row["labels"])]
    return [""]


def colored(
    tokenizer: Tokenizer, tokens: list[int], mask: list[float]
) -> rich.text.Text:
    """Returns a sequence, with what counts in the loss in another style."""
    text = rich.text.Text()
    shown = pieces(tokenizer, tokens[:MOST_TOKENS])
    for piece, learned in zip(shown, mask, strict=False):
        text.append(visible(piece.text), _STYLES[learned > 0])
    if len(tokens) > MOST_TOKENS:
        text.append(f" … {len(tokens) - MOST_TOKENS:,} more tokens", _STYLES[False])
    return text


def marked(text: rich.text.Text) -> str:
    """Returns a text with marks around what counts in the loss."""
    parts: list[str] = []
    inside = False
    for span in text.spans:
        learned = span.style == _STYLES[True]
        if learned != inside:
            parts.append(_MARKS[not learned])
        inside = learned
        parts.append(text.plain[span.start : span.end])
    return "".join(parts) + (_MARKS[1] if inside else "")


def parts_of(kind: str, row: Row) -> Iterator[tuple[str, str, bool]]:
    """Yields the parts of a row: what it is, its text, and whether it counts in the loss."""
    if kind == "text":
        yield "", row["text"], True
        return
    for turn in row.get("messages") or [{"role": "user", "content": row["prompt"]}]:
        beside = turn.get("tools", "") + turn.get("tool_calls", "")
        content = "\n".join(filter(None, (turn["content"], beside)))
        learned = kind == "messages" and turn["role"] == "assistant"
        yield turn["role"], content, learned
    if kind == "preferences":
        for label, text in zip(labels_of(kind, row), row["completions"], strict=True):
            yield label, text, True
    if kind == "unpaired":
        yield labels_of(kind, row)[0], row["response"], True
    if kind == "steps":
        for label, step in zip(row["labels"], row["steps"], strict=True):
            yield f"label {label:g}", step, True
