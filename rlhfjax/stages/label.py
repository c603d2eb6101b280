"""People label: the stage serves a page, ends when there are enough labels, and writes rows.

workdir/labels.sqlite                            every action of every labeler
workdir/preferences/                             for `reward` and `direct`: rankings, and edits
workdir/rankings.jsonl                           for `import_rankings`
workdir/demonstrations/{train,validation}.jsonl  for `sft`, rows of kind messages
workdir/feedback/{train,validation}.jsonl        for `tamer`

What is labeled are the responses that `collect` wrote (`answers`), rows of JSON lines (`items`), or
responses to `prompts` that a policy samples while people label (`init_from`). For demonstrations
`prompts` are enough, or `conversations`, of which labelers write both sides. Labelers open links
that are printed at the start. A stage that was killed goes on: a label that the page has confirmed
is on the disk. See docs/labeling.md.

Source: Ouyang et al. 2022, section 3.4 and appendix B.
"""

from statistics import median
from typing import Any

from rlhfjax import hosts, paths
from rlhfjax.data.files import read_text
from rlhfjax.data.preferences import write_preferences
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store as models
from rlhfjax.labeling.config import Config
from rlhfjax.mesh import Layout
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.rewards.gold import SCORERS
from rlhfjax.rewards.load import KINDS, label
from rlhfjax.rewards.load import describe as describe_reward
from rlhfjax.rewards.responses import Scorer
from rlhfjax.rewards.rules import Rule
from rlhfjax.rl.config import sampling_workload, validate_sampling
from rlhfjax.roles import Role, Workload, job_workload, scorers
from rlhfjax.stages.collect import FOLDER
from rlhfjax.web import access

__all__ = ["Config"]


def roles(config: Config) -> dict[str, Role]:
    if not config.init_from:  # the first role is the model that the stage works on
        return {}
    return {"policy": Role(config.init_from), **scorers(reward=config.reward)}


def workload(config: Config, completions: int = 1) -> Workload:
    if config.init_from:
        return sampling_workload(config, config.samples_per_prompt)
    return job_workload(config.batch_size, 1)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    access.validate_installed("sqlalchemy")
    if hosts.count() > 1:
        raise ConfigError(f"label: it runs on one host, not on {hosts.count()}")
    has_prompts = config.prompts.source is not None
    alone = has_prompts and not config.init_from
    given = (config.answers, config.items, has_prompts, config.conversations)
    if sum(map(bool, given)) != 1:
        raise ConfigError(
            "label: give one of answers, items, prompts.source and conversations"
        )
    if (alone or config.conversations) and config.task != "demonstrate":
        raise ConfigError(
            f'label.task="{config.task}": it needs responses, of answers, of items or of'
            " init_from with prompts"
        )
    if config.task == "feedback" and config.tokenizer is None and not config.init_from:
        raise ConfigError('label.task="feedback": label.tokenizer is needed')
    if (config.order == "disagreement") != bool(config.reward):
        raise ConfigError('label: order="disagreement" and reward need each other')
    if config.reward and config.tokenizer is None and not config.init_from:
        raise ConfigError(f"label.reward={label(config.reward)}: tokenizer is needed")
    if config.init_from:
        _validate_live(config, layout, model_config)
    if config.simulated and config.task not in ("rank", "compare"):
        raise ConfigError(
            f"label.simulated={config.simulated}: a program ranks and compares, it does not"
            f" {config.task}"
        )
    if config.simulated:
        kind, options = describe_reward(config.simulated)
        if kind not in ("gold", "rule"):
            raise ConfigError(
                f"label.simulated={config.simulated}: expected gold:NAME or"
                " rule:MODULE:FUNCTION"
            )
        KINDS[kind].check(options)


def simulated_scorer(name: str) -> Scorer | None:
    """Returns what labels in place of people; None for the name ""."""
    if not name:
        return None
    kind, options = describe_reward(name)
    return SCORERS[options.name]() if kind == "gold" else Rule(options)


def _validate_live(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    if config.prompts.source is None or config.task == "demonstrate":
        raise ConfigError(
            f"label.init_from={config.init_from}: it responds to label.prompts, for another"
            ' task than "demonstrate"'
        )
    for option in ("prompt_length", "max_new_tokens", "count"):
        if getattr(config, option) < 1:
            raise ConfigError(f"label.{option}: a value is required with init_from")
    rows = config.batch_size * config.samples_per_prompt
    layout.validate_batch(rows, "label.batch_size times samples_per_prompt")
    validate_sampling(config, layout, model_config, config.samples_per_prompt)


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Serves the page, then writes the rows; returns counts, seconds and agreement."""
    # SQLAlchemy and Starlette are in the extra `serve`.
    from rlhfjax.labeling import export, preferences
    from rlhfjax.labeling.filler import Filler
    from rlhfjax.labeling.store import FILE, Store

    policy = models.load(config.init_from, layout) if config.init_from else None
    validate(config, layout, policy.model.config if policy else None)
    tokenizer = policy.tokenizer if policy else None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    store = Store(workdir / FILE)
    try:
        with layout.use():
            _collect(config, store, Filler(config, store, layout, tokenizer, policy))
        export.write(store, workdir, config.validation)
        rows = preferences.rows(store.labels(), tokenizer)
        if splits := export.both_splits(rows, config.validation):
            write_preferences(workdir / FOLDER, splits, labeler="unnamed")
        metrics = _metrics(store.labels())
    finally:
        store.close()
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _collect(config: Config, store: Any, filler: Any) -> None:
    """Serves the page until there are enough labels."""
    from rlhfjax.labeling import queue, serve
    from rlhfjax.labeling.app import Collection

    filler.start()
    rules = queue.Rules(
        screening_agreement=config.screening_agreement,
        calibration_every=config.calibration_every,
        count=filler.count(),
    )
    if queue.is_complete(store, rules):
        return
    guidelines = read_text(paths.path(config.guidelines)) if config.guidelines else ""
    serve.until_complete(
        Collection(store, rules, guidelines, config.validation),
        config.host,
        config.port,
        config.labelers,
        grace=config.grace,
        refill=filler.refill if config.init_from else None,
        scorer=simulated_scorer(config.simulated),
    )


def _metrics(labels: list[Any]) -> dict[str, float]:
    from rlhfjax.labeling import agreement
    from rlhfjax.labeling.tables import SUBMIT, WORK

    work = [label for label in labels if label.kind == WORK]
    given = [label for label in work if label.action == SUBMIT]
    seconds = [label.seconds for label in given]
    metrics = {
        "labels": float(len(given)),
        "skipped": float(len(work) - len(given)),
        "labelers": float(len({label.who for label in given})),
        "seconds": median(seconds) if seconds else float("nan"),
        "hours": sum(seconds) / 3600,
        **agreement.between(work),
    }
    return {f"label/{name}": value for name, value in metrics.items()}
