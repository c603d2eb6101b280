"""The memory of devices: a fake GPU's, a CPU's, and what XLA planned for programs."""

import jax
import jax.numpy as jnp

from rlhfjax import device_memory
from rlhfjax.device_memory import GIB, Memory
from rlhfjax.programs import Program


class FakeDevice:
    """A device whose runtime counts bytes, or none."""

    def __init__(self, **stats: int):
        self._stats = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats or None


GPUS = [
    FakeDevice(peak_bytes_in_use=3 * 2**30, bytes_limit=80 * 2**30, num_allocs=5),
    FakeDevice(peak_bytes_in_use=5 * 2**30, bytes_limit=80 * 2**30),
]


def test_the_device_that_needs_most_counts():
    memory = Memory(GPUS)
    assert memory.metrics() == {"peak_memory": 5.0}
    memory.planned = {"rollout": 2 * GIB, "update": 4.5 * GIB}
    assert memory.metrics() == {"peak_memory": 5.0, "planned_memory": 4.5}
    assert memory.describe() == (
        "memory per device: 4.5 GiB planned by XLA, for update; 5 GiB reached; 80 GiB there"
    )


def test_a_cpu_has_no_metric_and_no_zeros():
    assert jax.devices()[0].memory_stats() is None
    for devices in (None, [FakeDevice()], [FakeDevice(num_allocs=5)]):
        memory = Memory(devices)
        assert memory.metrics() == {} and memory.describe() == ""
        memory.planned = {"step": GIB}
        assert memory.metrics() == {}
        assert memory.describe() == "memory per device: 1 GiB planned by XLA, for step"


def test_what_xla_planned_and_what_is_beside_it():
    """x [256, 128] and its product with itself; y is on the device meanwhile."""
    compilations = []

    def count(name, seconds, **kwargs):
        if name.endswith("backend_compile_duration"):
            compilations.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    program = Program("square", jax.jit(lambda x, n: x.T @ x * n, static_argnums=1))
    x = jnp.ones((256, 128))
    before = device_memory.bytes_beside((x,))
    y = jax.block_until_ready(jnp.zeros((1024, 1024)))
    assert device_memory.bytes_beside((x,)) - before == y.nbytes
    memory = Memory(GPUS)
    compilations.clear()
    with memory.observing():
        result = program(x, 2)
    assert len(compilations) == 1  # by the call alone
    assert float(result[0, 0]) == 512.0
    own = 4 * (256 * 128 + 128 * 128)
    needed = memory.planned["square"] - before - y.nbytes
    assert own <= needed <= own + 4 * (256 * 128 + 128 * 128)  # temporaries
    with memory.observing(False):
        Program("other", jax.jit(jnp.sin))(x)
    assert list(memory.planned) == ["square"]


def test_donated_arguments_count_once():
    program = Program("add", jax.jit(lambda x: x + 1, donate_argnums=0))
    x = jnp.ones((512, 512))
    memory = Memory(GPUS)
    before = device_memory.bytes_beside((x,))
    with memory.observing():
        program(x)
    assert x.is_deleted()
    assert memory.planned["add"] - before == 4 * 512 * 512


def test_a_function_that_is_not_jitted_has_no_plan():
    memory = Memory(GPUS)
    with memory.observing():
        assert Program("plain", lambda x: x + 1)(1) == 2
    assert memory.planned == {}
