"""Runs shell commands. It prints each before running it, or only prints it in a dry run.

The value of a secret is never printed.
"""

import gzip
import hashlib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from launch import arguments
from launch.redact import is_secret, printable, redact

PREEMPTED = 75  # rlhfjax.errors.Preempted.exit_code: the state is saved, the same command goes on
LOST = 255  # what ssh exits with when the connection, not the command, failed
LONGEST_TIME = 3650 * 86400.0  # seconds
LONGEST = 40  # characters of a name: clouds take 63, with what they append
SLUG = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class LaunchError(Exception):
    """One line that says what is wrong, where, and what is accepted."""


class Shell:
    """Runs commands one at a time, and shows each.

    Args:
      dry_run: show what would be run, and run nothing.
      out: takes what is shown, a line at a time.
    """

    def __init__(self, dry_run: bool = False, out: Callable[[str], None] | None = None):
        self.dry_run = dry_run
        self._out = out or _print

    def say(self, line: str) -> None:
        self._out(redact(line))

    def show(self, words: Sequence[str]) -> None:
        self.say(("" if self.dry_run else "+ ") + shlex.join(words))

    def run(
        self,
        words: Sequence[str],
        stdin: str | None = None,
        keep: Callable[[str], bool] | None = None,
    ) -> int:
        """Runs a command and shows its output as it comes; returns its exit code, in a dry run 0.

        Args:
          keep: takes each line; a line for which it returns True is not shown.
        """
        self.show(words)
        if self.dry_run:
            return 0
        source = subprocess.DEVNULL if stdin is None else subprocess.PIPE
        with _started(
            words, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            if stdin is not None:
                process.stdin.write(stdin)
                process.stdin.close()
            for line in process.stdout:
                line = line.rstrip("\n")
                if keep is None or not keep(line):
                    self.say(line)
        return process.returncode

    def must(self, words: Sequence[str], stdin: str | None = None) -> None:
        """As `run`; a failure is a LaunchError."""
        if code := self.run(words, stdin):
            raise LaunchError(
                f"{shlex.join(words[:5])} … failed with exit code {code}; its output is above"
            )

    def ask(self, words: Sequence[str], missing: str, pause: float) -> str | None:
        """The output of a command that changes nothing; None where its error says `missing`. It is
        not shown.

        Raises:
          LaunchError: it fails three times, for another reason: that is not the same as "there is
            no such thing".
        """
        for attempt in range(3):
            time.sleep(pause if attempt else 0)
            with _started(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as process:
                out, error = process.communicate()
            if process.returncode == 0:
                return out.strip()
            if missing in error:
                return None
        last = last_line(error) or f"exit code {process.returncode}"
        raise LaunchError(f"{shlex.join(words[:6])} … failed three times: {last}")

    def peek(self, words: Sequence[str]) -> str | None:
        """Returns the output of a command that changes nothing; None where it fails.

        Shows neither.
        """
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with _started(words, stdin=subprocess.DEVNULL, **streams) as process:
            out, _ = process.communicate()
        return None if process.returncode else out


def parsed(text: str, program: str) -> dict[str, Any]:
    """Returns the JSON object that a program printed.

    Raises:
      LaunchError: it printed something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise LaunchError(f"{program}: its answer is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise LaunchError(f"{program}: its answer is {text[:40]!r}; expected an object")
    return value


def field(
    value: Mapping[str, Any], name: str, kind: type, program: str, default: Any = None
) -> Any:
    """Returns a field of an answer. Raises LaunchError if it has another type.

    Args:
      default: what an absent field stands for; None: the field is required.
    """
    if default is not None and value.get(name) is None:
        return default
    if not isinstance(value.get(name), kind):
        found = repr(value.get(name))[:40]
        raise LaunchError(
            f"{program}: {name}={found} in its answer; expected {kind.__name__}"
        )
    return value[name]


def last_line(output: str) -> str:
    """The last line with text of a command's output, where a tool says why it failed; "" if there
    is none."""
    return next(
        (line.strip() for line in reversed(output.splitlines()) if line.strip()), ""
    )


def _print(line: str) -> None:
    """Prints a line with one call, so that lines of several threads do not mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _started(words: Sequence[str], **streams: int) -> subprocess.Popen:
    try:
        return subprocess.Popen(words, text=True, errors="replace", **streams)
    except FileNotFoundError:
        raise LaunchError(
            f"{words[0]} is not installed on this machine, or not in PATH"
        ) from None


def environment(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a dict.

    Raises:
      LaunchError: one is not of that form, or holds a secret: that would stand in a manifest, a log
        or a process list.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise LaunchError(f"--env={redact(pair)}: expected NAME=VALUE")
        if is_secret(name, value) or redact(value) != value:
            raise LaunchError(
                f"--env={name}=…: this looks like a secret; use --secret, or the machine's own "
                "environment"
            )
        found[name] = value
    return found


def secrets(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=REFERENCE` texts as a dict.

    Where the machine that runs finds the value, never the value.
    """
    found = {}
    for pair in pairs:
        name, equals, reference = pair.partition("=")
        if (
            not equals
            or not re.fullmatch(r"[A-Za-z_]\w*", name)
            or not re.fullmatch(r"[\w.-]+(:[\w.-]+)?", reference)
        ):
            raise LaunchError(
                f"--secret={name}=…: expected NAME=SECRET, the name of a stored secret and not its "
                "value"
            )
        if redact(reference) != reference:
            raise LaunchError(
                f"--secret={name}=…: this is a secret's value; expected the name it is stored under"
            )
        found[name] = reference
    return found


def slug(name: str) -> str:
    """A name as clouds take it: small letters, digits and hyphens, at most LONGEST of them.

    One that is changed for it has a hash at its end, `kl-0-1-seed-1-698fae` of `kl=0.1,seed=1`: two
    runs of a sweep never have one name, by which one would take the other's machines for its own.
    """
    made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if made != name or len(made) > LONGEST:
        digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
        made = f"{made[: LONGEST - 7].strip('-')}-{digits}"
    if not SLUG.fullmatch(made):
        raise LaunchError(
            f"--name={name}: expected a name that begins with a letter and has letters, digits and "
            "hyphens"
        )
    return made


def exports(env: Mapping[str, str]) -> str:
    """`NAME=VALUE ` of each, quoted for a shell."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in env.items())


def worst(codes: Sequence[int]) -> int:
    """One code for all hosts: the first failure that is not 75 or a lost connection."""
    failed = [code for code in codes if code]
    real = [code for code in failed if code not in (PREEMPTED, LOST)]
    return next(iter(real or failed), 0)


def pack(shell: Shell, file: str) -> str:
    """Packs what git tracks, as it is in the working tree, and says which files stay behind.

    The same files give the same bytes: names are sorted; times and owners are left out.

    Returns:
      The archive's SHA-256; in a dry run, which packs nothing, an empty text.
    Raises:
      LaunchError: this is no git repository.
    """
    if shell.dry_run:
        shell.say(f"# packs what git tracks into {file}")
        return ""
    deleted, untracked = (
        _git_files("--deleted"),
        _git_files("--others", "--exclude-standard"),
    )
    tracked = sorted(set(_git_files()) - set(deleted))
    for files, why in (
        (untracked, "git does not track them"),
        (deleted, "they are deleted here"),
    ):
        if files:
            shell.say(f"not sent, because {why}: {_shortened(files)}")
    with (
        open(file, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in tracked:
            tar.add(name, recursive=False, filter=_without_times)
    with open(file, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def _git_files(*options: str) -> list[str]:
    words = ["git", "ls-files", "-z", *options]
    with _started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, error = process.communicate()
    if process.returncode:
        raise LaunchError(
            f"git ls-files: {last_line(error)}; expected the repository's folder"
        )
    return sorted(filter(None, out.split("\0")))


def _shortened(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _without_times(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mode = 0o755 if info.mode & 0o100 else 0o644
    return info


def seconds(flag: str, text: str) -> float:
    """`90s`, `15m`, `1h30m`, `2d` or `0` in seconds.

    Raises:
      flags.IllegalFlagValueError: it is not of that form; the message names the flag.
    """
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    number = r"(\d+(?:\.\d*)?|\.\d+)([dhms])"
    # Matched from the start: a search takes quadratic time for many digits without a unit.
    parts = re.findall(number, text) if re.fullmatch(f"(?:{number})+", text) else []
    total = sum(float(amount) * units[unit] for amount, unit in parts)
    if (not parts and text != "0") or total > LONGEST_TIME:
        shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
        raise flags.IllegalFlagValueError(
            f"--{flag}={shown}: expected a time such as 90s, 15m or 1h30m, at most 3650d"
        )
    return total


def common_flags(fv: flags.FlagValues) -> None:
    """The flags of every launcher."""
    flags.DEFINE_string(
        "name",
        None,
        "job name; lower-case letters, digits and hyphens",
        flag_values=fv,
    )
    flags.DEFINE_multi_string(
        "env",
        [],
        "environment variable NAME=VALUE; repeatable; no secrets",
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "dry_run", False, "print the commands without running them", flag_values=fv
    )
    flags.DEFINE_bool(
        "help", False, "show this and exit", short_name="h", flag_values=fv
    )


def launch(
    doc: str,
    define: Callable[[flags.FlagValues], None],
    act: Callable,
    argv: Sequence[str],
) -> None:
    """The main function of a launcher: flags, `--`, the command; then `act(fv, words before,
    command)` and its code.

    What comes after the first `--` is the command. Exit code 2 for what cannot be meant, 1 for a
    failed launch.
    """
    argv = list(argv)
    signal.signal(
        signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT)
    )  # one way to stop
    cut = argv.index("--") if "--" in argv else len(argv)
    fv = flags.FlagValues()
    common_flags(fv)
    define(fv)
    try:
        words = arguments.parse(fv, argv[:cut], once=False)[1:]
        if fv.help:
            print(f"{doc}\n{fv.get_help()}")
            return
        code = act(fv, words, argv[cut + 1 :])
    except (LaunchError, flags.Error) as e:
        print(f"launch: {printable(redact(str(e)))}", file=sys.stderr)
        sys.exit(1 if isinstance(e, LaunchError) else 2)
    except KeyboardInterrupt:
        print(
            "launch: interrupted; what runs elsewhere goes on running", file=sys.stderr
        )
        sys.exit(130)
    sys.exit(code)


def workdir_of(command: Sequence[str]) -> str | None:
    """The value of the command's --workdir."""
    for word, after in itertools.zip_longest(command, command[1:]):
        if word == "--workdir":
            return after
        if word.startswith("--workdir="):
            return word.removeprefix("--workdir=")
    return None


def bucket_of(workdir: str | None) -> str | None:
    """gs://BUCKET of a workdir in a bucket, None for any other workdir."""
    if not workdir or not workdir.startswith("gs://"):
        return None
    return "/".join(workdir.split("/")[:3])


def required(fv: flags.FlagValues, *names: str) -> None:
    for name in names:
        if fv[name].value is None:
            raise flags.IllegalFlagValueError(f"--{name} is required")


def given(command: Sequence[str]) -> list[str]:
    if not command:
        raise flags.IllegalFlagValueError(
            "what to run is missing: expected it after --"
        )
    if redact(text := shlex.join(command)) != text:
        raise LaunchError(
            f"a secret stands in the command: {redact(text)}; it would be in logs and process lists"
        )
    return list(command)
