"""What the stages share: their data options, how they come by a model, and the step of every one-loss stage."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax import hosts
from rlhfjax import state as states
from rlhfjax.config import TrainConfig
from rlhfjax.data.loader import Shards, rows_a_stream
from rlhfjax.data.sources import Concatenated, Source, open_source
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models import lora, quantised
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.kernels import PLATFORMS
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig, make_schedule
from rlhfjax.stages import Finished, Pairs, Stage

log = logging.getLogger("rlhfjax")
PyTree = Any


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where rows come from; see `data.sources.open_source` for each option."""

    spec: str
    kind: str | None = None
    split: str = "train"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    data_dir: str | None = None
    on_bad_row: str = "error"
    min_turns: int = 0
    documents: str = "file"
    limit: int = 0  # rows; 0: all

    def open(self) -> Source:
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("spec", "limit")}
        source = open_source(self.spec, **options)
        if source.skipped:
            log.warning("source %r: %d malformed rows are left out", self.spec, source.skipped)
        return Limited(source, self.limit) if self.limit else source


class Limited:
    """The first rows of a source."""

    def __init__(self, source: Source, limit: int):
        self.kind, self.skipped, self._source, self._limit = source.kind, source.skipped, source, limit

    def __len__(self) -> int:
        return min(self._limit, len(self._source))

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def where(self, index: int) -> str:
        return self._source.where(index)


def open_sources(configs: Iterable[SourceConfig], what: str) -> Source:
    """All of a stage's sources as one.

    Raises:
      ConfigError: there are none.
    """
    sources = [config.open() for config in configs]
    if not sources:
        raise ConfigError(f"{what}: at least one source is needed")
    return sources[0] if len(sources) == 1 else Concatenated(sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTrainConfig(TrainConfig):
    """A stage that trains one model with one loss."""

    tokenizer: str | None = None  # file or folder; None: that of `init_from`
    model: TransformerConfig | None = None  # None: the shape of `init_from`
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `init_from`'s: dropout, dtype, remat, …
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)  # rank 0: all of the model is trained
    batch_size: int
    microbatches: int = 1
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    eval_batches: int = 0  # 0: the whole held-out split


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig(ModelTrainConfig):
    """One that trains on a stream of documents or examples."""

    # independent streams that a batch is made of, each host running its own; the order of the data depends on how many
    data_shards: int = 1


@dataclasses.dataclass(frozen=True)
class Start:
    """The model that a stage begins from, and the parameters that it loads, if any.

    With adapters these parameters are the base: the same arrays from beginning to end, trained and saved by nobody.
    """

    model: Model
    tokenizer: Tokenizer
    params: PyTree | None

    @property
    def frozen(self) -> PyTree:
        return frozen_part(self.model, self.params)

    def whole(self, trained: PyTree) -> PyTree:
        """All parameters, of those that are trained."""
        return states.attach(self.frozen, trained)

    def saved(self, trained: PyTree) -> store.SavedModel:
        return to_save(self.model, self.whole(trained), self.tokenizer)


def frozen_part(model: Model, params: PyTree) -> PyTree:
    """What is not trained of a model that begins with `params`: nothing, or with adapters all but a scalar head."""
    if not model.lora.rank:
        return {}
    return params if model.head == "lm" else {"backbone": params["backbone"]}


def adapters_of(model: Model, trained: PyTree) -> dict[str, Any]:
    """What `Finished.adapters` is of a model: its adapters, where it has them."""
    return {"adapter": (model, trained)} if model.lora.rank else {}


def base_of(model: Model, params: PyTree) -> PyTree:
    """Loaded parameters as the base of the model's adapters: with `lora.base` its kernels quantised."""
    kind = model.lora.base
    return params if kind == "float32" else quantised.base(params, model.axes(), kind)


def to_save(model: Model, params: PyTree, tokenizer: Tokenizer) -> store.SavedModel:
    """What a stage leaves for others: plain float32 parameters, adapters merged into the base they were trained on."""
    if not model.lora.rank:
        return store.SavedModel(model, params, tokenizer)
    plain = lora.merge(model.lora, quantised.wide(params, model.axes()))
    return store.SavedModel(Model(model.config, model.head), plain, tokenizer)


def begin(config: ModelTrainConfig, layout: Layout, head: str = "lm") -> Start:
    """The model of `init_from`, or a new one of the config's shape.

    Raises:
      ConfigError: neither or both are given, or tokenizer and model do not fit each other.
    """
    check_origin(config)
    if config.init_from is not None:
        saved = store.load(config.init_from, layout)
        saved = store.override(saved, config.overrides, f"{config.stage}.overrides")
        shape, tokenizer, params = saved.model.config, saved.tokenizer, dict(saved.params)
        if saved.model.head != head:
            params.pop("head", None)
            if config.lora.rank and head == "lm" and not shape.tie_embeddings:
                raise ConfigError(
                    f"{config.stage}.init_from={config.init_from}: adapters need its head, and it has none"
                )
    else:
        if config.overrides:
            raise ConfigError(f"{config.stage}.overrides: they change the shape of `init_from`; set `model` itself")
        if config.tokenizer is None:
            raise ConfigError(f"{config.stage}.tokenizer: a new model needs one")
        shape, params = config.model, None
        tokenizer = load_tokenizer(config.tokenizer)
    if shape.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{config.stage}.model.vocab_size={shape.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}"
        )
    model = Model(shape, head, config.lora)
    return Start(model, tokenizer, params if params is None else base_of(model, params))


