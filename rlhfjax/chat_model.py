"""Opens the model that `rlhfjax chat` and `rlhfjax serve` are given by a path or a foreign name."""

import logging
from typing import NamedTuple

import jax

from rlhfjax.chat_settings import int8_pays, is_foreign
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.models.size import active_parameters, parameters
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")


class OpenedModel(NamedTuple):
    """A language model whose parameters are not read yet."""

    name: str  # for people
    opened: store.Opened

    @property
    def tokenizer(self) -> Tokenizer:
        return self.opened.tokenizer

    def read(self, int8: bool | None) -> tuple[store.SavedModel, list[str]]:
        """Returns the model with its parameters, and what a user should know about them.

        Args:
          int8: whether weights and cache are int8; None: the weights, if `int8_pays`.
        """
        log.info("%s: %s; reading it", self.name, _size(self.opened))
        model, tokenizer, params = self.opened
        saved = store.SavedModel(model, params(), tokenizer)
        if int8 is not None:
            return (store.int8(saved) if int8 else saved), []
        if not int8_pays(model, jax.default_backend()):
            return saved, []
        note = "weights in int8, which is faster here; --noint8 keeps float32"
        return store.int8(saved, cache=False), [note]


def open_model(path: str | Path, adapter: str, command: str) -> OpenedModel:
    """Returns a language model.

    Args:
      path: a model's folder or workdir, or a foreign name (see `interop.foreign`).
      adapter: a PEFT folder, which is merged into the model; empty: none.
      command: that needs it, for errors.
    Raises:
      CheckpointError: there is no model.
      ConfigError: it is a reward model.
    """
    opened = store.open_model(path, make_layout(), adapter=adapter)
    _validate_head(path, opened, command)
    name = str(path) if is_foreign(path) else store.found(path)
    name += f" with the adapter {adapter}" if adapter else ""
    return OpenedModel(name, opened)


def _size(opened: store.Opened) -> str:
    config = opened.model.config
    count = parameters(config)
    active = ""
    if config.n_experts:
        active = f", {active_parameters(config) / 1e6:,.1f} M active"
    return (
        f"{count / 1e6:,.1f} M parameters{active} ({4 * count / 1e6:,.0f} MB in float32), "
        f"context of {config.max_length:,} tokens"
    )


def _validate_head(path: str | Path, opened: store.Opened, command: str) -> None:
    """Raises ConfigError for a reward model; names a language model of the same recipe."""
    if opened.model.head == "lm":
        return
    if is_foreign(path):
        name, others = str(path), []
    else:
        folder = store.find(path)
        name, others = str(folder), _language_models(folder.parent.parent)
    message = (
        f"{name}: is a reward model, which scores responses and writes none; "
        f"{command} needs a language model"
    )
    if others:
        message += f", such as --workdir={others[-1]}"
    raise ConfigError(message)


def _language_models(recipe: Path) -> list[Path]:
    """Returns the workdirs of a recipe's stages that made a language model."""
    stages = [
        stage
        for stage in store.numbered(recipe)
        if (stage / store.FOLDER / "config.json").exists()
    ]
    return [stage for stage in stages if store.describe(stage).head == "lm"]
