"""Several hosts as one: how they join, what they share, and how all end if one of them ends.

Every host runs the same program on the same mesh (JAX's multi-controller runtime). What is computed
on the host is the same everywhere, or comes from the first host (`share`), or each host computes
its part of it (`share_all`). Only the first host writes files (`first`). With a single process,
nothing here does anything.
"""

import ctypes
import itertools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

# JAX has no public way to the client of the coordination service.
from jax._src import cloud_tpu_init, distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax import json_text
from rlhfjax.errors import ConfigError, HostLost, first_line, install
from rlhfjax.types import PyTree

T = TypeVar("T")
_COORDINATED = (
    "JAX_COORDINATOR_ADDRESS",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "RLHFJAX_JOIN",
)
_FAILED = (
    "rlhfjax/failed"  # the key under which the first host that fails leaves its reason
)
_GRACE = 2.0  # seconds for a host to report by itself an error that all hosts found
# How long a host waits for the first one, which may work for days; a lost host ends the wait.
_WAIT_MS = 7 * 24 * 3600 * 1000
_LOST = (
    "Gloo",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "Socket closed",
    "CoordinationService",
    "heartbeat",
)
_calls = itertools.count()
_ending = threading.Lock()  # taken by whatever ends this process, and never released
_listener: list[threading.Thread] = []  # waits for the failure of another host
_exit_codes: list[int] = []  # the code of the failure whose message has been printed


# ------------------------------------------------------------------ joining


def join(heartbeat_timeout: int = 1200, join_timeout: int = 3600) -> None:
    """Joins the other hosts, if there are any. Call it before any other jax call.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the hosts, and each
    process has all devices of its host. Otherwise JAX asks the cluster that it runs in: if
    RLHFJAX_JOIN or a TPU's own variable is set, and on every Cloud TPU VM, where each host would
    else train by itself in the same workdir.

    Args:
      heartbeat_timeout: seconds without a heartbeat after which a host counts as lost. It must be
        longer than the longest compilation, which may delay heartbeats.
      join_timeout: seconds to wait for the other hosts. The slices of a job may start many minutes
        apart.
    Raises:
      ConfigError: the variables contradict each other.
      HostLost: the other hosts did not join in time.
    """
    coordinated = any(name in os.environ for name in _COORDINATED)
    if not coordinated and not _on_tpu_cluster():
        return
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # the loop handles SIGTERM
    not_joined = f"the other hosts did not come within --join_timeout={join_timeout} s"
    start_again = "start the same command on all hosts again"
    _exit_on_abort(f"{not_joined}; {start_again}")
    try:
        _initialize(heartbeat_timeout, join_timeout)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"joining the other hosts: {first_line(e)}") from e
    except (RuntimeError, OSError) as e:
        raise HostLost(f"{not_joined} ({first_line(e)}); {start_again}") from e
    if count() == 1:
        _exit_on_abort(None)
        return
    _exit_on_abort(HostLost.message)
    _listener.append(threading.Thread(target=_listen, name="hosts", daemon=True))
    _listener[0].start()


def _initialize(heartbeat_timeout: int, join_timeout: int) -> None:
    options: dict[str, Any] = {}
    for option, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if variable in os.environ:
            options[option] = int(os.environ[variable])
    if len(options) == 2:
        options["cluster_detection_method"] = "deactivate"
    jax.distributed.initialize(
        **options,
        initialization_timeout=join_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def _platforms() -> str | None:
    """Returns the value of JAX_PLATFORMS; None if it is not set."""
    # jax adds its options at run time.
    return jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]


