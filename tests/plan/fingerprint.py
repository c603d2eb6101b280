"""A digest of everything that a compiler is given: equal digests, equal answers.

It covers operations, shapes, dtypes, constants, shardings, donation and layouts, which are in the
module's text, the devices and the compile options. It leaves names out: of functions, which come
from Python and are numbered by jax, of meshes, of the module and of results. The text has no
source locations; the bytecode of a Pallas kernel within it has, and is read without them.
"""

import base64
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax._src import compiler as jax_compiler
from jax._src.interpreters import mlir
from jax._src.lib import tpu
from jax._src.lib.mlir import ir

# A top-level definition of a module: a function or a mesh, indented by two blanks.
DEFINITION = re.compile(r'^  [\w.]+(?: \w+)? @([\w.$-]+|"[^"]*")', re.MULTILINE)
SYMBOL = re.compile(r'@([\w.$-]+|"[^"]*")')
RESULT_NAME = re.compile(r'jax\.result_info = "[^"]*"(, )?')
MODULE_NAME = re.compile(r'^module @(?:[\w.$-]+|"[^"]*")')
KERNEL = re.compile(r"(?<=\\22body\\22: \\22)[A-Za-z0-9+/=]+")  # Mosaic's bytecode
# Debug options that do not change the TPU compiler's answer: logging, and where a machine has CUDA.
IGNORED = ("xla_detailed_logging", "xla_gpu")


class Given(NamedTuple):
    """What jax hands to a compiler."""

    module: str  # StableHLO
    options: dict[
        str, dict[str, str]
    ]  # those that differ from XLA's defaults, in three groups
    devices: list[int]  # ids, in the order of the mesh


def digest(lowered: jax.stages.Lowered, options: dict[str, Any], **facts: Any) -> str:
    """Returns the SHA-256 of a lowered program, its compile options and other facts.

    Args:
      options: compiler options that the program is compiled with.
      facts: what else decides the compiler's answer, of JSON types.
    """
    given = received(lowered, options)
    whole = given._asdict() | {"module": module_digest(given.module), "facts": facts}
    return _sha256(json.dumps(whole, sort_keys=True))


def received(lowered: jax.stages.Lowered, options: dict[str, Any]) -> Given:
    """Returns what a compiler would be given; it is not called."""

    class Stop(Exception):
        pass

    def stop(backend, module, devices, compile_options, *rest, **more):
        ids = [device.id for device in devices.flat]
        raise Stop(Given(str(module), _described(compile_options), ids))

    try:
        with (
            _optimizing(),
            mock.patch.object(jax_compiler, "compile_or_get_cached", stop),
        ):
            lowered.compile(compiler_options=options)
    except Stop as e:
        return e.args[0]
    raise AssertionError(
        "jax did not call compile_or_get_cached: adapt tests/plan/fingerprint.py"
    )


def module_digest(text: str) -> str:
    """Returns the SHA-256 of a module's text, each symbol replaced by the digest of its definition.

    So neither a function's name, nor its place, nor copies of it change the digest.
    """
    text = KERNEL.sub(lambda match: kernel_digest(match[0]), text)
    body, _, footer = text.rpartition("\n}")
    found = list(DEFINITION.finditer(body))
    ends = [match.start() for match in found[1:]] + [len(body)]
    chunks = {}
    for match, end in zip(found, ends, strict=True):
        chunks[match[1]] = body[match.start() : end].rstrip()
    if len(chunks) != len(found) or "main" not in chunks:
        raise AssertionError(
            "the module's text has another form: adapt tests/plan/fingerprint.py"
        )

    @functools.cache
    def of(name: str) -> str:
        def renamed(match: re.Match[str]) -> str:
            other = match[1]
            if other == name:
                return "@"
            return f"@{of(other)}" if other in chunks else match[0]

        chunk = RESULT_NAME.sub("", chunks[name])
        return _sha256(SYMBOL.sub(renamed, chunk))

    head = MODULE_NAME.sub("module", body[: found[0].start()])
    return _sha256("\n".join((head, of("main"), footer)))


@functools.cache
def kernel_digest(body: str) -> str:
    """Returns the SHA-256 of a Pallas kernel's operations, without the files and lines of them.

    Args:
      body: Mosaic's bytecode in base64.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown():
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(base64.b64decode(body))
        return _sha256(module.operation.get_asm(enable_debug_info=False))


@contextlib.contextmanager
def _optimizing() -> Iterator[None]:
    """Turns on XLA's optimizations, which `plan` uses and tests/conftest.py turns off."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _described(options: Any) -> dict[str, dict[str, str]]:
    """Returns compile options by name, where they are not XLA's defaults."""
    plain = type(options)()
    build, plain_build = (
        options.executable_build_options,
        plain.executable_build_options,
    )
    return {
        "options": _differences(options, plain),
        "build": _differences(build, plain_build),
        "debug": _differences(build.debug_options, plain_build.debug_options),
    }


def _differences(options: Any, plain: Any) -> dict[str, str]:
    """Returns changed fields with plain values; `_described` and `received` have the others."""
    objects = ("executable_build_options", "debug_options", "device_assignment")
    changed = {}
    for name in dir(options):
        if name.startswith(("_", *IGNORED, *objects)):
            continue
        value = getattr(options, name)
        if not callable(value) and value != getattr(plain, name):
            changed[name] = repr(value)
    return changed


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
