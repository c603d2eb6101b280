"""What stages that train one model with one loss share: their options, their model, held-out data."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax import hosts
from rlhfjax.algos.language import nats_per_byte
from rlhfjax.algos.preference import untied_pairs
from rlhfjax.config import TrainConfig
from rlhfjax.data.loader import rows_a_stream
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.kernels import PLATFORMS
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig, make_optimizer, make_schedule
from rlhfjax.programs import STATE, WHOLE, Program
from rlhfjax.ranges import Count, Size
from rlhfjax.roles import Head, Loaded, Models, Pass, Role, Roles, Sources, Workload
from rlhfjax.stage import Data, Finished, Shapes, Stage
from rlhfjax.state import TrainState, apply_gradients, gradients
from rlhfjax.types import Metrics

Batch = dict[str, Any]
MODEL = "model"  # the one role that is trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTrainConfig(TrainConfig):
    """A stage that trains one model with one loss."""

    tokenizer: str | None = None  # file or folder; None: that of `init_from`
    model: TransformerConfig | None = None  # None: the shape of `init_from`
    overrides: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # of `init_from`'s: dropout, dtype, remat, …
    lora: LoraConfig = LoraConfig()  # rank 0: all of the model is trained
    batch_size: Size
    microbatches: Size = 1
    optim: OptimConfig = OptimConfig()
    eval_batches: Count = 0  # 0: the whole held-out split


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig(ModelTrainConfig):
    """One that trains on a stream of documents or examples."""

    # independent streams that a batch is made of, each host running its own; the order of the data depends on how many
    data_shards: Size = 1


def trained_role(config: ModelTrainConfig, head: Head = "lm") -> Role:
    """Returns the role of the model that the stage trains."""
    return Role(
        source=config.model or config.init_from or "",
        head=head,
        optim=config.optim,
        lora=config.lora,
        overrides=config.overrides,
    )


def supervised_workload(config: Any, completions: int = 1) -> Workload:
    """Returns what a step computes: one pass forward and backward over every row.

    Args:
      config: a ModelTrainConfig with a `length`.
      completions: rows of a prompt.
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


def load_trained(config: ModelTrainConfig, models: Models) -> Loaded:
    """Returns the model of `init_from`, or a new one of the config's shape, with its tokenizer.

    Raises:
      ConfigError: neither or both are given, or tokenizer and model do not fit each other.
    """
    validate_origin(config)
    loaded = models[MODEL]
    if loaded.tokenizer is None:
        if config.overrides:
            raise ConfigError(
                f"{config.stage}.overrides: they change the shape of `init_from`; set `model` itself"
            )
        if config.tokenizer is None:
            raise ConfigError(f"{config.stage}.tokenizer: a new model needs one")
        loaded = dataclasses.replace(
            loaded, tokenizer=models.tokenizer(config.tokenizer)
        )
    size, tokens = loaded.model.config.vocab_size, loaded.tokenizer.vocab_size
    if size < tokens:
        raise ConfigError(
            f"{config.stage}.model.vocab_size={size} is less than the tokenizer's {tokens}"
        )
    return loaded


