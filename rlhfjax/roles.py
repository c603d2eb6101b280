"""Which models a stage has, and what a step computes with them: what a stage declares of itself.

Loading, placement, the memory estimate and `plan` are loops over what stands here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax import state as states
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig, make_layout
from rlhfjax.models import lora, quantized
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.programs import Held, keep, recording
from rlhfjax.types import PyTree

REWARD = store.REWARD
Head = Literal["lm", "scalar"]


class Role(NamedTuple):
    """A model that takes part in a stage."""

    source: (
        str | TransformerConfig
    )  # where its parameters come from, or the config of a new model
    head: Head = "lm"
    optim: OptimConfig | None = None  # None: frozen
    lora: LoraConfig = (
        LoraConfig()
    )  # rank 0: all of a model with an optimizer is trained
    overrides: Mapping[str, Any] = {}  # changes to the model_config of `source`
    averaged: bool = False  # an EMA of what is trained is kept beside it
    mesh: Literal["train", "frozen"] = "train"
    shares: str | None = (
        None  # the role whose arrays it uses; its own are only those that it trains
    )
    scores: bool = (
        False  # `source` is any reward: a model, or rules, a rubric, several models
    )
    head_alone: bool = (
        False  # of a trained model: its trunk is that of the role it shares with
    )


Roles = Mapping[str, Role]


class Pass(NamedTuple):
    """Tokens of a step that go through a model: forward alone, or forward and backward."""

    program: str
    role: str
    tokens: int
    length: int  # of a sequence, which attention depends on
    trains: bool = False


class Workload(NamedTuple):
    """What one step of a stage computes; of a job, one batch."""

    rows: int  # sequences of one forward-backward pass, over all devices
    batch: int  # what of them the mesh divides: rows, or prompts that have several rows
    length: int  # tokens of a sequence
    units: int = 0  # tokens that a step is said to have: of batches, or of responses
    rounds: int = 1  # forward-backward passes
    microbatches: int = 1  # of an update
    passes: tuple[Pass, ...] = ()
    decoded: int = 0  # rows that are sampled at a time
    sampled: int = 0  # tokens of a response


def scorers(**sources: str | None) -> dict[str, Role]:
    """Returns the roles of rewards that are only asked, those that are named."""
    return {
        name: Role(source, head="scalar", scores=True)
        for name, source in sources.items()
        if source
    }


def job_workload(rows: int, length: int) -> Workload:
    """Returns what a batch of a job computes, which trains nothing."""
    return Workload(rows=rows, batch=rows, length=length)


@runtime_checkable
class Descriptions(Protocol):
    """Says of which models a reward is made."""

    def described(self, source: str) -> dict[str, Any] | None:
        """Returns what a `reward.json` says; None where `source` is not described by one."""
        ...


@runtime_checkable
class Sources(Descriptions, Protocol):
    """Where models come from: the disk, or shapes of models that need not be there."""

    def open_model(
        self,
        source: str,
        layout: Layout,
        changes: Mapping[str, Any] = ...,
        context: str = ...,
    ) -> store.Opened:
        """Returns a model whose parameters are not read yet."""
        ...

    def load(self, source: str, layout: Layout) -> store.SavedModel:
        """Returns a model with its parameters."""
        ...

    def tokenizer(self, source: str) -> Tokenizer: ...


DISK: Sources = store  # the models that there are


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model of a stage.

    frozen: the parameters that are not trained: all of a frozen model; none of one that is trained
      as a whole; with adapters all but a scalar head, the same arrays from the beginning to the end.
    read: reads all parameters that there are to start from; None for a new model.
    """

    model: Model
    tokenizer: Tokenizer | None
    frozen: PyTree
    read: Callable[[], PyTree] | None
    source_head: str = ""  # the head of the model that it comes from

    def merged(self, trained: PyTree) -> PyTree:
        """Returns all parameters, given those that are trained."""
        return states.merge_params(self.frozen, trained)

    def start(self, params: PyTree) -> PyTree:
        """Returns fresh trainable parameters with the pretrained ones copied over them."""
        return params if self.read is None else states.copy_into(params, self.read())

    def saved(self, trained: PyTree) -> store.SavedModel:
        """Returns what a stage leaves for others: float32 parameters, adapters merged into their base."""
        params, model = self.merged(trained), self.model
        if model.lora.rank:
            params = lora.merge(model.lora, quantized.wide(params, model.axes()))
            model = Model(model.config, model.head)
        return store.SavedModel(model, params, self.tokenizer)

    def adapters(self, trained: PyTree) -> dict[str, Any]:
        """Returns `Finished.adapters`: the trained adapters, where there are any."""
        return {"adapter": (self.model, trained)} if self.model.lora.rank else {}


