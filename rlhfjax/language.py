"""What pretraining and fine-tuning share: options, and the Stage of a language model on text."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from rlhfjax.data.batches import TokenBatch
from rlhfjax.data.config import (
    SourceConfig,
    open_mixture,
    open_sources,
    own_shards,
    validate_sources,
    validate_without_weight,
)
from rlhfjax.data.loader import BatchStream
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.roles import Loaded, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Stage
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    StreamConfig,
    finished_model,
    held_out_loss,
    language_loss,
    load_trained,
    sum_metrics,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    validate_streams,
)
from rlhfjax.types import Metrics

# (the trained model, its tokenizer, the stage's models) -> (state -> metrics)
OpenEvals = Callable[[Loaded, Tokenizer, Models], Callable[[TrainState], Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig(StreamConfig):
    """The options of a stage that trains a language model on packed text."""

    sources: tuple[SourceConfig, ...] = ()
    """Documents or conversations to train on."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out documents or conversations."""
    adapter: str = ""
    """PEFT folder with adapters of `init_from` to continue training; rank, alpha and targets
    of `lora` must be theirs. Empty: fresh adapters."""


def language_workload(config: LanguageConfig, completions: int = 1) -> Workload:
    """Returns what a step computes."""
    return supervised_workload(config)


def language_roles(config: LanguageConfig) -> dict[str, Role]:
    """Returns the only model of the stage."""
    return {MODEL: trained_role(config)._replace(adapter=config.adapter)}


def language_stage(
    config: LanguageConfig,
    layout: Layout,
    sources: Sources,
    load: Callable[..., BatchStream],
    batch: TokenBatch,
    *,
    roles: Mapping[str, Role] | None = None,
    more_evals: OpenEvals | None = None,
) -> Stage:
    """Returns the Stage that trains a language model on packed text.

    Args:
      load: the loader of the data, such as `loader.sft_batches`.
      batch: the shapes of a batch.
      roles: the models of the stage; default: `language_roles`.
      more_evals: (model, tokenizer, sources of models) -> more metrics of an evaluation.
    """
    roles = language_roles(config) if roles is None else dict(roles)
    models = Models(config.stage, roles, layout, sources)
    loaded, tokenizer = load_trained(config, models)
    model = loaded.model
    validate_language(config, layout, model.config)
    loss = language_loss(model, balanced=True)
    step, tx = train_step(config, loaded, loss)

    def open_data() -> Data:
        size, length = config.batch_size, config.length
        train = open_mixture(config.sources, f"{config.stage}.sources")
        held = open_sources(config.eval_sources, f"{config.stage}.eval_sources")
        load_with = functools.partial(
            load, tokenizer=tokenizer, batch_size=size, length=length
        )
        shards = own_shards(config.data_shards, size, layout)
        batches = load_with(train, seed=config.seed, shards=shards)
        held_out = load_with(held, train=False)
        held_out_of = language_loss(model, by_kind=True)
        measure = held_out_loss(model, held_out_of, tokenizer.byte_lengths())

        others = more_evals(loaded, tokenizer, models) if more_evals else None

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            metrics = sum_metrics(
                held_out.restart(),
                functools.partial(measure, params),
                layout,
                config.eval_batches,
            )
            return metrics | others(state) if others else metrics

        return Data(batches, evals, lambda state: finished_model(loaded, state.params))

    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=lambda _: batch,
        open=open_data,
        units=config.batch_size * config.length,
    )


def validate_language(
    config: LanguageConfig, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates a LanguageConfig: as `validate_streams`, and that adapters are to be trained."""
    validate_streams(config, layout, model_config)
    validate_sources(config.sources, f"{config.stage}.sources")
    for i, source in enumerate(config.eval_sources):
        validate_without_weight(source, f"{config.stage}.eval_sources[{i}]")
    if config.adapter and not config.lora.rank:
        raise ConfigError(
            f"{config.stage}.adapter={config.adapter}: continues to train adapters, and "
            "lora.rank=0 trains the whole model; `rlhfjax import --adapter=…` merges an adapter "
            "into a model"
        )