def train_step(
    config: ModelTrainConfig, loaded: Loaded, loss: Callable[..., Any]
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """Returns a function (state, batch, key) -> (state, metrics), and its optimizer.

    A step is the gradient of the loss, over all microbatches, and one update. The frozen
    parameters are an argument of the jitted function: what it closes over would become a part of
    its program.
    """
    tx = make_optimizer(config.optim, config.steps)
    schedule = make_schedule(config.optim, config.steps)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(
        frozen: Any, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        options = {"microbatches": config.microbatches, "frozen": frozen}
        grads, metrics = gradients(loss, state.params, batch, key, **options)
        rate = schedule(state.step)
        skip = config.on_nonfinite == "skip"
        state, update_metrics = apply_gradients(state, grads, tx, skip_nonfinite=skip)
        rate_metrics = {"learning_rate": (rate, jnp.ones(()))}
        return state.replace(step=state.step + 1), merge(
            metrics, update_metrics, rate_metrics
        )

    program = Program("step", update, [STATE, WHOLE])
    return functools.partial(program, loaded.frozen), tx


def supervised_stage(
    loaded: Loaded, tx: optax.GradientTransformation, **parts: Any
) -> Stage:
    """Returns the Stage of a model that is trained as a whole, or by its adapters.

    Args:
      parts: the fields of Stage that differ: step, batch, open, units, unit.
    """
    model = loaded.model
    return Stage(
        init=lambda key: TrainState.create(model.init_trained(key), tx),
        axes=model.trained_axes(),
        **{
            "start": lambda state: state.replace(params=loaded.start(state.params)),
            **parts,
        },
    )


def language_stage(
    config: Any,
    layout: Layout,
    roles: Roles,
    sources: Sources,
    loss_of: Callable[[Model], Callable[..., Any]],
    streams: Callable[[Tokenizer], tuple[Any, Any]],
    shapes: Shapes,
) -> Stage:
    """Returns the Stage of a language model with a loss on packed text.

    Args:
      config: a StreamConfig with a `length`.
      loss_of: model -> (params, batch, key) -> (scalar, metrics).
      streams: tokenizer -> the training batches, and a pass over held-out ones.
      shapes: of a batch.
    """
    loaded = load_trained(config, Models(config.stage, roles, layout, sources))
    validate_streams(config, layout, loaded.model.config)
    loss = loss_of(loaded.model)
    step, tx = train_step(config, loaded, loss)

    def open_data() -> Data:
        batches, passes = streams(loaded.tokenizer)
        measure = held_out_loss(loaded.model, loss, loaded.tokenizer.byte_lengths())

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            return sum_over(
                passes.restart(),
                lambda b: measure(params, b),
                layout,
                config.eval_batches,
            )

        return Data(batches, evals, lambda state: left_behind(loaded, state.params))

    units = config.batch_size * config.length
    return supervised_stage(
        loaded, tx, step=step, batch=lambda _: shapes, open=open_data, units=units
    )


def language_shapes(size: int, length: int, prefix: str = "") -> Shapes:
    """Returns the shapes of a batch of packed text."""
    names = ("tokens", "targets", "segments", "positions")
    shapes = {name: jax.ShapeDtypeStruct((size, length), np.int32) for name in names}
    shapes["mask"] = jax.ShapeDtypeStruct((size, length), np.float32)
    return {prefix + name: x for name, x in shapes.items()}


def left_behind(loaded: Loaded, params: Any) -> Finished:
    """Returns what a stage leaves whose model is as it was trained."""
    return Finished(
        {store.FOLDER: loaded.saved(params)}, {}, {}, loaded.adapters(params)
    )


# ------------------------------------------------------------------ validation


def validate_training(
    config: Any, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the options of a stage with one model and one loss.

    Args:
      config: a ModelTrainConfig with a `length`.
      model_config: of the model it trains, where it is known yet.
    Raises:
      ConfigError: batch, mesh, microbatches and context do not fit each other.
    """
    validate_origin(config)
    layout.check_batch(config.batch_size, f"{config.stage}.batch_size")
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"{config.stage}.batch_size={config.batch_size} is not divisible by microbatches={config.microbatches}"
        )
    layout.check_batch(
        config.batch_size // config.microbatches, f"a {config.stage} microbatch"
    )
    validate_length(config.length, model_config, f"{config.stage}.length")
    make_schedule(
        config.optim, config.steps
    )  # raises for a warm-up longer than the run
    validate_lora(config.lora, model_config)
    validate_kernel(model_config, layout, config.stage)


def validate_streams(
    config: Any, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates a StreamConfig: as `validate_training`, and that its streams can share a batch."""
    validate_training(config, layout, model_config)
    rows_a_stream(config.batch_size, config.data_shards, config.stage)


def validate_origin(config: ModelTrainConfig) -> None:
    """Raises ConfigError unless the config names one origin of the model."""
    if (config.model is None) == (config.init_from is None):
        raise ConfigError(
            f"{config.stage}: give `model` (a new one) or `init_from` (a trained one), not both or neither"
        )
    if config.lora.rank and config.init_from is None:
        raise ConfigError(
            f"{config.stage}.lora.rank={config.lora.rank}: adapters are of a trained model, `init_from`"
        )


def validate_kernel(
    model_config: TransformerConfig | None, layout: Layout, stage: str
) -> None:
    """Raises ConfigError for an attention without a kernel here, or one that the mesh cuts along time."""
    kernel = "einsum" if model_config is None else model_config.attention
    if layout.platform not in PLATFORMS[kernel]:
        raise ConfigError(
            f"{stage}: model.attention={kernel!r} is a kernel of {'TPUs' if kernel == 'splash' else 'GPUs'}, and these "
            f"devices are {layout.platform}; 'einsum' runs anywhere"
        )
    if kernel == "splash" and layout.mesh.shape["sequence"] > 1:
        raise ConfigError(
            f"{stage}: model.attention='splash' needs whole sequences: mesh.sequence=1"
        )


def validate_lora(config: LoraConfig, model_config: TransformerConfig | None) -> None:
    """Raises ConfigError for targets that are nowhere in a model."""
    if config.rank and model_config is not None:
        Model(model_config, lora=config).trained_axes()


def validate_length(
    length: int, model_config: TransformerConfig | None, context: str
) -> None:
    """Raises ConfigError for sequences longer than the model's context."""
    if model_config is not None and length > model_config.max_length:
        longest = model_config.max_length
        raise ConfigError(
            f"{context}={length} is longer than the model's context, max_length={longest}"
        )


# ------------------------------------------------------------------ held-out data


def held_out_loss(
    model: Model, loss: Callable[..., Any], byte_lengths: np.ndarray
) -> Callable[..., Metrics]:
    """Returns a function (params, batch) -> val_loss, nats per token, and val_nats_per_byte of the
    same targets.

    Args:
      loss: the language-model loss, (params, batch, key) -> (scalar, metrics).
      byte_lengths: UTF-8 bytes of the text of each id of the tokenizer; ids beyond them have none.
    """
    lengths = (
        jnp.zeros(model.config.vocab_size).at[: len(byte_lengths)].set(byte_lengths)
    )

    @jax.jit
    def measure(params: Any, batch: Batch) -> Metrics:
        _, metrics = loss(params, batch, None)
        nll, _ = metrics["loss"]
        metrics["nats_per_byte"] = nats_per_byte(
            nll, batch["targets"], batch["mask"], lengths
        )
        return {f"val_{name}": pair for name, pair in metrics.items()}

    return measure


def sum_over(
    batches: Iterable[dict[str, np.ndarray]],
    measure: Callable[[dict[str, jax.Array]], Metrics],
    layout: Layout,
    most: int = 0,
) -> Metrics:
    """Adds the metrics of a pass over held-out batches, at most `most` of them (0: all)."""
    total: Metrics = {}
    for i, batch in enumerate(batches):
        if most and i == most:
            break
        total = merge(total, hosts.whole(measure(layout.put(batch))))
    return total


def truncation_metrics(batch: Mapping[str, Any]) -> Metrics:
    """Returns what cutting did to a batch of `loader.preference_batches` (arrays of numpy or jax).

    rows_cut: share of the completions that lost tokens, of themselves or of their prompt.
    pairs_dropped: share of the pairs ordered by labels whose completions have the same tokens; they
      weigh 0.
    """
    labels, valid, same = (
        jnp.asarray(batch[name]) for name in ("scores", "valid", "same")
    )
    labeled = jnp.sum(untied_pairs(labels, valid))
    return {
        "rows_cut": (jnp.sum(batch["cut"] * valid), jnp.sum(valid)),
        "pairs_dropped": (
            labeled - jnp.sum(untied_pairs(labels, valid, same)),
            labeled,
        ),
    }
