"""Compiled programs on disk: what one start has compiled, the next one loads.

It is JAX's persistent compilation cache. Unless the user names a folder, in a flag or in
JAX_COMPILATION_CACHE_DIR, it is `~/.cache/rlhfjax/programs/MACHINE`. JAX's key of a program has the
program, the compiler's version, its flags and the kind of devices, but not what the machine code of
a CPU depends on. So MACHINE stands for the processor: a home that several machines share never
gives one of them the code of another. A loaded program is the one that was compiled, so results do
not depend on the cache.
"""

import hashlib
import logging
import os
import platform
from importlib.metadata import version
from typing import Any

import filelock

from rlhfjax import hosts, paths, processor
from rlhfjax.errors import first_line
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
LIMIT = 4 * 2**30
"""Bytes of the default folder; programs that were not used for longest go first."""
SHORTEST = 0.1
"""Seconds of compilation from which a program is kept in the default folder."""
LOCK = ".lockfile"  # JAX's own
_PROCESSOR = ("flags", "Features", "model name", "CPU implementer", "CPU part")


def use(given: str | None) -> None:
    """Makes JAX keep compiled programs for the next start. Call it after `hosts.join`.

    Several hosts have no default folder: JAX lets only the first of them write, so on disks of
    their own the others would compile what it loads. XLA's GPU compiler may then order collectives
    differently, and the hosts wait for each other forever (openxla/xla issue 7716).

    Args:
      given: a folder, local or in a bucket, "" for none, or None for the default: that of
        JAX_COMPILATION_CACHE_DIR if it is set, else the user's own.
    """
    import jax

    if given == "":
        jax.config.update("jax_enable_compilation_cache", False)
    elif given is not None:
        jax.config.update("jax_compilation_cache_dir", given)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ and hosts.count() == 1:
        folder = default_folder()
        # jax adds its options at run time.
        config: Any = jax.config
        if config.jax_enable_compilation_cache and _prepare(folder):
            _use_default(str(folder))


def _use_default(folder: str) -> None:
    """Turns JAX's cache on; its other settings are ours where the user has not set them."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    ours = {
        "jax_compilation_cache_max_size": LIMIT,
        "jax_persistent_cache_min_compile_time_secs": SHORTEST,
    }
    for name, value in ours.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def default_folder() -> Path:
    """Returns the folder of this user's programs for this machine."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return paths.path(os.path.join(home, "rlhfjax", "programs", machine()))


def machine() -> str:
    """Returns a name for what compiled code depends on beside the program.

    It is jaxlib's version and a hash of the processor's model, its instruction sets and the number
    of cores that the process may use, for which XLA divides loops.
    """
    try:
        lines = paths.path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    about = {line for line in lines if line.startswith(_PROCESSOR)}
    known = [platform.machine(), str(processor.cores()), *sorted(about)]
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()
    return f"jaxlib-{version('jaxlib')}-{digest[:12]}"


def _prepare(folder: Path) -> bool:
    """Returns whether the folder can be used: it is the user's own, since it holds machine code.

    Removes programs whose writing was cut off: JAX writes a program, and then when it was used.
    """
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError("others may write it, or it is another user's")
        with filelock.FileLock(str(folder / LOCK), timeout=10):
            names = set(os.listdir(folder))
            for name in names:
                program = name.removesuffix("-cache")
                if program != name and f"{program}-atime" not in names:
                    os.remove(folder / name)
    except (OSError, NotImplementedError) as error:
        log.info("compiled programs are not kept: %s: %s", folder, first_line(error))
        return False
    return True
