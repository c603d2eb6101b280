"""Errors meant for people: one line that says what is wrong, where, and what is accepted."""


def first_line(error: BaseException | str, *, kind: bool = False) -> str:
    """Returns the first line with text of an exception's message or of a process's output.

    Args:
      error: an exception, whose message may be empty, or a text.
      kind: put the exception's class before its message, as a traceback does.

    Returns:
      Never an empty string: without a message the class of the exception, and "no message" for an
      empty text.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, str):
        return line or "no message"
    name = type(error).__name__
    return f"{name}: {line}" if line and kind else line or name


class UserError(Exception):
    """A failed run (exit code 1): the message is the whole story, no traceback is shown."""

    exit_code = 1


class ConfigError(UserError):
    """A configuration or command line that cannot be meant (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """Bad input data; the message names the file and the line or record."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another shape."""


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; the message names the step and the last good checkpoint."""


class Preempted(UserError):
    """SIGTERM was received and the state was saved: the same command goes on from here (exit code 75)."""

    exit_code = 75  # EX_TEMPFAIL: what a launcher restarts on


class HostLost(UserError):
    """Another host is gone; what this one had since the last checkpoint is lost (exit code 75: start all again)."""

    exit_code = Preempted.exit_code
    message = "another host is gone; the same command on all hosts goes on from the last checkpoint"
