"""Returns to the system what compilation has used of the host's memory.

XLA's compiler leaves hundreds of MB of freed blocks that glibc keeps for the process. They are
never needed again, and the next program's buffers come on top of them.
"""

import ctypes
import functools

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
SHORTEST = 0.1
"""Seconds of a compilation from which its memory is returned; that takes milliseconds."""


@functools.cache
def release_after_compiling() -> None:
    """From now on, returns freed memory after every compilation, if glibc is the allocator."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= SHORTEST:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
