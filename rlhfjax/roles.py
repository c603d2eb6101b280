"""Which models a stage has, and what a step computes with them: what a stage declares of itself.

Loading, placement, the memory estimate and `plan` are loops over what stands here.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax import state as states
from rlhfjax.config import build
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig, make_layout
from rlhfjax.models import lora, quantised
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.programs import Held, recording

PyTree = Any
Head = Literal["lm", "scalar"]


class Role(NamedTuple):
    """A model that takes part in a stage."""

    source: str | TransformerConfig  # where its parameters come from, or the config of a new model
    head: Head = "lm"
    optim: OptimConfig | None = None  # None: frozen
    lora: LoraConfig = LoraConfig()  # rank 0: all of a model with an optimizer is trained
    overrides: Mapping[str, Any] = {}  # changes to the model_config of `source`
    averaged: bool = False  # an EMA of what is trained is kept beside it
    mesh: Literal["train", "frozen"] = "train"
    shares: str | None = None  # the role whose arrays it uses; its own are only those that it trains
    scores: bool = False  # `source` is any reward: a model, or rules, a rubric, several models
    resident: bool = True  # False: on the devices only for a while, before training


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
    length: int  # tokens of a sequence
    units: int = 0  # tokens that a step is said to have: of batches, or of responses
    rounds: int = 1  # forward-backward passes
    microbatches: int = 1  # of an update
    passes: tuple[Pass, ...] = ()
    decoded: int = 0  # rows that are sampled at a time
    sampled: int = 0  # tokens of a response


class Sources(Protocol):
    """Where models come from: the disk, or shapes of models that need not be there."""

    def describe(self, source: str) -> Model: ...

    def open_model(
        self, source: str, layout: Layout, changes: Mapping[str, Any], context: str
    ) -> store.Opened: ...

    def described(self, source: str) -> dict[str, Any] | None:
        """What a `reward.json` says; None where `source` is not described by one."""
        ...


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
    kept: "_Params | None" = None  # what `frozen` is part of

    def merged(self, trained: PyTree) -> PyTree:
        """Returns all parameters, given those that are trained."""
        return states.attach(self.frozen, trained)

    def start(self, params: PyTree) -> PyTree:
        """Returns fresh trainable parameters with the pretrained ones copied over them."""
        return params if self.read is None else states.copy_into(params, self.read())

    def saved(self, trained: PyTree) -> store.SavedModel:
        """Returns what a stage leaves for others: float32 parameters, adapters merged into their base."""
        params, model = self.merged(trained), self.model
        if model.lora.rank:
            params = lora.merge(model.lora, quantised.wide(params, model.axes()))
            model = Model(model.config, model.head)
        return store.SavedModel(model, params, self.tokenizer)

    def adapters(self, trained: PyTree) -> dict[str, Any]:
        """Returns `Finished.adapters`: the trained adapters, where there are any."""
        return {"adapter": (self.model, trained)} if self.model.lora.rank else {}


class Models:
    """Loads the models of a stage by the names of their roles.

    Parameters that several roles take from one source onto one mesh are read once.
    """

    def __init__(
        self,
        stage: str,
        roles: Roles,
        layout: Layout,
        sources: Sources,
        frozen_mesh: MeshConfig | None = None,
    ):
        self._stage, self._roles, self.sources = stage, roles, sources
        frozen = layout if frozen_mesh is None else make_layout(frozen_mesh, layout.pool)
        self.layouts = {"train": layout, "frozen": frozen}
        self._loaded: dict[str, Loaded] = {}
        self._params: weakref.WeakValueDictionary[Any, _Params] = weakref.WeakValueDictionary()

    @property
    def frozen_layout(self) -> Layout | None:
        """The mesh of the frozen models, None where it is that of training."""
        same = self.layouts["frozen"] is self.layouts["train"]
        return None if same else self.layouts["frozen"]

    def load(self, name: str) -> Loaded:
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
        mesh = role.mesh if self.frozen_layout is not None else "train"
        context = f"{self._stage}.overrides"
        opened = self.sources.open_model(role.source, self.layouts[mesh], role.overrides, context)
        config = opened.model.config
        lacks_head = opened.model.head != role.head
        if lacks_head and role.lora.rank and role.head == "lm" and not config.tie_embeddings:
            context = f"{self._stage}.init_from={role.source}"
            raise ConfigError(f"{context}: adapters need its head, and it has none")
        model = Model(config, role.head, role.lora)
        key = (str(role.source), mesh, repr(dict(role.overrides)))

        def read() -> PyTree:
            return self._read(key, opened).of_head(lacks_head)

        if role.optim is not None and not role.lora.rank:
            return Loaded(model, opened.tokenizer, {}, read)
        owner = self._loaded.get(role.shares)
        kept = _Params(owner.frozen) if owner else self._read(key, opened)
        params = kept.of_head(lacks_head)
        if role.optim is None:
            return Loaded(model, opened.tokenizer, params, read, kept)
        if role.lora.base != "float32" and role.shares is None:
            params, kept = frozen_base(model, params), None
        frozen = params if role.head == "lm" else {"backbone": params["backbone"]}
        return Loaded(model, opened.tokenizer, frozen, lambda: params, kept)

    def _read(self, key: tuple[str, str, str], opened: store.Opened) -> "_Params":
        params = self._params.get(key)
        if params is None:
            params = _Params(opened.params())
            self._params[key] = params
        return params


class _Params:
    """Parameters that roles share as long as one of them keeps them."""

    def __init__(self, tree: PyTree):
        self._tree = tree

    def of_head(self, lacks_head: bool) -> PyTree:
        """Returns the tree, without a head that is not the role's."""
        left_out = ("head",) if lacks_head else ()
        return {name: part for name, part in self._tree.items() if name not in left_out}


def frozen_base(model: Model, params: PyTree) -> PyTree:
    """Returns parameters as the base of a model's adapters: with `lora.base` its kernels quantized."""
    kind = model.lora.base
    if not recording():
        return quantised.base(params, model.axes(), kind)
    shapes = jax.eval_shape(lambda tree: quantised.base(tree, model.axes(), kind), params)
    shardings = {path: x.sharding for path, x in jax.tree.leaves_with_path(params)}

    def held(path: Any, x: jax.ShapeDtypeStruct) -> Held:
        whole = next(iter(shardings.values())).mesh
        sharding = shardings.get(path, NamedSharding(whole, PartitionSpec()))
        return Held(x.shape, x.dtype, sharding=sharding, owner=f"{kind} base", path=str(path))

    return jax.tree.map_with_path(held, shapes)
