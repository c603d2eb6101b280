"""Several hosts as one: joining them, what one of them knows, and the end of all where one of them ends.

Every host runs the same program on the same mesh (JAX's multi-controller runtime). What is computed on the host is the
same everywhere, or it is the first host's word (`share`); files are written by the first host alone (`first`). Where
this process is the only one, nothing here does anything.
"""

import ctypes
import itertools
import json
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
from jax._src import (
    cloud_tpu_init,
    distributed,
)  # the coordination service's client has no other way to it
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax import json_text
from rlhfjax.errors import ConfigError, HostLost, first_line

T = TypeVar("T")
_COORDINATED = (
    "JAX_COORDINATOR_ADDRESS",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "RLHFJAX_JOIN",
)
_FAILED = "rlhfjax/failed"  # the key under which a host that fails says why
_GRACE = 2.0  # seconds that a host has to say itself what all of them found wrong
_WAIT_MS = (
    7 * 24 * 3600 * 1000
)  # of a host for the first one, which may work for long; a lost one ends the wait
_LOST = (
    "Gloo",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "Socket closed",
    "CoordinationService",
    "heartbeat",
)
_calls = itertools.count()
_ending = threading.Lock()  # taken by whatever ends this process, and never given back
_codes: list[
    int
] = []  # the exit code of the end that has been said: one line a process, whatever happens meanwhile


# ------------------------------------------------------------------ joining


def join(heartbeat_timeout: int = 1200, join_timeout: int = 3600) -> None:
    """Joins the other hosts if there are any. Call it before any other jax call.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID names them all, and each process has all devices
    of its host. Otherwise JAX asks the cluster that it finds itself in: where RLHFJAX_JOIN or one of a TPU's own
    variables is set, and on every Cloud TPU VM, where each host would otherwise train by itself in the same workdir.

    Args:
      heartbeat_timeout: seconds without a heartbeat after which a host counts as lost. A compilation may keep a host
        from its heartbeats: it must be longer than the longest one.
      join_timeout: seconds to wait for the other hosts. Slices of one job may come up many minutes apart.
    Raises:
      ConfigError: the variables do not go together.
      HostLost: the other hosts did not come in time.
    """
    named = any(name in os.environ for name in _COORDINATED)
    if not named and not _on_cluster_of_tpus():
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the loop's
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
    threading.Thread(target=_listen, name="hosts", daemon=True).start()


