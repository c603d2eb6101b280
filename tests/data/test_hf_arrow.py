"""Folders that `save_to_disk` writes, and datasets of the library `datasets`."""

import json
import sys
import types

import pyarrow as pa
import pytest

from rlhfjax.data import hf_arrow
from rlhfjax.data.sources import open_source
from rlhfjax.errors import ConfigError, DataError
from tests.data.test_formats import as_arrow, texts


def save(folder, names, **state):
    """Writes a folder as `datasets.Dataset.save_to_disk` does, one file per list of texts."""
    folder.mkdir(parents=True)
    files = []
    for i, part in enumerate(names):
        files.append({"filename": f"data-{i:05d}-of-{len(names):05d}.arrow"})
        content = as_arrow([{"text": text} for text in part], pa.ipc.new_stream)
        (folder / files[-1]["filename"]).write_bytes(content)
    described = {"_data_files": files, "_fingerprint": "0", "_split": None} | state
    (folder / "state.json").write_text(json.dumps(described))
    (folder / "dataset_info.json").write_text("{}")  # TFDS has a file of this name


def save_splits(folder):
    for split in ("train", "test", "dev"):
        save(folder / split, [[f"{split} 1", f"{split} 2"]])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test", "dev"]}')


@pytest.mark.parametrize("scheme", ["arrow:", ""])
def test_a_saved_dataset_is_its_files_in_order(tmp_path, scheme):
    save(tmp_path / "d", [["a", "b"], ["c"]])
    source = open_source(f"{scheme}{tmp_path}/d", split="all")
    assert texts(source) == ["a", "b", "c"]
    assert source.locate(2) == f"{tmp_path}/d/data-00001-of-00002.arrow: row 1"
    columns = {"text": "text", "copy": "text"}
    source = open_source(f"{scheme}{tmp_path}/d", split="all", columns=columns)
    assert source[0] == {"text": "a", "copy": "a"}
    with pytest.raises(ConfigError, match="split 'dev' is none of train"):
        open_source(f"{scheme}{tmp_path}/d", split="dev")


@pytest.mark.parametrize("scheme", ["arrow:", ""])
def test_a_saved_dict_of_datasets_has_its_own_splits(tmp_path, scheme):
    save_splits(tmp_path / "d")
    for split in ("train", "dev"):
        source = open_source(f"{scheme}{tmp_path}/d", split=split)
        assert texts(source) == [f"{split} 1", f"{split} 2"]
    assert len(open_source(f"{scheme}{tmp_path}/d", split="all")) == 6
    with pytest.raises(DataError, match="no split 'validation', found train, test"):
        open_source(f"{scheme}{tmp_path}/d", split="validation")


def test_a_selection_a_missing_file_and_a_damaged_state_are_errors(tmp_path):
    save(tmp_path / "a", [["x"]], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match=r"flatten_indices\(\)\.save_to_disk"):
        open_source(f"{tmp_path}/a", split="all")
    save(tmp_path / "b", [["x"], ["y"]])
    (tmp_path / "b" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: is missing"):
        open_source(f"{tmp_path}/b", split="all")
    for content in ("{", "[]", "{}", '{"_data_files": [3]}', '{"_data_files": []}'):
        (tmp_path / "b" / "state.json").write_text(content)
        with pytest.raises(DataError, match=r"^[^\n]*state\.json[^\n]*$"):
            open_source(f"{tmp_path}/b", split="all")
    save_splits(tmp_path / "c")
    (tmp_path / "c" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"dataset_dict\.json: splits"):
        open_source(f"{tmp_path}/c")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("squad", ["squad"]),
        ("owner/name", ["owner/name"]),
        ("owner/name/config", ["owner/name", "config"]),
    ],
)
def test_the_third_part_of_a_name_is_a_config(name, parts, monkeypatch, tmp_path):
    """The arguments of `load_dataset`, and the rows of the files that it keeps."""
    (tmp_path / "x.arrow").write_bytes(as_arrow([{"text": "a"}], pa.ipc.new_stream))
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        files = [{"filename": f"{tmp_path}/x.arrow"}]
        return types.SimpleNamespace(cache_files=files)

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert texts(open_source(f"hf-dataset:{name}", split="dev")) == ["a"]
    assert calls == [(tuple(parts), {"split": "dev"})]
    with pytest.raises(DataError, match="is not the name of a split"):
        open_source(f"hf-dataset:{name}", split="train[:5]")


@pytest.mark.parametrize("found", [None, types.ModuleType("datasets")])
def test_without_datasets_the_error_says_how_to_install_it(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", found)
    with pytest.raises(ConfigError, match=r"not installed; pip install -e .*datasets"):
        open_source("hf-dataset:squad")


@pytest.mark.slow
def test_the_library_itself(tmp_path, monkeypatch):
    """What it writes with `save_to_disk`, and what it keeps of a folder of files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(open_source(f"{tmp_path}/one", split="all")) == ["a", "b", "c"]
    rows.select([2, 0]).save_to_disk(tmp_path / "some")
    assert texts(open_source(f"{tmp_path}/some", split="all")) == ["c", "a"]
    both = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    both.save_to_disk(tmp_path / "both")
    assert texts(open_source(f"{tmp_path}/both", split="test")) == ["b"]
    (tmp_path / "csv").mkdir()
    rows.to_csv(tmp_path / "csv" / "train.csv", index=False)
    source = open_source(
        f"hf-dataset:{tmp_path}/csv", columns={"text": "text", "n": "n"}
    )
    assert [source[i] for i in range(2)] == [
        {"text": "a", "n": 1},
        {"text": "b", "n": 2},
    ]
    with pytest.raises(DataError, match="datasets cannot load it"):
        open_source(f"hf-dataset:{tmp_path}/csv", split="test")
    assert hf_arrow.library("x") is datasets
