"""Roles: the models that take part in a stage, and what a step computes with them.

A stage declares its roles. Loading, placement, the memory estimate and `plan` loop over them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax import state as states
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import peft, store
from rlhfjax.interop.adapted import own_tokenizer
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

    source: str | TransformerConfig | Mapping[str, Any]
    """Where the parameters come from, or the config of a new model; of a reward its description."""
    head: Head = "lm"
    """The head of the model in the stage."""
    optim: OptimConfig | None = None
    """The optimizer; None: the model is frozen."""
    lora: LoraConfig = LoraConfig()
    """Adapters of a trained model; rank 0: all parameters are trained."""
    adapter: str = ""
    """PEFT folder with the adapters that training starts from; empty: fresh ones."""
    overrides: Mapping[str, Any] = {}
    """Changes to the model_config of `source`."""
    averaged: bool = False
    """Keep an EMA of the trained parameters."""
    mesh: Literal["train", "frozen"] = "train"
    """The mesh that the model lives on."""
    shares: str | None = None
    """The role whose arrays the model uses; it owns only the arrays that it trains."""
    scores: bool = False
    """`source` is any reward: a model, several models, a rubric, or rules."""
    labels: bool = False
    """With `scores`: `source` may also be a labeler that is not a reward, such as rankings."""
    head_alone: bool = False
    """Only the head is trained; the trunk is that of the role in `shares`."""
    keeps_head: bool = False
    """The model of `source` must have the same head, which is trained further."""


Roles = Mapping[str, Role]


class Pass(NamedTuple):
    """One pass of a step's tokens through a model: forward, or forward and backward."""

    program: str
    role: str
    tokens: int
    length: int  # tokens of one sequence, which the cost of attention depends on
    trains: bool = False  # with a backward pass


class Workload(NamedTuple):
    """What one step of a training stage, or one batch of a job, computes."""

    rows: int  # sequences per forward-backward pass, over all devices
    batch: (
        int  # the size that the mesh divides: rows, or prompts with several rows each
    )
    length: int  # tokens per sequence
    units: int = (
        0  # tokens per step in the logged rate: of the batch, or of the responses
    )
    rounds: int = 1  # forward-backward passes per step
    microbatches: int = 1  # per update
    passes: tuple[Pass, ...] = ()
    decoded: int = 0  # rows that are sampled at a time
    sampled: int = 0  # tokens per response


def scorers(**sources: str | Mapping[str, Any] | None) -> dict[str, Role]:
    """Returns the roles of frozen rewards; a source that is empty or None has no role."""
    return {
        name: Role(source, head="scalar", scores=True)
        for name, source in sources.items()
        if source
    }


def job_workload(rows: int, length: int) -> Workload:
    """Returns the workload of a batch of a job."""
    return Workload(rows=rows, batch=rows, length=length)


@runtime_checkable
class Descriptions(Protocol):
    """Tells which models a reward is made of."""

    def described(self, source: str, /) -> dict[str, Any] | None:
        """Returns the contents of the source's `reward.json`; None if it has none."""
        ...


@runtime_checkable
class Sources(Descriptions, Protocol):
    """Where models come from: the disk, or abstract arrays in place of models."""

    def open_model(
        self,
        source: str,
        /,
        layout: Layout,
        changes: Mapping[str, Any] = ...,
        context: str = ...,
    ) -> store.Opened:
        """Returns a model without reading its parameters."""
        ...

    def load(self, source: str, /, layout: Layout) -> store.SavedModel:
        """Returns a model with its parameters."""
        ...

    def tokenizer(self, source: str, /) -> Tokenizer: ...


