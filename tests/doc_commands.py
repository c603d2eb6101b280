"""Reads commands and files out of the repository's Markdown pages.

A page can mark its blocks of code with a comment on a line before the block:

    <!-- file: recipe.py -->         the block is the content of a file that the reader writes
    <!-- nightly -->                 the nightly tests really run the commands of the block
    <!-- nightly: --config.x=1 -->   the same, with arguments that make a run of them small
    <!-- mistake -->                 the command of the block is an error, which the block shows

A reader's commands run in the folder of the repository, or in an empty folder if a page has files.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "experiments", "experiments/*", "launch", "benchmarks")
_MARK = re.compile(r"<!-- (file|nightly|mistake)(?:: (.*))? -->")
_VARIABLE = re.compile(r"[A-Z_]+=\S*")
_OPERATOR = re.compile(r"[;&|<>]+")
_INLINE = re.compile(r"`([^`]+)`")
PROGRAMS = ("rlhfjax", "python", "pytest", "pip", "bash", "tensorboard")


class Block(NamedTuple):
    """A block of code."""

    page: str  # path in the repository
    line: int  # of its first line, from 1
    text: str
    mark: str = ""  # file, nightly, mistake or nothing
    argument: str = ""  # of the mark


class Command(NamedTuple):
    """A command of a page."""

    page: str
    line: int
    words: tuple[str, ...]
    block: Block | None = None  # None: it stands within a sentence

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words)}"


def pages() -> list[str]:
    """Returns the paths of all pages whose commands a reader may type."""
    found = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md")]
    names = {str(path.relative_to(ROOT)) for path in found}
    return sorted(names - {"CHANGELOG.md", "experiments/LOG.md"})


def blocks(page: str) -> list[Block]:
    """Returns the blocks of code of a page, fenced or indented."""
    lines = (ROOT / page).read_text().splitlines()
    found: list[Block] = []
    mark = argument = ""
    number = 0
    while number < len(lines):
        line = lines[number]
        if marked := _MARK.fullmatch(line.strip()):
            mark, argument = marked[1], marked[2] or ""
            number += 1
            continue
        end = _end_of_block(lines, number)
        if end > number:
            start = number + line.lstrip().startswith("```")
            stop = end - (start > number)
            text = "\n".join(_dedented(lines[start:stop])) + "\n"
            found.append(Block(page, start + 1, text, mark, argument))
        if line.strip():
            mark = argument = ""
        number = max(end, number + 1)
    return found


def _end_of_block(lines: list[str], start: int) -> int:
    """Returns the number of the line after the block that begins here; `start` if none does."""
    line = lines[start]
    if line.lstrip().startswith("```"):
        ends = (i for i in range(start + 1, len(lines)) if "```" in lines[i])
        return next(ends, len(lines) - 1) + 1
    begins = start == 0 or not lines[start - 1].strip() or "<!--" in lines[start - 1]
    if not (begins and line.startswith("    ")):
        return start
    end = start
    for i in range(start, len(lines)):
        if lines[i].strip() and not lines[i].startswith("    "):
            break
        if lines[i].strip():
            end = i + 1
    return end


def _dedented(lines: list[str]) -> list[str]:
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    least = min(indents, default=0)
    return [line[least:] for line in lines]


def files(page: str) -> dict[str, str]:
    """Returns the files that a reader of a page writes: {name: content}."""
    return {
        block.argument: block.text for block in blocks(page) if block.mark == "file"
    }


def commands(page: str) -> list[Command]:
    """Returns the commands of a page: those of its blocks, then those within its sentences."""
    found = [command for block in blocks(page) for command in _of_block(block)]
    return found + list(_inline(page))


def _of_block(block: Block) -> Iterator[Command]:
    if block.mark == "file":
        return
    joined = re.sub(r"\\\n\s*", lambda m: " ", block.text)
    for number, line in enumerate(joined.splitlines()):
        for words in split(line):
            yield Command(block.page, block.line + number, words, block)


def _inline(page: str) -> Iterator[Command]:
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if line.startswith("    "):
            continue
        for text in _INLINE.findall(line):
            for words in split(text):
                if len(words) > 1:
                    yield Command(page, number, words)


def split(line: str) -> Iterator[tuple[str, ...]]:
    """Yields the words of each of our commands in a line of a shell."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # no line of a shell
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if not _OPERATOR.fullmatch(word):
            command.append(word)
            continue
        if word == ">" and command and command[-1] == "2":  # 2> FILE
            command.pop()
        while command and _VARIABLE.fullmatch(command[0]):
            command = command[1:]
        if command and command[0] in PROGRAMS and not _is_output(command):
            yield tuple(command)
        command = []


def _is_output(words: list[str]) -> bool:
    """Returns whether a line is the greeting of a run, `rlhfjax 0.1.0: …`."""
    return len(words) > 1 and re.fullmatch(r"[\d.]+:", words[1]) is not None
