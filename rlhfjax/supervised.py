"""What the stages that train one model with one loss share: options, step, held-out data."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax import hosts
from rlhfjax.algos.language import nats_per_byte
from rlhfjax.algos.preference import untied_pairs
from rlhfjax.config import TrainConfig
from rlhfjax.data.batches import PreferenceBatch, TokenBatch
from rlhfjax.data.loader import rows_per_stream
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import add_balance
from rlhfjax.models.kernels import PLATFORMS
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig, make_optimizer, make_schedule
from rlhfjax.programs import STATE, WHOLE, Program
from rlhfjax.ranges import Count, Size, Tokens
from rlhfjax.roles import Head, Loaded, Models, Pass, Role, Workload
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState, apply_gradients, gradients
from rlhfjax.types import Loss, Metrics, PyTree

MODEL = "model"  # the name of the only role that is trained

# (params, batch, dropout key or None) -> (loss, metrics)
LossFunction = Callable[[PyTree, Any, jax.Array | None], Loss]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTrainConfig(TrainConfig):
    """The options of every stage that trains one model with one loss."""

    tokenizer: str | None = None
    """File or folder of the tokenizer; None: the tokenizer of `init_from`."""
    model: TransformerConfig | None = None
    """Config of a new model; None: the config of `init_from`."""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to the model config of `init_from`, such as dropout, dtype or remat."""
    lora: LoraConfig = LoraConfig()
    """Adapters; with rank 0 all of the model is trained."""
    length: Tokens
    """Tokens per row."""
    batch_size: Size
    """Rows per update."""
    microbatches: Size = 1
    """Parts of a batch whose gradients are accumulated one after the other."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning-rate schedule."""
    eval_batches: Count = 0
    """Held-out batches per evaluation; 0: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig(ModelTrainConfig):
    """The options of a stage that trains on streams of documents or examples."""

    data_shards: Size = 1
    """Independent streams that fill a batch, each run by one host; their number decides the order
    of the data."""


def trained_role(config: ModelTrainConfig, head: Head = "lm") -> Role:
    """Returns the role of the model that the stage trains."""
    return Role(
        source=config.model or config.init_from or "",
        head=head,
        optim=config.optim,
        lora=config.lora,
        overrides=config.overrides,
    )


def supervised_workload(config: ModelTrainConfig, completions: int = 1) -> Workload:
    """Returns what a step computes: one forward and one backward pass over every row.

    Args:
      completions: rows per prompt.
    """
    sequences = config.batch_size * completions
    tokens = sequences * config.length
    return Workload(
        rows=sequences // config.microbatches,
        batch=config.batch_size // config.microbatches,
        length=config.length,
        units=tokens,
        rounds=config.microbatches,
        microbatches=config.microbatches,
        passes=(Pass("step", MODEL, tokens, config.length, trains=True),),
    )


def load_trained(config: ModelTrainConfig, models: Models) -> tuple[Loaded, Tokenizer]:
    """Returns the model of `init_from`, or a new model with the config `model`; and its tokenizer.

    Raises:
      ConfigError: neither or both are given, or the tokenizer does not fit the model.
    """
    validate_origin(config)
    loaded = models[MODEL]
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        if config.overrides:
            raise ConfigError(
                f"{config.stage}.overrides: they change the model of `init_from`; "
                "set `model` itself"
            )
        if config.tokenizer is None:
            raise ConfigError(f"{config.stage}.tokenizer: a new model needs one")
        tokenizer = models.tokenizer(config.tokenizer)
        loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
    size = loaded.model.config.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"{config.stage}.model.vocab_size={size}: "
            f"must be at least the tokenizer's {tokenizer.vocab_size}"
        )
    return loaded, tokenizer


def train_step(
    config: ModelTrainConfig, loaded: Loaded, loss: LossFunction
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """Returns a function (state, batch, key) -> (state, metrics), and its optimizer.

    A step accumulates the gradient of the loss over all microbatches and makes one update.
    """
    tx = make_optimizer(config.optim, config.steps)
    schedule = make_schedule(config.optim, config.steps)

    # Frozen parameters are an argument: those that a jitted function closes over would become
    # constants of its program.
    @functools.partial(jax.jit, donate_argnums=1)
    def update(
        frozen: PyTree, state: TrainState, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(
            loss,
            state.params,
            batch,
            key,
            microbatches=config.microbatches,
            frozen=frozen,
        )
        learning_rate = schedule(state.step)
        skip = config.on_nonfinite == "skip"
        state, update_metrics = apply_gradients(state, grads, tx, skip_nonfinite=skip)
        rate_metrics = {"learning_rate": (learning_rate, jnp.ones(()))}
        state = state.replace(step=state.step + 1)
        return state, merge(metrics, update_metrics, rate_metrics)

    program = Program("step", update, [STATE, WHOLE])
    return functools.partial(program, loaded.frozen), tx


def supervised_stage(
    loaded: Loaded,
    tx: optax.GradientTransformation,
    *,
    step: Callable[..., Any],
    batch: Callable[[int], PyTree],
    open: Callable[[], Data],
    units: int,
    unit: str = "tokens",
    start: Callable[[TrainState], TrainState] | None = None,
) -> Stage:
    """Returns the Stage that trains a model, or its adapters; see `Stage` for the arguments."""
    model = loaded.model

    def load(state: TrainState) -> TrainState:
        return state.replace(params=loaded.start(state.params))

    return Stage(
        init=lambda key: TrainState.create(model.init_trained(key), tx),
        axes=model.trained_axes(),
        start=start or load,
        step=step,
        batch=batch,
        open=open,
        units=units,
        unit=unit,
    )


def language_loss(
    model: Model, balanced: bool = False, by_kind: bool = False
) -> LossFunction:
    """Returns the mean negative log-likelihood of the masked targets, nats per token.

    The loss is a function (params, batch, key) -> (loss, metrics). Its metrics are the loss and, in
    fine-tuning, the share of examples that lost tokens. In fine-tuning with documents they are also
    the shares that documents have of the examples and of the targets.

    Args:
      balanced: add the balancing loss of a mixture of experts, and metrics of its routing.
      by_kind: in fine-tuning with documents, also measure the losses of documents and of
        conversations. The head computes the logits once more for that.
    """

    def loss(params: PyTree, batch: TokenBatch, key: jax.Array | None) -> Loss:
        key = key if model.drops else None
        hidden, routing = model.hidden_and_routing(
            params, batch.tokens, batch.positions, batch.segment_ids, key
        )
        nll, weight = model.cross_entropy(params, hidden, batch.targets, batch.mask)
        metrics: Metrics = {"loss": (nll, weight)}
        if batch.cut is not None:
            examples = jnp.sum((batch.positions == 0) & (batch.segment_ids > 0))
            cut = jnp.sum(batch.cut)
            metrics["examples_cut"] = (cut, examples.astype(jnp.float32))
        if batch.documents is not None:
            metrics |= _document_shares(batch)
        if batch.documents is not None and by_kind:
            mask = batch.mask * batch.documents
            document = model.cross_entropy(params, hidden, batch.targets, mask)
            metrics["document_loss"] = document
            metrics["conversation_loss"] = (nll - document[0], weight - document[1])
        mean = nll / jnp.maximum(weight, 1.0)
        routing = routing if balanced else None
        return add_balance(model.config, (mean, metrics), routing)

    return loss


def _document_shares(batch: TokenBatch) -> Metrics:
    """Returns the shares that documents have of the examples and of the targets of a batch."""
    starts = (batch.positions == 0) & (batch.segment_ids > 0)
    starts = starts.astype(jnp.float32)
    targets = jnp.sum(batch.mask * batch.documents)
    return {
        "document_examples": (jnp.sum(starts * batch.documents), jnp.sum(starts)),
        "document_tokens": (targets, jnp.sum(batch.mask)),
    }


def finished_model(loaded: Loaded, params: PyTree) -> Finished:
    """Returns what a stage writes that saves its model as it was trained."""
    return Finished(
        models={store.FOLDER: loaded.saved(params)},
        metrics={},
        files={},
        adapters=loaded.adapters(params),
    )


# ------------------------------------------------------------------ validation


def validate_training(
    config: ModelTrainConfig, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the options of a stage with one model and one loss.

    Args:
      model_config: the config of the trained model; None: it is not known yet.
    Raises:
      ConfigError: batch, mesh, microbatches and context do not fit each other.
    """
    stage, size, parts = config.stage, config.batch_size, config.microbatches
    validate_origin(config)
    layout.validate_batch(size, f"{stage}.batch_size")
    if size % parts:
        raise ConfigError(
            f"{stage}.batch_size={size}: must be divisible by microbatches={parts}"
        )
    layout.validate_batch(size // parts, f"a {stage} microbatch")
    validate_length(config.length, model_config, f"{stage}.length")
    make_schedule(config.optim, config.steps)  # validates the warm-up
    validate_lora(config.lora, model_config)
    validate_kernel(model_config, layout, stage)


def validate_streams(
    config: StreamConfig, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates a StreamConfig: as `validate_training`, and that streams share a batch equally."""
    validate_training(config, layout, model_config)
    rows_per_stream(config.batch_size, config.data_shards, config.stage)


def validate_origin(config: ModelTrainConfig) -> None:
    """Raises ConfigError unless the model is either new or that of `init_from`."""
    if (config.model is None) == (config.init_from is None):
        raise ConfigError(
            f"{config.stage}: give `model` (a new model) or `init_from` (a trained one), "
            "not both or neither"
        )
    if config.lora.rank and config.init_from is None:
        raise ConfigError(
            f"{config.stage}.lora.rank={config.lora.rank}: "
            "adapters need a trained model, `init_from`"
        )


def validate_kernel(
    model_config: TransformerConfig | None, layout: Layout, stage: str
) -> None:
    """Raises ConfigError if the attention kernel does not run on these devices or this mesh."""
    kernel = "einsum" if model_config is None else model_config.attention
    option = f"{stage}: model.attention={kernel!r}"
    if layout.platform not in PLATFORMS[kernel]:
        raise ConfigError(
            f"{option} is a kernel of {'TPUs' if kernel == 'splash' else 'GPUs'}, "
            f"and these devices are {layout.platform}; 'einsum' runs anywhere"
        )
    if kernel == "splash" and layout.mesh.shape["sequence"] > 1:
        raise ConfigError(f"{option} needs whole sequences: mesh.sequence=1")


def validate_lora(config: LoraConfig, model_config: TransformerConfig | None) -> None:
    """Raises ConfigError if the targets match no kernel of the model."""
    if config.rank and model_config is not None:
        Model(model_config, lora=config).trained_axes()


def validate_length(
    length: int, model_config: TransformerConfig | None, option: str
) -> None:
    """Raises ConfigError if sequences are longer than the model's context."""
    if model_config is not None and length > model_config.max_length:
        longest = model_config.max_length
        raise ConfigError(
            f"{option}={length} is longer than the model's context, max_length={longest}"
        )


# ------------------------------------------------------------------ held-out data


def held_out_loss(
    model: Model, loss: LossFunction, byte_lengths: np.ndarray
) -> Callable[[PyTree, TokenBatch], Metrics]:
    """Returns a function (params, batch) -> val_loss and val_nats_per_byte of a batch.

    Both are of the same targets; val_loss is in nats per token.

    Args:
      loss: the loss of the language model.
      byte_lengths: UTF-8 bytes of the text of each id of the tokenizer; ids beyond them have none.
    """
    lengths = jnp.zeros(model.config.vocab_size)
    lengths = lengths.at[: len(byte_lengths)].set(byte_lengths)

    @jax.jit
    def measure(params: PyTree, batch: TokenBatch) -> Metrics:
        _, metrics = loss(params, batch, None)
        nll, _ = metrics["loss"]
        per_byte = nats_per_byte(jnp.asarray(nll), batch.targets, batch.mask, lengths)
        metrics = {**metrics, "nats_per_byte": per_byte}
        return {f"val_{name}": metric for name, metric in metrics.items()}

    return measure


def sum_metrics(
    batches: Iterable[PyTree],
    measure: Callable[[PyTree], Metrics],
    layout: Layout,
    limit: int = 0,
) -> Metrics:
    """Returns the summed metrics of held-out batches, at most `limit` of them (0: all)."""
    total: Metrics = {}
    for i, batch in enumerate(batches):
        if limit and i == limit:
            break
        total = merge(total, hosts.whole(measure(layout.put(batch))))
    return total


def truncation_metrics(batch: PreferenceBatch) -> Metrics:
    """Returns what truncation did to a batch.

    rows_cut: share of the completions that lost tokens, their own or of their prompt.
    pairs_dropped: share of the pairs ordered by labels whose completions have the same tokens;
      their weight is 0.
    """
    labels, valid, same = map(jnp.asarray, (batch.scores, batch.valid, batch.same))
    labeled = jnp.sum(untied_pairs(labels, valid))
    rows_cut = (jnp.sum(batch.cut * valid), jnp.sum(valid))
    kept = jnp.sum(untied_pairs(labels, valid, same))
    return {"rows_cut": rows_cut, "pairs_dropped": (labeled - kept, labeled)}
