"""Runs `rlhfjax sweep` of a file with a STUDY: the runs, their rows, the page and the verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import experiment, paths, recipe
from rlhfjax.experiment import Experiment
from rlhfjax.lab import budget, card, page, results
from rlhfjax.lab.card import Study
from rlhfjax.lab.found import Found, of_plan, plan
from rlhfjax.lab.results import Planned, Row
from rlhfjax.paths import Path
from rlhfjax.report.sweep import Result
from rlhfjax.sweep import command
from rlhfjax.sweep.command import Options
from rlhfjax.sweep.expand import Run, expand_loaded


def sweep(
    config: str, workdir: Path, given: Mapping[str, Any], options: Options
) -> None:
    """Runs a sweep; that of a study ends with its page and its verdict.

    Args and errors: as `sweep.command.sweep`. Also
    Raises:
      ConfigError: the runs are not those of the study's card.
      DataError: a committed row is damaged.
    """
    loaded = experiment.load(config)
    study = card.of(loaded)
    runs = expand_loaded(loaded, workdir, given)
    if study is None:
        command.run_all(runs, workdir, options)
        return
    planned = plan(study, runs, loaded.file)
    rows = of_plan(results.committed(loaded), planned)
    known = _known(study, runs, planned, results.by_hash(rows))
    if options.dry_run:
        command.run_all(runs, workdir, options, known)
        left = [run for run in runs if run.name not in known and not run.finished]
        print("\n".join(budget.lines(left, len(known), shared=bool(options.cache))))
        return
    try:
        command.run_all(runs, workdir, options, known)
    finally:
        _finish(study, planned, rows, workdir, loaded)


def _known(
    study: Study,
    runs: Sequence[Run],
    planned: Sequence[Planned],
    rows: Mapping[str, Row],
) -> dict[str, Result]:
    """Returns the results of runs that need not run, as the page of the sweep takes them."""
    found = {}
    for run, its_plan in zip(runs, planned, strict=True):
        row = rows.get(its_plan.hash)
        # A run that is finished here, too, is compared with its row.
        if row is None or run.finished:
            continue
        metrics = results.to_outcome(row).metrics
        telling = [name for name in study.values.values() if isinstance(name, str)]
        found[run.name] = Result(
            name=run.name,
            setting=run.setting,
            seeds=run.seeds,
            status="done",
            metrics=dict(metrics),
            telling=tuple(name for name in telling if name in metrics),
            starts=[row],
        )
    return found


def _finish(
    study: Study,
    planned: Sequence[Planned],
    taken: Sequence[Row],
    workdir: Path,
    loaded: Experiment,
) -> None:
    """Writes the rows of finished runs and the page; prints where they are, and the verdict."""
    finished = [
        run for run in planned if recipe.finished(run.config, workdir / run.name)
    ]
    new = [results.read_row(workdir / run.name, run, study) for run in finished]
    file = results.write(workdir, new)
    rows = [*taken, *new]
    found = Found(
        study,
        planned,
        rows=results.by_hash(rows),
        repeats=results.repeats(rows),
        here={run.hash: run.name for run in finished},
    )
    have = {row["hash"] for row in taken}
    if fresh := sum(row["hash"] not in have for row in new):
        folder = results.folder_of(loaded)
        print(f"results: {fresh} new rows in {file}; to keep them, commit them as")
        print(f"         {folder / paths.absolute(workdir).name}.jsonl")
    verdict = found.verdict()
    written = page.write(workdir, found, verdict)
    print(f"study: {written}")
    print(f"verdict: {verdict.name}. {verdict.reason}")
