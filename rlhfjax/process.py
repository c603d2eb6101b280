"""Runs a command as a process: its log, its signals and its exit code, on one host or several.

exit code 0    the command is done
1, 2           a `UserError`: a failed run, an invalid command line or config
75             SIGTERM; a run in its training loop has saved its state
130            Ctrl-C; a run in its training loop has saved its state, unless it was pressed twice

Functions that need jax import it themselves, so that `--help` and errors appear at once.
"""

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rlhfjax.errors import Interrupted, Preempted, UserError, first_line
from rlhfjax.redact import printable, redact

log = logging.getLogger("rlhfjax")
_RESUME = "run the same command to resume"
# Errors of the disk or of names on it, which need no traceback.
_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


def run(command: Callable[[], None]) -> None:
    """Runs a command; an error ends this process with an exit code and one line on stderr."""
    _set_up_logging()
    try:
        command()
        if _has_peers():
            _hosts().leave()
    except UserError as e:
        _exit(str(e), e.exit_code)
    except BrokenPipeError:  # such as `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit("standard output was closed before the end", 1)
    except OSError as e:
        if e.errno not in _DISK and not e.filename:
            _exit_on_unexpected(e)
        _exit(f"{e.strerror or first_line(e)}: {e.filename or 'a file of the run'}", 1)
    except KeyboardInterrupt:
        _exit(_interrupted(), Interrupted.exit_code)
    except Exception as e:
        _exit_on_unexpected(e)


def _set_up_logging() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Redacting("%(message)s"))
    log.setLevel(logging.INFO)
    # Orbax and gcsfs log there what they also raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class _Redacting(logging.Formatter):
    """Formats messages without the secrets in them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


# ------------------------------------------------------------------ before the first call of jax


def exit_on_sigterm() -> None:
    """Makes SIGTERM end this process at once with `Preempted.exit_code`.

    The training loop handles SIGTERM and Ctrl-C itself and saves first (`stop_requests`). Outside
    of it every file on disk is whole at any moment.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: object) -> None:
    _exit_at_once(f"stopped; {_RESUME}", Preempted.exit_code)


def _exit_at_once(message: str, code: int) -> NoReturn:
    """Ends the process from a signal handler or any thread."""
    if _has_peers():
        _hosts().fail(message, code)
    _print_error(message)
    os._exit(code)


def _interrupted() -> str:
    resumes = signal.getsignal(signal.SIGTERM) is _on_sigterm
    return f"interrupted; {_RESUME}" if resumes else "interrupted"


class StopRequests:
    """The first signal that asked the training loop to stop; None if there was none."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def error(self, message: str) -> Preempted:
        """Returns the error that ends the run, with the exit code of the signal."""
        kind = Interrupted if self.signal == signal.SIGINT else Preempted
        return kind(f"{message}; {_RESUME}")

    def _receive(self, number: int, _frame: object) -> None:
        if self.signal is None:
            self.signal = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Yields what SIGTERM and the first Ctrl-C ask for. A second Ctrl-C ends the process at once.

    Python runs signal handlers between two steps of the interpreter, which may be minutes apart
    while XLA compiles. A thread therefore reads the signals as they come, to say that the run will
    save, and to end at a second Ctrl-C. Only the main thread may handle signals.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {n: signal.signal(n, requests._receive) for n in numbers}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch_keyboard, args=(receiver,), daemon=True)
    watcher.start()
    try:
        yield requests
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()  # ends the thread
        watcher.join()
        receiver.close()


def _watch_keyboard(receiver: socket.socket) -> None:
    presses = 0
    while numbers := receiver.recv(64):  # one byte per signal
        presses += numbers.count(signal.SIGINT)
        if presses > 1:
            _exit_at_once(f"interrupted; {_RESUME}", Interrupted.exit_code)
        if presses:
            _print_error(
                "Ctrl-C: saving after this step; press it again to quit at once"
            )


def join_hosts(heartbeat_timeout: int, join_timeout: int) -> None:
    """Joins the other hosts, if there are any. Only the first host logs its progress."""
    _hosts().join(heartbeat_timeout=heartbeat_timeout, join_timeout=join_timeout)
    if not _hosts().first():
        log.setLevel(logging.WARNING)


# ------------------------------------------------------------------ the end


def _exit(message: str, code: int) -> NoReturn:
    """Ends with one line. Notifies the other hosts, unless all have saved and stop alike."""
    if _has_peers() and code not in (Preempted.exit_code, Interrupted.exit_code):
        _hosts().fail(message, code)
    _print_error(message)
    if _has_peers():
        _hosts().leave()
    sys.exit(code)


def _exit_on_unexpected(error: BaseException) -> NoReturn:
    """Ends with the traceback of an unexpected error; ends the other hosts too."""
    paths = sys.modules.get("rlhfjax.paths")
    refusal = paths.refusal(error) if paths else None
    refusal = refusal or out_of_memory(error)
    if refusal:
        _exit(refusal, 1)
    if not _has_peers():
        raise error
    from rlhfjax import hosts

    if hosts.lost(error):
        hosts.fail_for_another(error)
    traceback.print_exception(error)
    hosts.fail(first_line(error, kind=True), 1)


def out_of_memory(error: BaseException) -> str:
    """Returns what could not be allocated, in one line; "" for other errors."""
    what = first_line(error)
    if isinstance(error, MemoryError):
        what = what.removeprefix("MemoryError")
    elif "RESOURCE_EXHAUSTED" not in what:
        return ""
    detail = f" ({what})" if what else ""
    return (
        f"out of memory{detail}: make the model, batch_size or the lengths smaller, or use"
        " more devices; rlhfjax plan shows what a stage needs"
    )


def _print_error(message: str) -> None:
    print(f"rlhfjax: {printable(redact(message))}", file=sys.stderr, flush=True)


def _has_peers() -> bool:
    """Returns whether there are other hosts, which must learn of this one's end."""
    return "rlhfjax.hosts" in sys.modules and _hosts().count() > 1


def _hosts() -> Any:
    from rlhfjax import hosts

    return hosts