def _initialize(heartbeat_timeout: int, join_timeout: int) -> None:
    variables = (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    )
    known = {
        name: int(os.environ[variable])
        for name, variable in variables
        if variable in os.environ
    }
    detection = {"cluster_detection_method": "deactivate"} if len(known) == 2 else {}
    jax.distributed.initialize(
        **known,
        **detection,
        initialization_timeout=join_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def _on_cluster_of_tpus() -> bool:
    """Whether this is a Cloud TPU VM, to be used as one, whose cluster JAX can ask for the other hosts."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm or jax.config.jax_platforms == "cpu":
        return False
    return any(cluster.is_env_present() for cluster in ClusterEnv._cluster_types)


def validate_process_count() -> None:
    """Checks that this process has joined as many hosts as JAX has devices of. It starts JAX's backend.

    A TPU runtime sees all hosts of its slice even where `join` was not told of them. Every host would then take itself
    for the first one and write the same files.

    Raises:
      ConfigError: the numbers differ.
    """
    if jax.process_count() != count():
        raise ConfigError(
            f"JAX sees the devices of {jax.process_count()} hosts, and this process has joined {count()}: "
            "set RLHFJAX_JOIN=1, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, on every host"
        )


def validate_accelerators() -> None:
    """Checks that a job to which a scheduler gave GPUs does not train on CPUs. It starts JAX's backend.

    Raises:
      ConfigError: Slurm or Kubernetes gave GPUs, and JAX has found none and was not asked for CPUs.
    """
    given = _given_gpus()
    if given and jax.config.jax_platforms is None and jax.default_backend() == "cpu":
        raise ConfigError(
            f"{given}: this job has GPUs, and JAX finds none: pip install 'rlhfjax[cuda12]' (or cuda13); "
            "to train on CPUs set JAX_PLATFORMS=cpu"
        )


def _given_gpus() -> str:
    """NAME=VALUE of the variable by which a scheduler says that it gave GPUs; empty where none does."""
    names = ["SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        names.append("NVIDIA_VISIBLE_DEVICES")
    for name in names:
        value = os.environ.get(name, "")
        # Images set NVIDIA_VISIBLE_DEVICES=all whether or not there is a GPU; the device plugin writes its names.
        if value not in (
            "",
            "0" if name == "SLURM_GPUS_ON_NODE" else "",
            "all",
            "none",
            "void",
        ):
            return f"{name}={value}"
    return ""


def index() -> int:
    """Which host this is, from 0."""
    return distributed.global_state.process_id or 0


def count() -> int:
    """How many hosts there are."""
    return distributed.global_state.num_processes or 1


def first() -> bool:
    """Whether this is the host that writes files."""
    return index() == 0


# ------------------------------------------------------------------ what every host has


def share(make: Callable[[], T]) -> T:
    """What the first host makes of it, on every host; nobody goes on before all have it.

    Every host calls it at the same place. `make` runs on the first host alone, and for as long as it likes: the others
    wait on the coordination service, not on a device. What it returns is pickled.
    """
    if count() == 1:
        return make()
    client, key = distributed.global_state.client, f"rlhfjax/share/{next(_calls)}"
    if first():
        client.key_value_set_bytes(key, pickle.dumps(make()))
    value = pickle.loads(client.blocking_key_value_get_bytes(key, _WAIT_MS))
    client.wait_at_barrier(key, _WAIT_MS)
    if first():
        client.key_value_delete(key)
    return value


def barrier() -> None:
    """Waits until every host is here."""
    share(lambda: None)


def whole(tree: Any) -> Any:
    """Every array of a tree, all of it, as numpy on every host."""
    return jax.device_get(tree) if count() == 1 else jax.tree.map(_gathered, tree)


def _gathered(x: Any) -> Any:
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)


def gather(value: T) -> list[T]:
    """What each host says, the hosts in their order, on every host; of JSON types."""
    if count() == 1:
        return [value]
    said = np.frombuffer(json_text.encode(value, "hosts.gather").encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(said.size))
    room = (
        1 << int(sizes.max()).bit_length()
    )  # few sizes, each of which is compiled once
    padded = multihost_utils.process_allgather(np.pad(said, (0, room - said.size)))
    return [
        json.loads(one[:size].tobytes())
        for one, size in zip(padded, sizes, strict=True)
    ]


def anywhere(flag: bool) -> bool:
    """Whether it is so on any host; waits for all."""
    return (
        bool(flag)
        if count() == 1
        else bool(np.any(multihost_utils.process_allgather(np.array(flag))))
    )


class Vote:
    """The largest number that any host has given, asked at every step and answered one step later.

    No host waits for it: the numbers of a step are compared on the devices while they train.
    """

    def __init__(self):
        if count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("devices",))
            self._each = NamedSharding(mesh, PartitionSpec("devices"))
            self._max = jax.jit(
                lambda votes: votes.max(),
                out_shardings=NamedSharding(mesh, PartitionSpec()),
            )
            self._asked: Any = 0

    def __call__(self, value: int) -> int:
        """The largest number of all hosts one step ago; with one host, its own number at once."""
        if count() == 1:
            return int(value)
        answer = int(self._asked)
        votes = np.full(jax.local_device_count(), value, np.int32)
        self._asked = self._max(
            jax.make_array_from_process_local_data(self._each, votes)
        )
        return answer


# ------------------------------------------------------------------ the end


def leave() -> None:
    """At the end of a run that went well: waits for the others, so that nobody takes it for a loss."""
    if count() > 1:
        _ending.acquire(blocking=False)
        jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process, and the others with the same code: they are told why."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # another thread is ending this process already
    _say(message)
    _codes.append(code)
    try:
        told = pickle.dumps((index(), message, code))
        distributed.global_state.client.key_value_set_bytes(_FAILED, told)
    except (
        Exception
    ) as e:  # another host was faster, or the first one is gone: they know
        del e
    if first():
        time.sleep(2 * _GRACE)  # it holds what the others still have to read
    os._exit(code)


def fail_for_another(error: BaseException) -> NoReturn:
    """Ends this process because another one is gone; where that one said why, `_listen` ends it with its reason."""
    time.sleep(2 * _GRACE)
    fail(f"{HostLost.message} ({first_line(error)})", HostLost.exit_code)


def lost(error: BaseException) -> bool:
    """Whether an error is what the loss of another host looks like from here."""
    return count() > 1 and any(sign in str(error) for sign in _LOST)


def _say(message: str) -> None:
    print(f"rlhfjax: {message}", file=sys.stderr, flush=True)


def _listen() -> None:
    """Waits until a host says that it fails, then ends this one too, unless it is about to end by itself."""
    try:
        told = distributed.global_state.client.blocking_key_value_get_bytes(
            _FAILED, _WAIT_MS
        )
    except Exception as e:  # the run is over, or the first host is gone, which `_exit_on_abort` reports
        del e
        return
    who, message, code = pickle.loads(told)
    time.sleep(_GRACE)
    if _ending.acquire(blocking=False):
        _say(f"host {who} ended: {message}")
        os._exit(code)


def _exit_on_abort(message: str | None) -> None:
    """Makes one line and exit code 75 of JAX's abort; None: the abort is the system's again.

    JAX ends a process from a thread of its own, with SIGABRT, which Python's handlers come too late for: where a host
    is lost, and where the others do not join in time. Where `fail` has said its line already and only waits for the
    others to read it, that line and that code stand.
    """

    def end(_: int) -> None:
        if not _codes:
            os.write(2, f"rlhfjax: {message}\n".encode())
        os._exit(_codes[0] if _codes else HostLost.exit_code)

    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    if message is None:
        c_signal(signal.SIGABRT, None)  # SIG_DFL
        return
    _exit_on_abort.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(
        end
    )  # kept alive: C has only its address
    c_signal(signal.SIGABRT, ctypes.cast(_exit_on_abort.handler, ctypes.c_void_p))
