"""The option `preferences`: folders and specs as before, and sources with options of their own."""

import dataclasses
import json

import pytest

from rlhfjax import config, dry_run, options, recipe, references
from rlhfjax.data.config import SourceConfig, open_preferences
from rlhfjax.data.mixture import Mixed
from rlhfjax.data.preferences import write_preferences
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.stages import reward, stage_config
from tests.data.row_forms import GOLDEN
from tests.data.test_preferences import ROWS


def lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair(prompt):
    return {"q": prompt, "good": "A wren.", "bad": "An oak."}


COLUMNS = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def pairs(tmp_path):
    """A source of pairs with other names of columns, in two files named by split."""
    lines(tmp_path / "train.jsonl", pair("a"), pair("b"), {"q": 3})
    lines(tmp_path / "test.jsonl", pair("c"))
    return SourceConfig(
        f"jsonl:{tmp_path}/{{split}}.jsonl",
        split="train,test",
        columns=COLUMNS,
        on_bad_row="skip",
    )


def prompts(source):
    return [source[i]["prompt"] for i in range(len(source))]


def test_a_source_has_columns_splits_and_bad_rows(pairs):
    train = open_preferences((pairs,), "train")
    assert prompts(train) == ["a", "b"] and train.skipped == 1
    assert prompts(open_preferences((pairs,), "validation")) == ["c"]


def test_held_out_rows_are_those_of_validation_by_default(tmp_path, pairs):
    lines(tmp_path / "validation.jsonl", pair("d"))
    entry = dataclasses.replace(pairs, split="train")
    assert prompts(open_preferences((entry,), "validation")) == ["d"]
    named = dataclasses.replace(pairs, split="test,validation")
    assert prompts(open_preferences((named,), "train")) == ["c"]


def test_folders_specs_and_sources_stand_beside_each_other(tmp_path, pairs):
    folder = tmp_path / "collected"
    write_preferences(folder, {"train": ROWS[:2]}, labeler="x")
    spec = f"jsonl:{lines(tmp_path / 'own.jsonl', GOLDEN['preferences'].raw)}"
    entries = (str(folder), pairs, SourceConfig(str(folder), limit=1), spec)
    source = open_preferences(entries[:3], "train")
    expected = [ROWS[0]["prompt"], ROWS[1]["prompt"], "a", "b", ROWS[0]["prompt"]]
    assert prompts(source) == expected
    assert source[0]["prompt_tokens"].tolist() == ROWS[0]["prompt_tokens"]
    assert source.locate(2).endswith("train.jsonl:1")


def test_preferences_are_mixed_by_their_weights(pairs):
    """Held-out rows are not: each is there once, whatever the weights."""
    heavy = dataclasses.replace(pairs, weight=3.0)
    light = dataclasses.replace(pairs, weight=1.0, split="test,train", limit=1)
    train = open_preferences((heavy, light), "train")
    assert isinstance(train, Mixed) and train.weights == [3.0, 1.0]
    assert prompts(train) == ["a", "b", "c"]
    assert prompts(open_preferences((heavy, light), "validation")) == ["c", "a"]
    with pytest.raises(ConfigError, match=r"reward\.preferences\[1\]\.weight=None"):
        open_preferences((heavy, pairs), "train")


def test_other_kinds_are_refused_by_name(tmp_path):
    file = lines(tmp_path / "kto.jsonl", GOLDEN["kto"].raw)
    entry = SourceConfig(f"jsonl:{file}", kind="unpaired", split="all")
    why = r"reward\.preferences: kind='unpaired' of jsonl:.*: expected preferences"
    with pytest.raises(ConfigError, match=why):
        open_preferences((entry,), "train")
    with pytest.raises(DataError, match="columns of form 'kto', of kind unpaired"):
        open_preferences((dataclasses.replace(entry, kind=None),), "train")