def _on_tpu_cluster() -> bool:
    """Whether this is a Cloud TPU VM whose cluster JAX can ask for the other hosts."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm or _platforms() == "cpu":
        return False
    return any(cluster.is_env_present() for cluster in ClusterEnv._cluster_types)


def validate_process_count() -> None:
    """Checks that this process joined all hosts whose devices JAX has. Starts JAX's backend.

    A TPU runtime has the devices of all hosts of its slice even if `join` joined none of them.
    Every host would then take itself for the first one and write the same files.

    Raises:
      ConfigError: the numbers differ.
    """
    if jax.process_count() != count():
        raise ConfigError(
            f"JAX sees the devices of {jax.process_count()} hosts, and this process has joined "
            f"{count()}: set RLHFJAX_JOIN=1, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, on every host"
        )


def validate_accelerators() -> None:
    """Checks that a job with GPUs does not train on CPUs. Starts JAX's backend.

    Raises:
      ConfigError: Slurm or Kubernetes allocated GPUs, and JAX finds none and was not asked for
        CPUs.
    """
    allocated = _allocated_gpus()
    if allocated and _platforms() is None and jax.default_backend() == "cpu":
        raise ConfigError(
            f"{allocated}: this job has GPUs, and JAX finds none: {install('cuda12')} "
            "(or cuda13); to train on CPUs set JAX_PLATFORMS=cpu"
        )


def _allocated_gpus() -> str:
    """Returns NAME=VALUE of the variable with which a scheduler allocates GPUs; "" without GPUs."""
    names = ["SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        names.append("NVIDIA_VISIBLE_DEVICES")
    for name in names:
        value = os.environ.get(name, "")
        # Images set NVIDIA_VISIBLE_DEVICES=all with or without a GPU; the device plugin sets ids.
        without = ["", "all", "none", "void"]
        if name == "SLURM_GPUS_ON_NODE":  # a number; in the others 0 is the id of a GPU
            without.append("0")
        if value not in without:
            return f"{name}={value}"
    return ""


def index() -> int:
    """Returns the index of this host, from 0."""
    return distributed.global_state.process_id or 0


def count() -> int:
    """Returns the number of hosts."""
    return distributed.global_state.num_processes or 1


def first() -> bool:
    """Whether this is the host that writes files."""
    return index() == 0


# ------------------------------------------------------------------ what every host has


def _client() -> Any:
    """Returns the client of the coordination service, which connects the hosts."""
    return distributed.global_state.client


def share(make: Callable[[], T]) -> T:
    """Returns on every host what `make` returns on the first one.

    Every host calls it at the same place and waits until all have the result. `make` may take as
    long as it likes: the others wait on the coordination service, not on a device. Its result is
    pickled.
    """
    if count() == 1:
        return make()
    client, key = _client(), f"rlhfjax/share/{next(_calls)}"
    if first():
        client.key_value_set_bytes(key, pickle.dumps(make()))
    value = pickle.loads(client.blocking_key_value_get_bytes(key, _WAIT_MS))
    client.wait_at_barrier(key, _WAIT_MS)
    if first():
        client.key_value_delete(key)
    return value


def share_all(make: Callable[[], T]) -> list[T]:
    """Returns on every host what `make` returns on each of them, ordered by host index.

    Every host calls it at the same place. As in `share`, the results are pickled and the hosts wait
    on the coordination service. If `make` raises on one host, that host ends all of them.
    """
    if count() == 1:
        return [make()]
    client, key = _client(), f"rlhfjax/share/{next(_calls)}"
    own = f"{key}/{index()}"
    client.key_value_set_bytes(own, pickle.dumps(make()))
    values = []
    for i in range(count()):
        value = client.blocking_key_value_get_bytes(f"{key}/{i}", _WAIT_MS)
        values.append(pickle.loads(value))
    client.wait_at_barrier(key, _WAIT_MS)
    client.key_value_delete(own)
    return values


def own_rows(n: int) -> slice:
    """Returns which of n rows this host works on: equal parts in the order of the hosts.

    The parts of two hosts differ by at most one row; with more hosts than rows some are empty.
    """
    return slice(index() * n // count(), (index() + 1) * n // count())


def barrier() -> None:
    """Waits until every host is here."""
    share(lambda: None)


def whole(tree: PyTree) -> PyTree:
    """Returns every array of a tree unsharded, as NumPy arrays on every host."""
    return jax.device_get(tree) if count() == 1 else jax.tree.map(_gathered, tree)


def _gathered(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)


def gather(value: T) -> list[T]:
    """All-gathers a JSON value from every host; the result is ordered by host index."""
    if count() == 1:
        return [value]
    text = json_text.encode(value, "hosts.gather").encode()
    own = np.frombuffer(text, np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size))
    # Powers of 2, because each size is compiled once.
    room = 1 << int(sizes.max()).bit_length()
    padded = multihost_utils.process_allgather(np.pad(own, (0, room - own.size)))
    texts = [row[:size].tobytes() for row, size in zip(padded, sizes, strict=True)]
    return [json_text.parse(text) for text in texts]


def anywhere(flag: bool) -> bool:
    """Returns whether a flag is set on any host; waits for all."""
    if count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


class Vote:
    """The maximum of a number over all hosts: given at every step, known one step later.

    No host waits: the devices compare the numbers of a step while they train.
    """

    def __init__(self):
        if count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._per_device = NamedSharding(mesh, PartitionSpec("devices"))
            replicated = NamedSharding(mesh, PartitionSpec())
            self._max = jax.jit(lambda votes: votes.max(), out_shardings=replicated)
            self._previous: Any = 0

    def __call__(self, value: int) -> int:
        """Returns the maximum over all hosts one step ago; with one host, its own number."""
        if count() == 1:
            return int(value)
        previous = int(self._previous)
        votes = np.full(jax.local_device_count(), value, np.int32)
        self._previous = self._max(
            jax.make_array_from_process_local_data(self._per_device, votes)
        )
        return previous


# ------------------------------------------------------------------ the end


def leave() -> None:
    """Waits for the other hosts at the end of a successful run, so that none counts as lost.

    Ends the listening thread first: a thread that returns from JAX's client while Python shuts down
    ends the process with SIGSEGV.
    """
    if count() > 1:
        _ending.acquire(blocking=False)
        _tell(index(), b"")
        for thread in _listener:
            thread.join()
        jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process, and the others with the same code and this message."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread is ending this process already
    _print(message)
    _exit_codes.append(code)
    failure = pickle.dumps((index(), message, code))
    if _set(_FAILED, failure):
        for host in range(count()):
            _tell(host, failure)
    if first():
        time.sleep(2 * _GRACE)  # it serves what the others still have to read
    os._exit(code)


def fail_for_another(error: BaseException) -> NoReturn:
    """Ends this process because another one is gone.

    If that one left its reason, `_listen` ends this process with it meanwhile.
    """
    time.sleep(2 * _GRACE)
    fail(f"{HostLost.message} ({first_line(error)})", HostLost.exit_code)


def lost(error: BaseException) -> bool:
    """Whether an error is one that the loss of another host causes here."""
    return count() > 1 and any(sign in str(error) for sign in _LOST)


def _print(message: str) -> None:
    print(f"rlhfjax: {message}", file=sys.stderr, flush=True)


def _tell(host: int, failure: bytes) -> None:
    """Ends the wait of a host's `_listen`; b"" if nothing failed."""
    _set(f"{_FAILED}/{host}", failure)


