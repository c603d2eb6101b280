"""The table of studies in a README, from committed rows alone."""

import subprocess
import sys

import pytest

from rlhfjax import paths
from rlhfjax.errors import DataError
from rlhfjax.lab import index, results
from rlhfjax.lab.card import of
from rlhfjax.lab.found import plan
from rlhfjax.sweep.expand import expand
from tests.doc_commands import ROOT
from tests.lab import made_up


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "README.md").write_text(f"# X\n\n{index.BEGIN}\n{index.END}\n\nend\n")
    made_up.write(tmp_path / "x")
    (tmp_path / "x" / "other.py").write_text("def get_config(arg=None): ...\n")
    return paths.path(tmp_path / "README.md")


def commit(readme, most=6):
    folder = readme.parent / "x"
    runs = expand(str(folder / "study.py"), readme.parent / "w")
    made_up.finish_all(runs)
    loaded = index.experiment.load(str(folder / "study.py"))
    study = of(loaded)
    planned = plan(study, runs, loaded.file)
    rows = [results.read_row(readme.parent / "w" / x.name, x, study) for x in planned]
    (folder / "results").mkdir()
    results.write(folder / "results", rows[:most])


def row_of(readme) -> list[str]:
    row = index.table(readme).splitlines()[2]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_a_study_before_its_runs(readme):
    study, claim, verdict, effect, seeds, cost, command, commits = row_of(readme)
    assert study == "[x/study](x/study.py)" and claim == "A larger rate is better"
    assert (verdict, seeds, cost, commits) == ("not run yet", "3", "", "none")
    assert effect == "large beats small: none yet"
    name = readme.parent.name
    assert command == (
        f"`rlhfjax sweep --config={name}/x/study.py --workdir=runs/x/study`"
    )


def test_a_finished_study(readme):
    """Differences -0.9, -1.0 and -1.1: mean -1, half width 4.303 x 0.1 / sqrt 3 = 0.248."""
    commit(readme)
    (readme.parent / "x" / "study.png").write_bytes(b"")
    study, _, verdict, effect, _, cost, _, commits = row_of(readme)
    assert study == "[x/study](x/study.py)<br>![](x/study.png)"
    assert verdict == "**reproduced**"
    assert effect == "large beats small: -1.00 (95 %: -1.25 to -0.752)"
    assert (cost, commits) == ("15s on 1 x cpu", "c0ffee")


def test_the_picture_is_that_of_the_rows(readme):
    """Equal rows are equal bytes; a study without rows has no picture."""
    assert index.draw(readme.parent) == []
    commit(readme)
    (picture,) = index.draw(readme.parent)
    first = picture.read_bytes()
    assert (picture.name, first[:8]) == ("study.png", b"\x89PNG\r\n\x1a\n")
    assert index.draw(readme.parent) == [picture] and picture.read_bytes() == first
    assert "<br>![](x/study.png)" in row_of(readme)[0]
    (rows,) = (readme.parent / "x" / "results").glob("*.jsonl")
    kept = rows.read_text().splitlines(keepends=True)[:4]
    rows.write_text("".join(kept))
    index.draw(readme.parent)
    assert picture.read_bytes() != first


def test_an_unfinished_study(readme):
    commit(readme, most=4)
    _, _, verdict, effect, *_ = row_of(readme)
    assert verdict == "inconclusive: 4 of 6 runs"
    assert effect == "large beats small: none yet"


def test_the_table_replaces_the_one_before(readme, capsys, monkeypatch):
    def main(*words):
        monkeypatch.setattr(index.argparse._sys, "argv", ["index", str(readme), *words])
        index.main()

    with pytest.raises(DataError, match=r"run python -m rlhfjax.lab.index"):
        main("--check")
    assert "not run yet" not in readme.read_text()
    main()
    main("--check")
    assert "the table of studies is current" in capsys.readouterr().out
    before = readme.read_text()
    commit(readme)
    main()
    after = readme.read_text()
    assert "not run yet" in before and "not run yet" not in after
    assert after.count("x/study.py") == before.count("x/study.py")
    assert after.startswith("# X\n\n<!-- studies -->\n\n| study |")
    assert after.endswith(" |\n\n<!-- end of studies -->\n\nend\n")
    with pytest.raises(DataError, match="expected the lines"):
        index.updated("nothing", "")


def test_the_table_of_experiments_is_current():
    """In a separate process: with type checks it takes half a minute."""
    command = [sys.executable, "-m", "rlhfjax.lab.index", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