def test_unpaired_rows_are_single_completions_with_a_score(tmp_path):
    kto = GOLDEN["kto"].raw
    file = lines(tmp_path / "kto.jsonl", kto, kto | {"label": True})
    entry = SourceConfig(f"jsonl:{file}", kind="unpaired", split="all")
    source = open_preferences((entry,), "train", "direct", ("unpaired",))
    assert source.kind == "preferences"
    assert [source[i]["scores"] for i in range(2)] == [[0.0], [1.0]]
    assert source[0]["completions"] == ["An oak."]
    assert source[0]["messages"] == GOLDEN["kto"].row["messages"]


# ------------------------------------------------------------------ configs


def built(*entries):
    values = stage_config(
        "reward", preferences=entries, length=8, batch_size=1, steps=1
    )
    values = config.to_dict(values) | {"init_from": "x"}
    return config.build(reward.Config, values, "reward")


def test_a_config_takes_texts_and_mappings():
    entry = {"spec": "jsonl:a", "columns": {"prompt": "q"}, "form": "pair"}
    typed = built("folder", entry)
    expected = SourceConfig("jsonl:a", columns={"prompt": "q"}, form="pair")
    assert typed.preferences == ("folder", expected)
    filled = config.fill_defaults(reward.Config, {"preferences": ["folder", entry]})
    assert filled["preferences"][0] == "folder"
    assert filled["preferences"][1] == config.to_dict(expected)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (
            {"spec": "a", "colums": {}},
            r"reward\.preferences\[0\]\.colums: no such option;",
        ),
        ({"columns": {}}, r"reward\.preferences\[0\]\.spec: a value is required"),
        ({"spec": "a", "split": 3}, r"reward\.preferences\[0\]\.split=3: expected str"),
        (3, r"reward\.preferences\[0\]=3: expected SourceConfig \| str"),
    ],
)
def test_a_mistake_in_an_entry_has_its_place(entry, why):
    with pytest.raises(ConfigError, match=why):
        built(entry)


def test_options_of_an_entry_are_listed():
    names = [option.name for option in options.options(reward.Config)]
    assert {"preferences", "preferences[].spec", "preferences[].form"} <= set(names)


def test_flags_set_options_of_an_entry(tmp_path):
    from ml_collections import ConfigDict

    from rlhfjax.experiment import overridden

    values = ConfigDict(
        {"preferences": ({"spec": "jsonl:a", "split": "train"}, "folder")}
    )
    words = ["--config.preferences[0].split=all"]
    assert overridden(values, words).preferences[0]["split"] == "all"
    words = ["--config.preferences=({'spec': 'jsonl:b', 'form': 'pair'},)"]
    assert overridden(values, words).preferences[0]["form"] == "pair"


def test_a_recipe_refers_to_stages_and_files_in_entries(tmp_path, pairs):
    folders = {"collect": tmp_path / "00_collect", "reward": tmp_path / "01_reward"}
    entry = {"spec": "stage:collect/preferences", "limit": 3}
    resolved = recipe.resolve({"preferences": (entry,)}, folders, "reward")
    assert resolved["preferences"][0]["spec"] == f"{folders['collect']}/preferences"
    made = references._Stage("reward", None, None, (str(folders["collect"]),))
    made._validate_source(
        "reward.preferences[0]", SourceConfig(**resolved["preferences"][0])
    )
    made._validate_source("reward.preferences[0]", pairs)
    other = dataclasses.replace(pairs, form="alpaca")
    why = (
        r"preferences\[0\]: form='alpaca' gives rows of kind messages, not preferences"
    )
    with pytest.raises(ConfigError, match=why):
        made._validate_source("reward.preferences[0]", other)
    missing = dataclasses.replace(pairs, split="valid")
    with pytest.raises(
        DataError, match=r"preferences\[0\]\.spec=.*valid\.jsonl: no file matches"
    ):
        made._validate_source("reward.preferences[0]", missing)


def test_a_dry_run_counts_the_rows_of_an_entry(pairs):
    typed = {"reward": built(config.to_dict(pairs))}
    (data,) = dry_run._data(typed, {})
    assert data.rows == "2 rows, 1 malformed ones left out"
