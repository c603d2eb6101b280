"""Errors for users: one line that says what is wrong, where, and what is accepted."""


def first_line(error: BaseException | str, *, kind: bool = False) -> str:
    """Returns the first line with text of an exception's message or of a process's output.

    Args:
      error: an exception, whose message may be empty, or a text.
      kind: put the exception's class before its message, as a traceback does.

    Returns:
      If there is no text, the exception's class; "no message" for an empty string.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, str):
        return line or "no message"
    name = type(error).__name__
    return f"{name}: {line}" if line and kind else line or name


class UserError(Exception):
    """A failed run (exit code 1). Only the message is shown, no traceback."""

    exit_code = 1


class ConfigError(UserError):
    """An invalid config or command line (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """Bad input data. The message names the file and the line or record."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of other shapes."""


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite.

    The message names the step and the last good checkpoint.
    """


class Preempted(UserError):
    """SIGTERM was received and the state was saved: the same command goes on (exit code 75)."""

    exit_code = 75  # EX_TEMPFAIL: launchers restart the command


class HostLost(UserError):
    """Another host is gone, and with it all since the last checkpoint (exit code 75: restart all)."""

    exit_code = Preempted.exit_code
    message = "another host is gone; the same command on all hosts goes on from the last checkpoint"