def _set(key: str, value: bytes) -> bool:
    """Returns whether the value was stored: not if the key is set or the first host is gone."""
    try:
        _client().key_value_set_bytes(key, value)
    except Exception as e:
        del e
        return False
    return True


def _listen() -> None:
    """Waits until a host fails, then ends this one too, unless it is about to end by itself."""
    try:
        failure = _client().blocking_key_value_get_bytes(
            f"{_FAILED}/{index()}", _WAIT_MS
        )
    except Exception as e:
        # The run is over, or the first host is gone, which `_exit_on_abort` reports.
        del e
        return
    if not failure:  # this host leaves
        return
    host, message, code = pickle.loads(failure)
    time.sleep(_GRACE)
    if _ending.acquire(blocking=False):
        _print(f"host {host} ended: {message}")
        os._exit(code)


def _exit_on_abort(message: str | None) -> None:
    """Replaces JAX's abort by one line and exit code 75; None restores the system's abort.

    JAX ends a process with SIGABRT, from a thread of its own, if a host is lost or if the others do
    not join in time. Python's signal handlers would run too late. If `fail` has printed its message
    and only waits for the others to read it, that message and that code stand.
    """

    def end(_: int) -> None:
        if not _exit_codes:
            os.write(2, f"rlhfjax: {message}\n".encode())
        os._exit(_exit_codes[0] if _exit_codes else HostLost.exit_code)

    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    if message is None:
        c_signal(signal.SIGABRT, None)  # SIG_DFL
        return
    # Kept alive here, because C has only its address.
    _exit_on_abort.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    c_signal(signal.SIGABRT, ctypes.cast(_exit_on_abort.handler, ctypes.c_void_p))
