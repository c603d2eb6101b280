"""A model with a PEFT adapter merged into it: W + s B A for every adapted kernel.

    found = adapted(foreign.find("hf:FOLDER"), "adapter")

Ranks and scales s may differ from module to module, unlike those of adapters that are trained.
"""

import dataclasses
import functools

import jax
import numpy as np

from rlhfjax import paths, state
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer
from rlhfjax.data.tokenizer_files import FILE
from rlhfjax.interop import foreign
from rlhfjax.interop.foreign import Foreign
from rlhfjax.interop.peft import tree_of
from rlhfjax.interop.peft_modules import (
    SCORE,
    Adapter,
    Modules,
    Params,
    module_name,
    modules_of,
    read,
    shape_a,
    split_b,
)
from rlhfjax.mesh import Layout
from rlhfjax.models import Model, lora
from rlhfjax.models.lora import LoraConfig
from rlhfjax.paths import Path


def adapted(base: Foreign, folder: str | Path) -> Foreign:
    """Returns a model with the adapter of a PEFT folder merged into it when it is read.

    An adapter with a `score` makes a reward model of a language model. The tokenizer is the
    folder's if it has one.

    Raises:
      CheckpointError, ConfigError: as `read` and `modules_of` of `peft_modules`.
    """
    folder = paths.path(folder)
    content = read(folder)
    head = "scalar" if SCORE in content.tensors else base.model.head
    model = dataclasses.replace(base.model, head=head)
    modules = modules_of(content, model)

    def params(layout: Layout) -> Params:
        return _merged(model, base.params(layout), modules, layout)

    def tokenizer() -> Tokenizer:
        return own_tokenizer(folder, model) or base.tokenizer()

    return Foreign(model, params, tokenizer)


def own_tokenizer(folder: str | Path, model: Model) -> Tokenizer | None:
    """Returns the tokenizer in a PEFT folder, which has the template that it was trained with."""
    folder = paths.path(folder)
    if not (folder / FILE).exists():
        return None
    return foreign.validated(load_tokenizer(folder), model, str(folder))


def _merged(model: Model, base: Params, modules: Modules, layout: Layout) -> Params:
    adapters = _of_one_rank(model, modules)
    config = LoraConfig(rank=_rank(modules), alpha=float(_rank(modules)))
    shardings = state.shardings(model.shapes(), model.axes(), layout)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def merge(base: Params, adapters: Params) -> Params:
        return lora.merge(config, state.merge_params(base, adapters))

    kept = {name: part for name, part in base.items() if name not in modules.head}
    return merge(kept, adapters | modules.head)


def _rank(modules: Modules) -> int:
    return max(len(a) for _, a, _ in modules.pairs)


def _of_one_rank(model: Model, modules: Modules) -> Params:
    """Returns the tree of adapters of the largest rank and of scale 1, which are the same product.

    Zeros fill those of a smaller rank, and with stacked layers those of layers without an adapter.
    """
    rank = _rank(modules)
    by_kernel: dict[str, Adapter] = {}
    for row, a, b in modules.pairs:
        missing = (0, rank - len(a))
        a = np.pad(a, (missing, (0, 0)))
        b = np.pad(b, ((0, 0), missing))
        scale = np.float32(modules.config.scale_of(module_name(row)))
        for path, part in split_b(row, b, modules.shapes).items():
            by_kernel[path] = shape_a(row, a, modules.shapes[path]), scale * part
    return tree_of(model, _in_all_layers(model, by_kernel))


def _in_all_layers(model: Model, by_kernel: dict[str, Adapter]) -> dict[str, Adapter]:
    """Returns the adapters, with zeros in the layers that lack one; stacked layers need all."""
    if not model.config.scan_layers:
        return by_kernel
    filled = {}
    for path, (a, b) in by_kernel.items():
        start, _, rest = path.partition("/layer_")
        _, _, module = rest.partition("/")
        for i in range(model.config.n_layers):
            other = f"{start}/layer_{i}/{module}"
            zeros = np.zeros_like(a), np.zeros_like(b)
            filled[other] = by_kernel.get(other, zeros)
    return filled
