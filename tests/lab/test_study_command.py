"""`rlhfjax sweep` of a study: what is run, what is taken from results, and how it ends."""

import json
import re
import shutil
from pathlib import Path

import pytest

from rlhfjax import dry_run, experiment, paths
from rlhfjax import main as command_line
from rlhfjax.errors import ConfigError, UserError
from rlhfjax.lab import budget, command, page, results
from rlhfjax.sweep import pool
from rlhfjax.sweep.command import Options
from rlhfjax.sweep.expand import expand
from tests.lab import made_up


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs are made up instead of started; its file, folder and started runs."""
    return MadeUp(tmp_path, monkeypatch)


class MadeUp:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.file = made_up.write(folder / "x")
        self.results = folder / "x" / "results"
        self.folder = folder
        self.started: list[str] = []
        self.fails: set[str] = set()
        self.date = "2020-01-01"
        monkeypatch.setattr(pool, "run_all", self._run_all)

    def _run_all(self, commands, folder, parallel):
        runs = {run.name: run for run in expand(self.file, folder)}
        self.started += commands
        good = [runs[name] for name in commands if name not in self.fails]
        made_up.finish_all(good, self.date)
        return {name: int(name in self.fails) for name in commands}

    def sweep(self, workdir="w", **options):
        folder = paths.path(self.folder / workdir)
        command.sweep(self.file, folder, {}, Options(**options))
        return self.folder / workdir

    def commit(self, workdir="w", name="one.jsonl"):
        self.results.mkdir(exist_ok=True)
        shutil.copy(self.folder / workdir / results.FILE, self.results / name)


def test_a_study_ends_with_its_page_and_verdict(study, capsys):
    workdir = study.sweep()
    assert len(study.started) == 6
    out = capsys.readouterr().out
    assert "6 runs, 0 of them finished; logs" in out
    assert f"results: 6 new rows in {workdir}/results.jsonl" in out
    assert f"{study.results}/w.jsonl" in out
    assert out.endswith("verdict: reproduced. The primary comparison holds.\n")
    text = (workdir / page.PAGE).read_text()
    assert "A larger rate is better" in text and "reproduced" in text
    assert (workdir / "sweep.html").exists()
    assert len((workdir / results.FILE).read_text().splitlines()) == 6


def test_committed_rows_are_not_run_again(study, capsys):
    study.sweep()
    study.commit()
    study.started.clear()
    capsys.readouterr()
    workdir = study.sweep("other")
    out = capsys.readouterr().out
    assert study.started == []
    assert "6 runs, 0 of them finished, 6 taken from results; logs" in out
    assert "new rows" not in out
    assert out.endswith("verdict: reproduced. The primary comparison holds.\n")
    assert "taken from results" in (workdir / page.PAGE).read_text()
    rows = (workdir / "sweep.csv").read_text().splitlines()
    assert len(rows) == 7 and all(",done," in row for row in rows[1:])


def test_a_study_is_spread_over_machines(study):
    """Two rows from another machine: four runs start here; together they are the study."""
    study.sweep()
    rows = results.read(paths.path(study.folder / "w" / results.FILE))
    study.results.mkdir()
    results.write(paths.path(study.results), rows[:2])
    study.started.clear()
    workdir = study.sweep("other")
    names = [f"optim.learning_rate={rate},seed={i}" for rate, i in (("0.0001", 2),)]
    names += [f"optim.learning_rate=0.001,seed={i}" for i in range(3)]
    assert study.started == names
    new = results.read(paths.path(workdir / results.FILE))
    assert [row["hash"] for row in new] == [row["hash"] for row in rows[2:]]


def test_a_row_of_another_config_does_not_count(study):
    study.sweep()
    study.commit()
    study.started.clear()
    made_up.write(study.folder / "x", steps=5)
    study.sweep("other")
    assert len(study.started) == 6


def test_logging_does_not_make_another_run(study):
    study.sweep()
    study.commit()
    study.started.clear()
    file = Path(study.file)
    file.write_text(
        file.read_text().replace("seed=arg.seed,", "seed=arg.seed, log={'every': 9},")
    )
    study.sweep("other")
    assert study.started == []


def test_a_failed_run_leaves_the_study_open(study, capsys):
    study.fails = {"optim.learning_rate=0.001,seed=1"}
    with pytest.raises(UserError, match="1 of 6 runs failed"):
        study.sweep()
    out = capsys.readouterr().out
    assert "verdict: inconclusive. Runs are missing: large has 2 of 3 seeds." in out
    assert "inconclusive" in (study.folder / "w" / page.PAGE).read_text()
    study.fails.clear()
    study.started.clear()
    study.sweep()
    assert study.started == ["optim.learning_rate=0.001,seed=1"]
    assert "verdict: reproduced" in capsys.readouterr().out


def test_a_run_that_was_run_twice_is_compared(study):
    study.sweep()
    study.commit()
    study.date = "2021-01-01"
    runs = expand(study.file, paths.path(study.folder / "again"))
    made_up.finish_all(runs[:1], study.date)
    workdir = study.sweep("again")
    text = (workdir / page.PAGE).read_text()
    assert "Run twice: small, arg.seed=0 (bit for bit the same)." in text


def test_rows_made_under_another_rule_are_said(study):
    study.sweep()
    study.commit()
    file = Path(study.file)
    assert "written before all 6 runs" in (study.folder / "w" / page.PAGE).read_text()
    file.write_text(file.read_text().replace('expected="less"', 'expected="greater"'))
    workdir = study.sweep("other")
    text = (workdir / page.PAGE).read_text()
    assert "6 of 6 runs were made under another rule" in text
    assert "contradicted" in text


def test_rows_of_several_processors_are_said(study):
    """Rounding follows the CPU's instruction sets, in what runs share, too."""
    workdir = study.sweep()
    assert "Several processors" not in (workdir / page.PAGE).read_text()
    study.commit()
    (file,) = study.results.iterdir()
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text(first.replace("(avx2)", "(avx2, avx512f)") + "".join(others))
    text = (study.sweep("other") / page.PAGE).read_text()
    assert (
        "Several processors" in text and "A CPU (avx2, avx512f), A CPU (avx2)" in text
    )