class Models:
    """The models of a stage by the names of their roles, and sources for its rewards.

    Frozen parameters that come from one source onto one mesh are read once and shared.
    """

    def __init__(
        self,
        stage: str,
        roles: Roles,
        layout: Layout,
        sources: Sources,
        frozen_mesh: MeshConfig | None = None,
    ):
        self._stage, self._roles, self._sources = stage, roles, sources
        other = None if frozen_mesh is None else make_layout(frozen_mesh, layout.pool)
        self.frozen_layout = (
            other  # of the models that are not trained; None: they share the mesh
        )
        self._layouts = {"train": layout, "frozen": other or layout}
        self._loaded: dict[str, Loaded] = {}
        self._frozen: dict[Any, PyTree] = {}  # parameters by source and mesh

    def __getitem__(self, name: str) -> Loaded:
        """Returns the model of a role.

        Raises:
          ConfigError: `overrides` make another model of it, or adapters lack a head.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(self._roles[name])
        return self._loaded[name]

    def _load(self, role: Role) -> Loaded:
        if isinstance(role.source, TransformerConfig):
            return Loaded(Model(role.source, role.head, role.lora), None, {}, None)
        layout = self._layouts[role.mesh]
        opened = self.open_model(
            role.source, layout, role.overrides, f"{self._stage}.overrides"
        )
        config = opened.model.config
        lacks_head = opened.model.head != role.head
        if (
            lacks_head
            and role.lora.rank
            and role.head == "lm"
            and not config.tie_embeddings
        ):
            context = f"{self._stage}.init_from={role.source}"
            raise ConfigError(f"{context}: adapters need its head, and it has none")
        model = Model(config, role.head, role.lora)

        owner, key = (
            self._loaded.get(role.shares),
            _key(role.source, layout, role.overrides),
        )

        def read() -> PyTree:
            kept = self._frozen.get(key) if owner is None else owner.frozen
            params = kept or opened.params()
            return _without_head(params) if lacks_head else params

        head = opened.model.head
        if role.optim is not None and not role.lora.rank:
            return Loaded(model, opened.tokenizer, {}, read, head)
        if owner is not None:
            params = read()
        elif role.lora.base != "float32":
            params = keep(frozen_base(model, read()))
        else:
            self._keep(role.source, layout, role.overrides, opened.params)
            params = read()
        if role.optim is None:
            return Loaded(model, opened.tokenizer, params, lambda: params, head)
        frozen = params if role.head == "lm" else {"backbone": params["backbone"]}
        return Loaded(model, opened.tokenizer, frozen, lambda: params, head)

    # Sources for rewards, which load their models themselves.

    def open_model(
        self,
        source: str,
        layout: Layout,
        changes: Mapping[str, Any] = {},
        context: str = "",
    ) -> store.Opened:
        return self._sources.open_model(source, layout, changes, context)

    def load(self, source: str, layout: Layout) -> store.SavedModel:
        """Returns a frozen model."""
        opened = self.open_model(source, layout)
        params = self._keep(source, layout, {}, opened.params)
        return store.SavedModel(opened.model, params, opened.tokenizer)

    def tokenizer(self, source: str) -> Tokenizer:
        return self._sources.tokenizer(source)

    def described(self, source: str) -> dict[str, Any] | None:
        return self._sources.described(source)

    def _keep(
        self, source: str, layout: Layout, changes: Any, read: Callable[[], PyTree]
    ) -> PyTree:
        key = _key(source, layout, changes)
        if key not in self._frozen:
            self._frozen[key] = keep(read())
        return self._frozen[key]


def _key(
    source: str, layout: Layout, changes: Mapping[str, Any]
) -> tuple[str, int, str]:
    return str(source), id(layout), repr(dict(changes))


def _without_head(params: PyTree) -> PyTree:
    return {name: part for name, part in params.items() if name != "head"}


def frozen_base(model: Model, params: PyTree) -> PyTree:
    """Returns parameters as the base of a model's adapters: with `lora.base` its kernels quantized."""
    kind = model.lora.base
    if not recording():
        return quantized.base(params, model.axes(), kind)
    shapes = jax.eval_shape(
        lambda tree: quantized.base(tree, model.axes(), kind), params
    )
    shardings = {path: x.sharding for path, x in jax.tree.leaves_with_path(params)}

    def held(path: Any, x: jax.ShapeDtypeStruct) -> Held:
        whole = next(iter(shardings.values())).mesh
        sharding = shardings.get(path, NamedSharding(whole, PartitionSpec()))
        return Held(
            x.shape, x.dtype, sharding=sharding, owner=f"{kind} base", path=str(path)
        )

    return jax.tree.map_with_path(held, shapes)
