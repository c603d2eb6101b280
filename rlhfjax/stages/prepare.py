"""Prepares a corpus: filters raw rows, removes repeated ones, and splits what is left.

workdir/{train,validation,test}/SS-NNNNNN.jsonl    rows of source SS
workdir/corpus.json                                counts, examples of what was removed, lengths

    sources   {"spec": "jsonl:stage:prepare/{split}/*.jsonl"}             all rows
              {"spec": "jsonl:stage:prepare/{split}/00-*.jsonl"}          those of the first source

Filters in their order: language, quality, equal rows, nearly equal rows, prompts that begin alike,
prompts of one user, evaluation text. Of rows that repeat each other, the first in source order
stays. Rows are measured in `workers` processes; their number changes no byte of the result. A run
that was killed continues with the parts that are not yet measured or written.

Source: Brown et al. 2020 (GPT-3), appendices A and C; Ouyang et al. 2022 (InstructGPT), section 3.2
and appendix A.3.
"""

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np

from rlhfjax import json_text, paths
from rlhfjax.corpus import evaluation, language, measure, pool, quality, summary
from rlhfjax.corpus import write as writing
from rlhfjax.corpus.decide import decide
from rlhfjax.corpus.options import (
    EvaluationConfig,
    Filters,
    LanguageConfig,
    NearConfig,
    QualityConfig,
    RepeatedPromptConfig,
)
from rlhfjax.corpus.parts import Corpus, Part
from rlhfjax.corpus.rows import KINDS, Item, item_of, validate_users
from rlhfjax.data.config import SourceConfig, open_sources
from rlhfjax.data.sources import texts
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.progress import Progress
from rlhfjax.ranges import PositiveCount, Seed, ShareBelowHalf, Workers

