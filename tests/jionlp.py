"""A package that looks like jionlp: its tables, with a few rows that we wrote."""

import zipfile
from pathlib import Path

WORDS = (
    ("高兴", "1.愉快而兴奋。"),
    ("边境", "靠近边界的地方。"),
    ("高兴", "第二个解释。"),  # a word's second entry
    ("没有解释", ""),
)
SAYINGS = (("孔夫子搬家", "尽是书"), ("泥菩萨过河", "自身难保"))
VALENCES = (("高兴", "1.1"), ("愉快", "1.5"), ("讨厌", "-1.7"), ("不信", "-1.1"))
NEGATIONS = ("不", "没有")


def write(folder: Path) -> Path:
    """Writes the package into a folder; returns that of its tables. Importing it is an error."""
    package = folder / "jionlp"
    tables = package / "dictionary"
    tables.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    write_table(tables, "chinese_word_dictionary", WORDS)
    write_table(tables, "xiehouyu", SAYINGS)
    write_table(tables, "sentiment_words", VALENCES)
    (tables / "negative_words.txt").write_text("\n".join(NEGATIONS) + "\n")
    return tables


def write_table(folder: Path, name: str, rows) -> None:
    text = "".join("\t".join(row) + "\n" for row in rows)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.writestr(f"{name}.txt", text)
