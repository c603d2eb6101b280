"""Runs a command as a process: its log, its signals and its exit code, on one host or several.

exit code 0    the command is done
1, 2, 75       a `UserError`: a failed run, an invalid command line or config, a preempted run
130            interrupted from the keyboard

Functions that need jax import it themselves, so that `--help` and errors appear at once.
"""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from rlhfjax.errors import Preempted, UserError, first_line
from rlhfjax.redact import printable, redact

INTERRUPTED = 130  # a shell's exit code after SIGINT
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
        _exit("its output was closed before the end", 1)
    except OSError as e:
        if e.errno not in _DISK and not e.filename:
            _exit_on_unexpected(e)
        _exit(f"{e.strerror or first_line(e)}: {e.filename or 'a file of the run'}", 1)
    except KeyboardInterrupt:
        if _has_peers():
            _exit("interrupted", INTERRUPTED)
        sys.exit(INTERRUPTED)
    except Exception as e:
        _exit_on_unexpected(e)


def _set_up_logging() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Redacting("%(message)s"))
    logging.getLogger("rlhfjax").setLevel(logging.INFO)
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

    The training loop installs its own handler, which saves first. Outside of it every file on disk
    is whole at any moment.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: object) -> None:
    message = "stopped; run the same command to resume"
    if _has_peers():
        _hosts().fail(message, Preempted.exit_code)
    _print_error(message)
    os._exit(Preempted.exit_code)


def join_hosts(heartbeat_timeout: int, join_timeout: int) -> None:
    """Joins the other hosts, if there are any. Only the first host logs its progress."""
    _hosts().join(heartbeat_timeout=heartbeat_timeout, join_timeout=join_timeout)
    if not _hosts().first():
        logging.getLogger("rlhfjax").setLevel(logging.WARNING)


def keep_compiled_programs(folder: str) -> None:
    """Makes jax keep compiled programs in a folder, for the next start."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)


# ------------------------------------------------------------------ the end


def _exit(message: str, code: int) -> NoReturn:
    """Ends with one line. Notifies the other hosts, unless all are preempted alike."""
    if _has_peers() and code != Preempted.exit_code:
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
        " more devices; rlhfjax plan tells what a stage needs"
    )


def _print_error(message: str) -> None:
    print(f"rlhfjax: {printable(redact(message))}", file=sys.stderr, flush=True)


def _has_peers() -> bool:
    """Returns whether there are other hosts, which must learn of this one's end."""
    return "rlhfjax.hosts" in sys.modules and _hosts().count() > 1


def _hosts() -> Any:
    from rlhfjax import hosts

    return hosts