log = logging.getLogger("rlhfjax")
ON_ONE_HOST = True
PARTS = "parts"  # folder of what is measured, removed at the end
FEWEST_DOCUMENTS = 20  # of each class that a classifier is trained on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The raw corpus and its filters."""

    stage: str = "prepare"
    """Name of the stage."""
    sources: tuple[SourceConfig, ...] = ()
    """Raw rows of one kind; split="all" reads every row of files."""
    language: LanguageConfig = LanguageConfig()
    """Keeps some languages."""
    quality: QualityConfig = QualityConfig()
    """Keeps documents like those of a reference corpus."""
    exact: bool = True
    """Whether a row that is equal to an earlier one is removed."""
    near: NearConfig = NearConfig()
    """Removes rows that are nearly equal to an earlier one."""
    prompts: RepeatedPromptConfig = RepeatedPromptConfig()
    """Removes prompts that begin alike, and those of one user beyond a limit."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Removes evaluation text."""
    validation: ShareBelowHalf = 0.05
    """Share of the rows in validation, by a hash of the user, else of text or first user turn."""
    test: ShareBelowHalf = 0.05
    """Share of the rows in test, by the same hash."""
    rows_per_file: PositiveCount = 1000
    """Rows that are read, measured and written at a time, fewer where documents are books."""
    workers: Workers = 0
    """Processes that measure rows; 0: the run's own."""
    seed: Seed = 0
    """Seed of the quality filter's draws."""
    mesh: MeshConfig = MeshConfig()
    """Not used: the stage computes on no device."""

    @property
    def filters(self) -> Filters:
        return Filters(
            language=self.language,
            quality=self.quality,
            exact=self.exact,
            near=self.near,
            prompts=self.prompts,
            evaluation=self.evaluation,
            seed=self.seed,
        )


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates that the filters' packages are installed. Raises ConfigError."""
    if config.language.keep:
        language.validate_languages("prepare.language.keep", config.language.keep)
    if config.quality.reference:
        language.validate_installed("prepare.quality", "sklearn")
    if config.near.threshold:
        language.validate_installed("prepare.near", "datasketch")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the corpus; returns how many rows each filter removed and how many are left."""
    validate(config, layout, None)
    done = json_text.read_if_there(workdir / summary.FILE, summary.Summary)
    if done is None:
        done = _prepare(config, workdir)
        text = json_text.encode(done, workdir / summary.FILE, indent=2)
        paths.write(workdir / summary.FILE, text + "\n")
    paths.remove(workdir / PARTS)
    metrics = metrics_of(done)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def metrics_of(done: summary.Summary) -> dict[str, float]:
    """Returns the metrics of a corpus.json."""
    rows = sum(source["rows"] for source in done["sources"])
    left = sum(source["left"] for source in done["sources"])
    skipped = sum(source["skipped"] for source in done["sources"])
    metrics = {
        "prepare/rows": float(rows),
        "prepare/skipped_rows": float(skipped),
        "prepare/left": left / rows,
        "prepare/words": float(sum(done["words"].values())),
        "prepare/documents_cut": float(done["cut"]),
    }
    for one in done["filters"]:
        metrics[f"prepare/removed_{one['name']}"] = float(one["removed"])
    for split, count in done["splits"].items():
        metrics[f"prepare/rows_{split}"] = float(count)
    if done["quality_auc"] is not None:
        metrics["prepare/quality_auc"] = done["quality_auc"]
    return metrics


def _prepare(config: Config, workdir: Path) -> summary.Summary:
    corpus = _open(config, workdir / PARTS)
    # 1. What is told by a row alone, in parallel.
    tools = measure.Tools(config.filters, _classifier(config, corpus), _table(config))
    for part in _measured(config, corpus, tools, workdir / PARTS):
        log.debug("prepare: part %d is measured", part.number)
    files = [_measures(workdir, part) for part in corpus.parts]
    measured = measure.concatenated(map(measure.read, files), config.near.threshold)
    # 2. What is told by all rows together.
    signatures = measure.Signatures(files, [part.end for part in corpus.parts])
    decision = decide(measured, config.filters, signatures)
    # 3. The rows that are left.
    writer = writing.Writer(
        corpus,
        decision,
        measured["digest"],
        tools.table,
        config.evaluation,
        writing.Shares(config.validation, config.test),
        workdir,
    )
    written = [_write(writer, part, workdir) for part in corpus.parts]
    _validate_splits(config, written, len(corpus))
    values = summary.summarize(
        corpus,
        config.sources,
        config.filters,
        measured,
        decision,
        written,
        tools.table,
    )
    auc = tools.classifier.auc if tools.classifier else None
    return summary.Summary(**values, quality_auc=auc)


def _open(config: Config, folder: Path) -> Corpus:
    """Returns the rows of all sources. Raises ConfigError or DataError."""
    corpus = Corpus(config.sources, config.rows_per_file)
    of_prompts = any((config.prompts.prefix, config.prompts.per_user))
    if of_prompts and corpus.kind == "text":
        raise ConfigError(
            "prepare.prompts: prefix and per_user are for rows of kind prompt or messages,"
            " not text"
        )
    if config.prompts.per_user:
        for source, source_config in zip(corpus.sources, config.sources, strict=True):
            option = f"prepare.prompts.per_user={config.prompts.per_user}"
            validate_users(source, source_config.spec, option)
    plan, path = corpus.plan(), folder / "plan.json"
    before = json_text.read_if_there(path)
    if before is None:
        paths.make_folder(folder)
        paths.write(path, json_text.encode(plan, path) + "\n")
    elif before != plan:
        raise DataError(
            f"{path}: the sources have changed since this run began;"
            f" delete {folder.parent} to begin again"
        )
    return corpus


def _classifier(config: Config, corpus: Corpus) -> quality.Classifier | None:
    """Returns a trained classifier of quality; None if the filter is off."""
    options = config.quality
    if not options.reference:
        return None
    reference = open_sources(options.reference, "prepare.quality.reference")
    if reference.kind not in KINDS:
        raise ConfigError(
            f"prepare.quality.reference: rows of kind {reference.kind};"
            f" expected one of {', '.join(KINDS)}"
        )
    good, most = [], options.documents
    for i in quality.spread(len(reference), most):
        good.append(item_of(reference.kind, reference[i]).text)
    raw = [corpus.item(i).text for i in quality.spread(len(corpus), most)]
    for name, documents in (("quality.reference", good), ("sources", raw)):
        if len(documents) < FEWEST_DOCUMENTS:
            raise DataError(
                f"prepare.{name}: {len(documents)} documents; the quality filter needs"
                f" {FEWEST_DOCUMENTS} to be trained on"
            )
    counts = f"{len(good):,} of the reference, {len(raw):,} raw"
    log.info("prepare: training the quality filter on documents: %s", counts)
    return quality.train(good, raw)


def _table(config: Config) -> np.ndarray:
    """Returns the hashes of all n-grams of the evaluation text; none if the filter is off."""
    options = config.evaluation
    if not options.sources:
        return np.zeros(0, np.uint64)
    source = open_sources(options.sources, "prepare.evaluation.sources")
    table = evaluation.table_of(texts(source), options.ngram)
    if not len(table):
        raise DataError(
            f"prepare.evaluation.ngram={options.ngram}: no evaluation text has that many words"
        )
    return table


def _measured(
    config: Config, corpus: Corpus, tools: measure.Tools, folder: Path
) -> Iterator[Part]:
    """Measures the parts that are not yet measured; yields each once its file is written."""
    missing = [
        part
        for part in corpus.parts
        if not paths.exists(_measures(folder.parent, part))
    ]
    batches = (_items(corpus, part) for part in missing)
    results = pool.ordered(measure.measure, tools, batches, config.workers)
    start = len(corpus) - sum(part.end - part.start for part in missing)
    with Progress(len(corpus), "rows", title="prepare", start=start) as progress:
        for part, arrays in zip(missing, results, strict=True):
            measure.write(_measures(folder.parent, part), arrays)
            progress.update(part.end, count=part.end - part.start)
            yield part


def _items(corpus: Corpus, part: Part) -> list[Item]:
    return [corpus.item(i) for i in range(part.start, part.end)]


def _measures(workdir: Path, part: Part) -> Path:
    return workdir / PARTS / f"measured-{part.number:06d}.npz"


def _write(writer: writing.Writer, part: Part, workdir: Path) -> writing.Written:
    """Writes a part that is not yet written; returns what was written."""
    path = workdir / PARTS / f"written-{part.number:06d}.json"
    written = writing.read(path)
    if written is None:
        written = writer.write(part)
        paths.write(path, json_text.encode(written, path) + "\n")
    return written


def _validate_splits(
    config: Config, written: list[writing.Written], n_rows: int
) -> None:
    """Raises DataError if no row is left for a split that the config asks for."""
    shares = {"train": 1.0, "validation": config.validation, "test": config.test}
    for split, share in shares.items():
        count = sum(part["rows"].get(split, 0) for part in written)
        if share and not count:
            raise DataError(
                f"prepare: no row is left for {split} of {n_rows:,} that were read;"
                ' sources of files need split="all", or fewer filters, or a share of 0'
            )
