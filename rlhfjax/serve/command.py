"""`rlhfjax serve`: loads models, and answers requests until it is stopped."""

import dataclasses
import logging
import time
from collections.abc import Sequence

import jax

from rlhfjax import chat_model, paths
from rlhfjax.chat_settings import Options, choose_settings, is_foreign, shown_settings
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.paths import Path
from rlhfjax.serve.engine import Engine
from rlhfjax.serve.score import Scorer, load_scorer
from rlhfjax.serve.served import Served
from rlhfjax.web import access

log = logging.getLogger("rlhfjax")
LONGEST = 2048  # tokens of prompt and response, unless a flag says otherwise
VOTES = "comparisons.jsonl"  # in the workdir
MOST_BYTES = 4 * 2**20  # of a request


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The flags of `rlhfjax serve`."""

    models: Sequence[str]
    workdir: Path | None = None
    """Its model comes first; votes are stored in it, and its reward model scores."""
    adapter: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    timeout: float = 600.0
    log_prompts: bool = False
    lanes: int = 8
    length: int | None = None
    queue: int = 64
    reward: str = ""
    comparisons: str = ""
    chat: Options = dataclasses.field(default_factory=Options)


def run(options: ServeOptions) -> None:
    """Answers requests until Ctrl-C or SIGTERM.

    Raises:
      CheckpointError: there is no model.
      ConfigError: a package is missing, an option is invalid, or the address is taken.
    """
    validate(options)
    from rlhfjax.serve.app import OPEN_PATHS, Api, Settings
    from rlhfjax.web.guard import guarded
    from rlhfjax.web.server import Server

    start = time.monotonic()
    models = load_models(options)
    settings = Settings(seconds=options.timeout, log_prompts=options.log_prompts)
    api = Api(
        models,
        settings=settings,
        scorer=_scorer(options, models[0]),
        comparisons=_comparisons(options),
    )
    app = guarded(
        api.app(),
        host=options.host,
        token=options.token,
        most_bytes=MOST_BYTES,
        open_paths=OPEN_PATHS,
    )
    server = Server(app, options.host, options.port)
    log.info("ready after %.1f s", time.monotonic() - start)
    log.info("page: %s   API: %s/v1   Ctrl-C ends it", server.url, server.url)
    server.run()


def validate(options: ServeOptions) -> None:
    """Raises ConfigError for options that do not go together, before anything is loaded."""
    access.validate_installed()
    access.validate(options.host, options.port, options.token)
    if options.adapter and len(_paths(options)) > 1:
        raise ConfigError("--adapter: expected with one model, got several")


def load_models(options: ServeOptions) -> list[Served]:
    """Returns the models, compiled, in order."""
    found = _paths(options)
    names = names_of(found)
    return [_served(path, names[i], options) for i, path in enumerate(found)]


def _paths(options: ServeOptions) -> list[str | Path]:
    return [*([options.workdir] if options.workdir else []), *options.models]


def names_of(models: Sequence[str | Path]) -> list[str]:
    """Returns the names of models in the API: the last part of each, or all if two are equal."""
    short = []
    for model in models:
        name = str(model)
        rest = name.partition(":")[2] if is_foreign(name) else name
        short.append(rest.rstrip("/").rpartition("/")[2] or name)
    if len(set(short)) == len(short):
        return short
    full = [str(model) for model in models]
    if len(set(full)) < len(full):
        raise ConfigError("--model: the same model is given twice")
    return full


def _served(path: str | Path, name: str, options: ServeOptions) -> Served:
    opened = chat_model.open_model(path, options.adapter, "serve")
    chosen = choose_settings(path, opened.opened, options.chat)
    saved, notes = opened.read(options.chat.int8)
    sampling = chosen.sampling
    if sampling.repetition_penalty != 1:
        notes.append(f"not applied: repetition_penalty={sampling.repetition_penalty}")
        sampling = dataclasses.replace(sampling, repetition_penalty=1.0)
    longest = min(LONGEST, saved.model.config.max_length)
    start = time.monotonic()
    engine = Engine(
        saved.model,
        saved.params,
        lanes=options.lanes,
        length=longest if options.length is None else options.length,
        queue=options.queue,
    )
    engine.warm_up()
    log.info("%s: compiled in %.1f s", name, time.monotonic() - start)
    settings = shown_settings(sampling)
    for text in (f"what requests leave out: {settings}", *notes, *chosen.notes):
        log.info("%s: %s", name, text)
    most_tokens = options.chat.max_new_tokens
    return Served(name, engine, saved.tokenizer, sampling, most_tokens)


def _comparisons(options: ServeOptions):
    """Returns where votes are stored; None: nowhere."""
    from rlhfjax.serve.comparisons import Comparisons

    if options.comparisons:
        return Comparisons(paths.path(options.comparisons))
    return Comparisons(options.workdir / VOTES) if options.workdir else None


def _scorer(options: ServeOptions, served: Served) -> Scorer | None:
    """Returns the reward of /v1/score: the one that is named, else the workdir's last."""
    source = options.reward
    if not source and options.workdir:
        source = last_reward(options.workdir)
    if not source:
        return None
    log.info("scores: %s", source)
    layout = make_layout(devices=jax.devices()[:1])
    return load_scorer(source, layout, served.tokenizer)


def last_reward(workdir: Path) -> str:
    """Returns the last stage of a recipe that made a reward model; "" if there is none."""
    for stage in reversed(store.numbered(workdir)):
        is_model = paths.exists(stage / store.FOLDER / store.CONFIG)
        if is_model and store.describe(stage).head == "scalar":
            return str(stage)
    return ""