def check_training(config: Any, layout: Layout, shape: TransformerConfig | None) -> None:
    """What a stage with one model and one loss refuses before anything is computed.

    Args:
      config: a ModelTrainConfig with a `length`.
      shape: of the model it trains, where it is known yet.
    Raises:
      ConfigError: batch, mesh, microbatches and context do not fit each other.
    """
    check_origin(config)
    layout.check_batch(config.batch_size, f"{config.stage}.batch_size")
    if config.microbatches < 1 or config.batch_size % config.microbatches:
        raise ConfigError(
            f"{config.stage}.batch_size={config.batch_size} is not divisible by microbatches={config.microbatches}"
        )
    layout.check_batch(config.batch_size // config.microbatches, f"a {config.stage} microbatch")
    check_length(config.length, shape, f"{config.stage}.length")
    make_schedule(config.optim, config.steps)  # refuses a warm-up longer than the run
    check_lora(config.lora, shape)
    check_kernel(shape, layout, config.stage)


def check_streams(config: Any, layout: Layout, shape: TransformerConfig | None) -> None:
    """`check_training` of a StreamConfig, and that its streams can share a batch."""
    check_training(config, layout, shape)
    rows_a_stream(config.batch_size, config.data_shards, config.stage)


def own_shards(count: int, batch_size: int, layout: Layout) -> Shards:
    """Of `count` streams those that this host runs, whose rows lie on its devices."""
    return Shards(count, layout.own_parts(batch_size, count))


def check_kernel(shape: TransformerConfig | None, layout: Layout, stage: str) -> None:
    """Refuses an attention that these devices have no kernel for, or that the mesh would cut along time."""
    kernel = "einsum" if shape is None else shape.attention
    if layout.platform not in PLATFORMS[kernel]:
        raise ConfigError(
            f"{stage}: model.attention={kernel!r} is a kernel of {'TPUs' if kernel == 'splash' else 'GPUs'}, and these "
            f"devices are {layout.platform}; 'einsum' runs anywhere"
        )
    if kernel == "splash" and layout.mesh.shape["sequence"] > 1:
        raise ConfigError(f"{stage}: model.attention='splash' needs whole sequences: mesh.sequence=1")


def check_lora(config: LoraConfig, shape: TransformerConfig | None) -> None:
    """Refuses targets that are nowhere in a model."""
    if config.rank and shape is not None:
        Model(shape, lora=config).trained_axes()


def check_origin(config: ModelTrainConfig) -> None:
    if (config.model is None) == (config.init_from is None):
        raise ConfigError(
            f"{config.stage}: give `model` (a new one) or `init_from` (a trained one), not both or neither"
        )
    if config.lora.rank and config.init_from is None:
        raise ConfigError(f"{config.stage}.lora.rank={config.lora.rank}: adapters are of a trained model, `init_from`")


def check_length(length: int, shape: TransformerConfig | None, where: str) -> None:
    if shape is not None and length > shape.max_length:
        raise ConfigError(f"{where}={length} is longer than the model's context, max_length={shape.max_length}")


def place(params: PyTree, like: PyTree) -> PyTree:
    """Copies loaded parameters over fresh ones, subtree by subtree: what was not loaded stays as it was born.

    They may have been loaded onto another mesh.
    """
    if isinstance(like, Mapping):
        return {k: place(params[k], v) if k in params else v for k, v in like.items()}
    return jax.device_put(jnp.array(params, like.dtype, copy=True), like.sharding)


def loss_step(
    loss: Callable[..., tuple[jax.Array, Pairs]],
    tx: optax.GradientTransformation,
    config: ModelTrainConfig,
    schedule: Callable[[jax.Array], jax.Array],
    frozen: PyTree,
) -> Callable[..., Any]:
    """The jitted step of a stage with one loss: gradient, update, metrics.

    Frozen parameters are an argument: what a jitted function closes over becomes a part of its program.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def step(
        frozen: PyTree, state: states.TrainState, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[states.TrainState, Pairs]:
        options = {"microbatches": config.microbatches, "frozen": frozen}
        grads, pairs = states.gradients(loss, state.params, batch, key, **options)
        rate = schedule(state.step)
        state, more = states.apply_gradients(state, grads, tx, skip_nonfinite=config.on_nonfinite == "skip")
        return state.replace(step=state.step + 1), merge(pairs, more, {"learning_rate": (rate, jnp.ones(()))})

    return functools.partial(step, frozen)


def sum_over(
    batches: Iterable[dict[str, np.ndarray]],
    measure: Callable[[dict[str, jax.Array]], Pairs],
    layout: Layout,
    most: int,
) -> Pairs:
    """Adds the pairs of a pass over held-out batches, at most `most` of them (0: all)."""
    total: Pairs = {}
    for i, batch in enumerate(batches):
        if most and i == most:
            break
        total = merge(total, hosts.whole(measure(layout.put(batch))))
    return total


def assemble(
    config: ModelTrainConfig,
    start: Start,
    *,
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    batches: Any,
    evals: Callable[[states.TrainState], Pairs],
    finish: Callable[[states.TrainState], Finished] | None = None,
    units: int,
    unit: str = "tokens",
) -> Stage:
    """A Stage with one model and one loss."""

    def keep(state: states.TrainState) -> Finished:
        return Finished({store.FOLDER: start.saved(state.params)}, {}, {}, adapters_of(start.model, state.params))

    def load(state: states.TrainState) -> states.TrainState:
        return state if start.params is None else state.replace(params=place(start.params, state.params))

    return Stage(
        init=lambda key: states.TrainState.create(start.model.init_trained(key), tx),
        axes=start.model.trained_axes(),
        start=load,
        batches=batches,
        step=loss_step(loss, tx, config, schedule, start.frozen),
        evals=evals,
        finish=finish or keep,
        units=units,
        unit=unit,
    )