DISK: Sources = store


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model of a stage."""

    model: Model
    tokenizer: Tokenizer | None
    frozen: PyTree
    """Frozen parameters, the same arrays during the whole stage.

    All parameters of a frozen model. With adapters: all but a scalar head. If the whole model is
    trained: none.
    """
    read: Callable[[], PyTree] | None
    """Reads the pretrained parameters; None for a new model."""
    source_head: str = ""
    """The head of the model in `Role.source`."""

    def merged(self, trained: PyTree) -> PyTree:
        """Returns all parameters, given those that are trained."""
        return states.merge_params(self.frozen, trained)

    def start(self, params: PyTree) -> PyTree:
        """Returns fresh trainable parameters with the pretrained ones copied over them."""
        return params if self.read is None else states.copy_into(params, self.read())

    def saved(self, trained: PyTree) -> store.SavedModel:
        """Returns the model that a stage leaves: in float32, adapters merged into their base."""
        params = self.merged(trained)
        model = self.model
        if model.lora.rank:
            params = lora.merge(model.lora, quantized.wide(params, model.axes()))
            model = Model(model.config, model.head)
        assert self.tokenizer is not None  # a new model has one once it is trained
        return store.SavedModel(model, params, self.tokenizer)

    def adapters(self, trained: PyTree) -> dict[str, Any]:
        """Returns the trained adapters, if there are any, for `Finished.adapters`."""
        return {"adapter": (self.model, trained)} if self.model.lora.rank else {}


class Models:
    """The models of a stage by the names of their roles, and the sources of its rewards.

    Frozen parameters of one source on one mesh are read once and shared.
    """

    def __init__(
        self,
        stage: str,
        roles: Roles,
        layout: Layout,
        sources: Sources,
        frozen_mesh: MeshConfig | None = None,
    ):
        self._stage = stage
        self._roles = roles
        self._sources = sources
        # The layout of frozen models; None: they are on the mesh of training.
        self.frozen_layout: Layout | None = None
        if frozen_mesh is not None:
            self.frozen_layout = make_layout(frozen_mesh, layout.pool)
        self._layouts = {"train": layout, "frozen": self.frozen_layout or layout}
        self._loaded: dict[str, Loaded] = {}
        self._frozen: dict[Any, PyTree] = {}  # parameters by source and mesh

    def __getitem__(self, name: str) -> Loaded:
        """Returns the model of a role.

        Raises:
          ConfigError: `overrides` change the parameters, or adapters lack a head.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(self._roles[name])
        return self._loaded[name]

    def _load(self, role: Role) -> Loaded:
        if isinstance(role.source, TransformerConfig):
            return Loaded(Model(role.source, role.head, role.lora), None, {}, None)
        source, layout = str(role.source), self._layouts[role.mesh]
        opened = self.open_model(
            source, layout, role.overrides, f"{self._stage}.overrides"
        )
        config = opened.model.config
        head = opened.model.head
        has_new_head = head != role.head
        needs_head = role.lora.rank and role.head == "lm" and not config.tie_embeddings
        if has_new_head and needs_head:
            context = f"{self._stage}.init_from={source}"
            raise ConfigError(
                f"{context}: adapters need a language-model head, found none"
            )
        model = Model(config, role.head, role.lora)
        owner = self._loaded.get(role.shares) if role.shares else None
        key = _key(source, layout, role.overrides)

        def read() -> PyTree:
            kept = self._frozen.get(key) if owner is None else owner.frozen
            params = kept or opened.params()
            return _without_head(params) if has_new_head else params

        if role.optim is not None and not role.lora.rank:
            return Loaded(model, opened.tokenizer, {}, read, head)
        if owner is not None:
            params = read()
        elif role.lora.base != "float32":
            params = keep(frozen_base(model, read()))
        else:
            self._keep(source, layout, role.overrides, opened.params)
            params = read()
        if role.optim is None:
            return Loaded(model, opened.tokenizer, params, lambda: params, head)
        frozen = params if role.head == "lm" else {"backbone": params["backbone"]}

        def start() -> PyTree:
            if not role.adapter:
                return params
            return _read_adapter(role.adapter, model, f"{self._stage}.lora")

        own = own_tokenizer(role.adapter, model) if role.adapter else None
        return Loaded(model, own or opened.tokenizer, frozen, start, head)

    # The protocol `Sources`, for rewards, which load their models themselves.

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


def _read_adapter(folder: str, model: Model, option: str) -> PyTree:
    """Returns the adapters of a PEFT folder. Raises ConfigError unless they are the model's."""
    found, adapters = peft.load_peft(
        folder, dataclasses.replace(model, lora=LoraConfig())
    )
    shapes, expected = (
        jax.tree.map(lambda x: x.shape, tree)
        for tree in (adapters, model.trained_shapes())
    )
    if shapes != expected or not math.isclose(found.lora.scale, model.lora.scale):
        theirs = found.lora
        raise ConfigError(
            f"{option}: must be those of the adapter {folder}: rank={theirs.rank}, "
            f"alpha={theirs.alpha:g}, targets={theirs.targets!r}"
        )
    return adapters


def _without_head(params: PyTree) -> PyTree:
    return {name: part for name, part in params.items() if name != "head"}


def frozen_base(model: Model, params: PyTree) -> PyTree:
    """Returns the frozen base of a model's adapters, its kernels quantized by `lora.base`."""
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
