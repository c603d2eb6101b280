"""JSON lines: what is read, and that every error names its file and line."""

import pytest

from rlhfjax.errors import DataError
from rlhfjax.jsonl import located_rows, read_jsonl


def test_a_half_written_character_at_the_end_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1, "x": 1.0}\n{"step": 1, "é'.encode()[:-1])
    assert read_jsonl(path) == [{"step": 1, "x": 1.0}]
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        list(located_rows(path))


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_jsonl(path)
    path.write_text('{"step": 1}\n[3]\n')
    with pytest.raises(
        DataError, match=r"metrics\.jsonl:2: expected a JSON object, got list$"
    ):
        read_jsonl(path)


def test_a_rows_place_counts_blank_lines_and_windows_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\r\n  \r\n{"a": 2}\r\n')
    assert list(located_rows(path)) == [
        (f"{path}:1", {"a": 1}),
        (f"{path}:4", {"a": 2}),
    ]


def test_a_file_that_is_not_there(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file"):
        list(located_rows(tmp_path / "none.jsonl"))
