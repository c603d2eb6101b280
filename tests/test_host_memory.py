"""Memory that compilation leaves behind goes back to the system, after a compilation only."""

import ctypes

import jax
import pytest

from rlhfjax import host_memory

BLOCK, BLOCKS = 1024, 100_000  # 100 MB
C = ctypes.CDLL(None)
C.malloc.restype, C.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
C.free.argtypes = (ctypes.c_void_p,)


def resident() -> float:
    """Returns MB of this process's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


@pytest.fixture
def freed_blocks():
    """100 MB of blocks, written and freed, below one that is still in use."""
    blocks = [C.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    last = C.malloc(BLOCK)
    for block in blocks:
        C.free(block)
    yield
    C.free(last)


@pytest.mark.skipif(not hasattr(C, "malloc_trim"), reason="another allocator")
def test_freed_memory_is_returned_after_a_compilation(freed_blocks):
    host_memory.release_after_compiling()
    before = resident()
    jax.monitoring.record_event_duration_secs("/jax/another/event", 1.0)
    jax.monitoring.record_event_duration_secs(host_memory.COMPILED, 0.01)
    assert resident() > before - 10
    jax.monitoring.record_event_duration_secs(host_memory.COMPILED, 1.0)
    assert resident() < before - 80


def test_jax_tells_of_its_compilations_by_this_name():
    events = []

    def listen(event, duration_secs, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x * 3.0 + 1.0).lower(1.0).compile()
    assert host_memory.COMPILED in events
    jax.monitoring.unregister_event_duration_listener(listen)
