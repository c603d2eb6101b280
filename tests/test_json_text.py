"""JSON text: what a parser of the standard reads, whatever the numbers are."""

import ast
import gzip
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from rlhfjax import json_text
from rlhfjax.config import write_json
from rlhfjax.errors import CheckpointError, DataError
from rlhfjax.jsonl import write_jsonl
from tests import sources

ROOT = Path(__file__).parents[1]
# Jinja's `tojson` in other people's chat templates, as transformers has it: it writes no file.
FREE = {ROOT / "rlhfjax" / "data" / "sandbox.py"}
LOADERS = ("load", "loads", "JSONDecoder")
# Files that run where the package is not: beside gcloud or kubectl, and on a TPU VM.
ALONE = {"launch/shell.py", "launch/tpu_worker.py"}


def strict(text: str):
    """The value of a JSON text by the standard, which has no NaN and no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def dump_calls(path: Path) -> list[ast.Call]:
    """The calls of json.dump and json.dumps in a file, whatever name json is imported under."""
    calls = [
        node for node in ast.walk(sources.tree(path)) if isinstance(node, ast.Call)
    ]
    names = [(ast.unparse(call.func), call) for call in calls]
    return [call for name, call in names if re.search(r"(?<!pickle\.)\bdumps?$", name)]


def load_calls(path: Path) -> list[ast.Call]:
    """The calls of json.load and json.loads in a file, whatever name json is imported under."""
    modules = {"json"}
    functions = set()
    for node in ast.walk(sources.tree(path)):
        if isinstance(node, ast.Import):
            modules |= {
                name.asname or name.name for name in node.names if name.name == "json"
            }
        elif isinstance(node, ast.ImportFrom) and node.module == "json":
            functions |= {
                name.asname or name.name
                for name in node.names
                if name.name in ("load", "loads", "JSONDecoder")
            }
    names = {f"{module}.{name}" for module in modules for name in LOADERS} | functions
    calls = [
        node for node in ast.walk(sources.tree(path)) if isinstance(node, ast.Call)
    ]
    return [call for call in calls if ast.unparse(call.func) in names]


def test_only_json_text_reads_json(tmp_path):
    """NaN, huge numbers, deep nesting: `json.loads` has an exception, or an answer, for each."""
    folders = ("rlhfjax", "launch", "benchmarks", "experiments")
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    reading = {str(path.relative_to(ROOT)) for path in files if load_calls(path)}
    assert reading == ALONE, "read JSON with rlhfjax.json_text"
    other = tmp_path / "x.py"
    other.write_text("import json as j\nfrom json import loads as l\nj.load(f), l(x)")
    assert len(load_calls(other)) == 2


def test_pitfall_35_no_encoder_lets_nan_pass():
    folders = [
        ROOT / name for name in ("rlhfjax", "launch", "benchmarks", "experiments")
    ]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    calls = [(path, call) for path in set(files) - FREE for call in dump_calls(path)]
    assert any(path.name == "json_text.py" for path, _ in calls)
    for path, call in calls:
        options = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert options.get("allow_nan") == "False", (
            f"{path}:{call.lineno}: use rlhfjax.json_text"
        )


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, "the value is nan"),
        ({"a": 1.0, "b": {"c": [0.0, -math.inf]}}, r"b\.c\[1\] is -inf"),
        ([{"score": np.float64("nan")}], r"\[0\]\.score is nan"),
    ],
)
def test_pitfall_35_a_number_that_json_lacks_is_an_error_with_its_place(
    tmp_path, value, place
):
    with pytest.raises(
        DataError, match=rf"^x\.json: {place}; JSON has no such number$"
    ):
        json_text.encode(value, "x.json")
    with pytest.raises(DataError, match=r"x\.json: .*JSON has no such number"):
        write_json(tmp_path / "x.json", value)
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*JSON has no such number"):
        write_jsonl(tmp_path / "x.jsonl", [{}, {"row": value}])
    assert not list(tmp_path.iterdir())


def test_pitfall_35_metrics_that_are_not_finite_are_null_and_read_as_nan():
    metrics = {"a": 0.1 + 0.2, "b": math.nan, "c": -math.inf, "d": np.float64("inf")}
    nulls = json_text.null_nonfinite(metrics)
    assert nulls == {"a": 0.1 + 0.2, "b": None, "c": None, "d": None}
    assert strict(json_text.encode(nulls, "")) == nulls
    again = json_text.nan_for_null(nulls)
    assert again["a"] == metrics["a"] and all(math.isnan(again[name]) for name in "bcd")
    nested = {"x": [1, (math.nan, "nan", None, True)]}
    assert json_text.null_nonfinite(nested) == {"x": [1, [None, "nan", None, True]]}


def test_other_errors_of_the_encoder_stay_what_they_are():
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_text.encode({"x": object()}, "")
    assert json_text.encode({"x": {1}}, "", default=list) == '{"x": [1]}'
    assert json_text.encode({"é": "ü"}, "") == '{"é": "ü"}'


@pytest.mark.parametrize(
    "text, value",
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('"\\ud83d\\ude00"', "😀"),
        ("1e308", 1e308),
        (b"1" + b"0" * 307, 10**307),
        ('{"model_max_length": 1000000000000000019884624838656}', None),
        ("[" * 199 + "]" * 199, None),
    ],
)
def test_strict_json_is_read(text, value):
    expected = json.loads(text) if value is None else value
    assert json_text.parse(text) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        ("NaN", "expected value at line 1 column 1"),
        ('{"a": -Infinity}', "invalid number at line 1 column 8"),
        ('{"a": [1, 1e400]}', "a[1] is beyond the range of float64"),
        ('{"a": {"b": 1%s}}' % ("0" * 400), "a.b is beyond the range of float64"),
        ("1" * 5000, "number out of range at line 1 column 4302"),
        ("9" * 199 + "e99.5", "trailing characters at line 1 column 203"),
        ("[" * 200_000, "recursion limit exceeded at line 1 column 202"),
        ('{"a":' * 200_000, "recursion limit exceeded at line 1 column 1006"),
        ('"\\ud800"', "unexpected end of hex escape at line 1 column 8"),
        ('"\ud800"', "lone surrogate at character 1"),
        (b'"\xff"', "invalid unicode code point at line 1 column 2"),
        (
            '{"a": 1}'.encode("utf-16"),
            "it is UTF-16 (iconv -f UTF-16 -t UTF-8 converts it); expected UTF-8 text",
        ),
        (
            gzip.compress(b"{}", mtime=0),
            "it is compressed by gzip (gunzip decompresses it); expected UTF-8 text",
        ),
        ("", "EOF while parsing a value at line 1 column 0"),
        ('{"a": 1', "EOF while parsing an object at line 1 column 7"),
        ("{} {}", "trailing characters at line 1 column 4"),
    ],
)
def test_other_texts_are_errors_with_a_place(text, reason):
    with pytest.raises(json_text.NotJson) as error:
        json_text.parse(text)
    assert str(error.value) == reason


def test_a_value_of_another_type_is_an_error_with_its_place():
    hint = dict[str, list[float]]
    assert json_text.decode('{"a": [1, 2.5]}', "x", hint) == {"a": [1, 2.5]}
    for text, place in [
        ("[]", "x: input should be a valid dictionary, got []"),
        ('{"a": [1, "2"]}', "x: a[1]: input should be a valid number, got '2'"),
        ('{"a": [true]}', "x: a[0]: input should be a valid number, got True"),
        ('{"a": null}', "x: a: input should be a valid list, got None"),
    ]:
        with pytest.raises(CheckpointError) as error:
            json_text.decode(text, "x", hint, error=CheckpointError)
        assert str(error.value) == place


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, reason in [
        (tmp_path, "is a folder; expected a file"),
        (tmp_path / "none", "there is no such file"),
        (loop, "Too many levels of symbolic links"),
        (pipe, "is a device or a pipe; expected a file"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / "a\0b", "embedded null byte"),
    ]:
        with pytest.raises(DataError, match=reason):
            json_text.read(path)
    assert json_text.read_if_there(tmp_path / "none") is None


def test_an_object_is_an_object_and_a_name_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert json_text.read_object(path) == {"a": 1}
    for text, value in (("[1]", r"\[1\]"), ("null", "None"), ('"a"', "'a'")):
        path.write_text(text)
        with pytest.raises(
            DataError, match=rf"x.json: expected a JSON object, got {value}$"
        ):
            json_text.read_object(path)
    assert json_text.named("blk.0.attn_q") == "blk.0.attn_q"
    assert json_text.named("a\nb") == r"'a\nb'"
    assert len(json_text.named("a" * 1000)) < 110
