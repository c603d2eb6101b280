"""Errors for people: one line that says what is wrong, where, and what is accepted."""

import os


def first_line(error: BaseException | str, *, kind: bool = False) -> str:
    """Returns the first line with text of an exception's message or of a process's output.

    Args:
      error: an exception, whose message may be empty, or a text.
      kind: put the exception's class before its message, as a traceback does.

    Returns:
      A text that is never empty: the exception's class if it has no message, "no message" for an
      empty text.
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, str):
        return line or "no message"
    name = type(error).__name__
    return f"{name}: {line}" if line and kind else line or name


def cut(text: str, most: int = 100) -> str:
    """Returns a text, or its beginning and an ellipsis if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def install(extra: str) -> str:
    """Returns the command that installs an extra, for the message of a missing package.

    The package is not in an index. From another folder, the command names that of the clone.
    """
    clone = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if not os.path.isfile(os.path.join(clone, "pyproject.toml")):
        return f"pip install -e '.[{extra}]' in a clone of rlhfjax"
    place = "." if clone == os.getcwd() else clone
    return f"pip install -e '{place}[{extra}]'"


LONGEST = 1000  # characters of a message of one line


class UserError(Exception):
    """A failed run (exit code 1). The message is shown without a traceback.

    Of a line that is too long, since it repeats what somebody typed, the middle is left out.
    """

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST or "\n" in text:
            return text
        end = LONGEST // 3
        return f"{text[: LONGEST - end - 1]}…{text[-end:]}"


class ConfigError(UserError):
    """An invalid config or command line (exit code 2)."""

    exit_code = 2


class DataError(UserError):
    """Invalid input data; the message names the file and the line or record."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of other shapes than the model."""


class NonFiniteError(UserError):
    """A loss or gradient is NaN or infinite; the message names the step and the last checkpoint."""


class Preempted(UserError):
    """SIGTERM was received and the state was saved (exit code 75): the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL: launchers restart on it


class Interrupted(Preempted):
    """Ctrl-C was pressed and the state was saved (exit code 130): the same command resumes."""

    exit_code = 130  # a shell's exit code after SIGINT


class HostLost(UserError):
    """Another host is gone (exit code 75): all hosts have to be started again."""

    exit_code = Preempted.exit_code
    message = (
        "another host is gone; "
        "run the same command on all hosts to resume from the last checkpoint"
    )