PLANS = {
    "STUDY.seeds=3, but its sweep adds 2 runs of 'small'": (
        "product(grid('optim.learning_rate', 1e-4, 1e-3), seeds(2))"
    ),
    "adds optim.learning_rate=0.01,seed=0, which is no condition": (
        "product(grid('optim.learning_rate', 1e-2), seeds(3))"
    ),
    "adds seed=0, which is no condition": "seeds(3)",
    "have the same config": (
        "chain(product(grid('optim.learning_rate', 1e-4), seeds(3)),"
        " [{'optim.learning_rate': 1e-3, 'arg.seed': i, 'seed': 1} for i in range(3)])"
    ),
}


@pytest.mark.parametrize("said", PLANS)
def test_runs_that_are_not_those_of_the_card(study, said):
    made_up.write(study.folder / "x", sweep=PLANS[said])
    with pytest.raises(ConfigError) as caught:
        study.sweep()
    assert said in str(caught.value) and study.started == []


def test_an_ordinary_sweep_is_as_before(study, capsys):
    file = Path(study.file)
    file.write_text(file.read_text().replace("STUDY =", "_study ="))
    workdir = study.sweep()
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"6 runs, 0 of them finished; logs in {workdir}/logs",
        f"table: {workdir}/sweep.html",
    ]
    assert not (workdir / page.PAGE).exists() and not (workdir / results.FILE).exists()


def test_the_command_line_sweeps_studies(study, capsys):
    command_line.main(
        ["rlhfjax", "sweep", f"--config={study.file}", f"--workdir={study.folder}/w"]
    )
    assert "verdict: reproduced" in capsys.readouterr().out


# ------------------------------------------------------------------ budget


def test_a_dry_run_states_the_budget(study, capsys, monkeypatch):
    """32 tokens x 8 rows x 4 steps are 1,024 tokens per run; 10 s each are measured."""
    monkeypatch.setattr(
        dry_run.pace, "estimate", lambda typed, _: dict.fromkeys(typed, 10.0)
    )
    study.sweep(dry_run=True, cache="c")
    out = capsys.readouterr().out
    assert "# 6 runs, 0 of them finished; about 1m00s" in out
    assert "# study: 6 runs to compute, 0 taken from results\n" in out
    assert "#   6 x sft: 6.14 k tokens, about 1m00s\n" in out
    assert not (study.folder / "w").exists()
    study.sweep()
    study.commit()
    capsys.readouterr()
    study.sweep("other", dry_run=True)
    out = capsys.readouterr().out
    assert out.count("is taken from results") == 6
    assert "# study: 0 runs to compute, 6 taken from results\n" in out
    assert "tokens" not in out


def test_the_shared_base_is_stated_apart(study, monkeypatch):
    """The base of 6 runs counts once. Without a cache each run computes it."""
    base = dry_run.Cost("pretrain", runs=6, seconds=100.0, tokens=5e6)
    own = [dry_run.Cost("ppo", runs=1, seconds=20.0, tokens=1e5)] * 6
    other = dry_run.Cost("evaluate", runs=1, seconds=None, tokens=None)
    monkeypatch.setattr(dry_run, "costs", lambda runs, shared: [base, *own, other])
    assert budget.lines([], taken=4, shared=True)[1:] == [
        "#   shared: 1 x pretrain for 6 runs: 5 M tokens, about 1m40s",
        "#   6 x ppo: 600 k tokens, about 2m00s",
        "#   1 x evaluate: speed here unknown: evaluate",
        "#   all: 5.6 M tokens, about 3m40s (1m40s of it for the shared base), without"
        " evaluate",
    ]


def test_the_rows_of_a_study_are_those_beside_its_file(study):
    study.sweep()
    study.commit(name="a.jsonl")
    (study.results / "b.jsonl").write_text("")
    (study.results / "notes.txt").write_text("no row")
    loaded = experiment.load(study.file)
    assert len(results.committed(loaded)) == 6
    (study.results / "b.jsonl").write_text(json.dumps({"hash": "x"}) + "\n")
    with pytest.raises(UserError, match=re.escape("b.jsonl:1: condition")):
        study.sweep("other")
