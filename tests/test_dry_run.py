"""What `--dry_run` and `--print_config` print, without a run."""

import json
import shlex
from pathlib import Path

import pytest

from rlhfjax import dry_run, experiment, paths, recipe
from rlhfjax import main as command_line
from rlhfjax.config import to_dict
from rlhfjax.data import kept
from rlhfjax.mesh import MeshConfig
from rlhfjax.rerun import Choice
from rlhfjax.stages import stage_config

ROOT = Path(__file__).parent.parent
TINY = f"{ROOT}/tests/tiny.py"


@pytest.fixture
def config(conversations):
    return experiment.load(f"{TINY}:data={conversations}").config()


def finish(config, workdir: Path, *names: str) -> None:
    """Writes the files by which stages count as finished."""
    values = to_dict(config)
    for name, folder in recipe.stage_folders(values, paths.path(str(workdir))).items():
        if name in names:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(values[name]))
            (folder / "done.json").write_text('{"metrics": {}}')
    (workdir / "config.json").write_text(json.dumps(values))


def show(config, workdir: Path, capsys, choice=None) -> dict[str, str]:
    """Returns {stage: the rest of its line} of the first table, and all lines as ""."""
    dry_run.show(config, paths.path(str(workdir)), choice)
    out = capsys.readouterr().out
    table = out.partition("\n\n")[0].splitlines()[1:]
    rows = {line.split()[0]: line.partition(" ")[2].strip() for line in table}
    return {**rows, "": out}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_new_recipe(config, tmp_path, capsys):
    rows = show(config, tmp_path / "run", capsys)
    assert rows["tokenizer"] == "runs"
    assert rows["pretrain"].startswith("runs, 6 steps  model ")
    assert "policy" in rows["ppo"] and "iB" in rows["ppo"]
    assert "  reference " in rows[""]
    assert "made by collect" in rows[""] and "rows" in rows[""]
    assert "memory: " in rows[""] and "nothing was computed or written" in rows[""]
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_was_begun(config, tmp_path, capsys):
    finish(config, tmp_path, "tokenizer")
    (tmp_path / "01_pretrain/checkpoints/4").mkdir(parents=True)
    (tmp_path / "01_pretrain/checkpoints/4/commit_success.txt").touch()
    before = files(tmp_path)
    rows = show(config, tmp_path, capsys)
    assert rows["tokenizer"] == "done"
    assert rows["pretrain"].startswith("resumes at step 4 of 6  model ")
    assert files(tmp_path) == before


def test_stages_that_run_again(config, tmp_path, capsys):
    finish(config, tmp_path, *config.stages)
    config.ppo.kl.coefficient = 0.5
    before = files(tmp_path)
    choice = Choice("from", "ppo")
    # Their models do not exist, so only what happens to them is asked for.
    values = to_dict(config)
    folder = paths.path(str(tmp_path))
    folders = recipe.stage_folders(values, folder)
    resolved = {name: recipe.resolve(values[name], folders, name) for name in folders}
    actions = dry_run._actions(values, resolved, folders, folder, choice, None)
    assert actions["reward"] == "done"
    assert actions["ppo"] == actions["evaluate"] == "runs again"
    only = dry_run._actions(
        values, resolved, folders, folder, Choice("only", "ppo"), None
    )
    assert (only["ppo"], only["evaluate"]) == ("runs again", "does not run")
    assert files(tmp_path) == before


def test_the_time_of_a_sweep_counts_shared_stages_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dry_run.pace, "estimate", lambda typed, _: dict.fromkeys(typed, 1.0)
    )
    runs = []
    for coefficient in (0.1, 0.2):
        config.ppo.kl.coefficient = coefficient
        runs.append((to_dict(config), paths.path(f"{tmp_path}/{coefficient}")))
    assert dry_run.total_seconds(runs, shared=False) == 14
    assert dry_run.total_seconds(runs, shared=True) == 9  # ppo and evaluate twice
    costs = dry_run.costs(runs, shared=True)
    assert [cost.runs for cost in costs] == [2, 2, 2, 2, 2, 1, 1, 1, 1]
    # 6 steps of 8 rows of 32 tokens; 6 steps of 16 responses of 8 tokens.
    tokens = {cost.name: cost.tokens for cost in costs}
    assert tokens["pretrain"] == tokens["sft"] == 1536 and tokens["ppo"] == 768
    assert tokens["tokenizer"] is None
    monkeypatch.setattr(dry_run.pace, "estimate", lambda *_: {})
    assert dry_run.total_seconds(runs, shared=True) is None


def test_a_printed_config_is_overrides_that_lead_to_it(conversations, capsys):
    spec = f"--config={TINY}:data={conversations}"
    override = "--config.ppo.kl.coefficient=0.25"
    command_line.main(["rlhfjax", "run", spec, override, "--print_config"])
    out = capsys.readouterr().out
    assert override in out.splitlines()
    words = shlex.split(out)
    assert words == sorted(words)
    plain = command_line.parse(["rlhfjax", "run", spec])
    again = command_line.parse(["rlhfjax", "run", spec, *words])
    given = command_line.parse(["rlhfjax", "run", spec, override])
    assert to_dict(again[1].config) == to_dict(given[1].config)
    assert to_dict(again[1].config) != to_dict(plain[1].config)


def test_an_option_that_is_a_dataclass_or_none_takes_a_dict(conversations):
    word = "--config.ppo.frozen_mesh={'data': 2}"
    spec = f"--config={TINY}:data={conversations}"
    _, fv = command_line.parse(["rlhfjax", "run", spec, word])
    typed = recipe.validate(fv.config)["ppo"]
    assert typed.frozen_mesh == MeshConfig(data=2)


def test_one_stage_and_a_dataset_that_is_not_there_yet(tmp_path, capsys):
    source = {"spec": "tfds:kjv", "data_dir": str(tmp_path / "data")}
    config = stage_config("tokenizer", sources=(source,), vocab_size=300)
    rows = show(config, tmp_path / "run", capsys)
    assert rows["tokenizer"] == "runs"
    assert "not there yet; the run prepares it in" in " ".join(rows[""].split())
    assert not files(tmp_path)


def test_a_large_file_is_indexed_by_the_run_and_not_by_a_dry_run(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(kept, "SMALL", 10)
    monkeypatch.chdir(tmp_path)  # short names: the table cuts long ones
    (tmp_path / "x.csv").write_text("text\n" + "the cat\n" * 9)
    source = {"spec": "x.csv", "data_dir": "data"}
    config = stage_config("tokenizer", sources=(source,), vocab_size=300)
    before = files(tmp_path)
    rows = show(config, tmp_path / "run", capsys)
    assert "not indexed yet; the run does so in" in " ".join(rows[""].split())
    assert files(tmp_path) == before
