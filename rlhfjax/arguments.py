"""Parses absl's flags; an error names the flag, its value and the rule.

launch/ has this file by a link, because it runs where rlhfjax is not installed.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence

from absl import flags

LONGEST = 100  # characters of a value in a message
_MISSING = "Missing value for flag "
_UNKNOWN = re.compile("Unknown command line flag '([^']*)'")
_NUMBERS = ((flags.IntegerParser, "int"), (flags.FloatParser, "float"))


def parse(fv: flags.FlagValues, argv: Sequence[str], *, once: bool = True) -> list[str]:
    """Parses the flags in `argv` and returns the other arguments, the program's name first.

    Args:
      once: whether a flag may be given once only. Otherwise its last value holds.

    Raises:
      flags.Error: an unknown flag, or a value that its flag does not accept.
    """
    try:
        rest = fv(list(argv))
    except flags.Error as e:
        raise flags.IllegalFlagValueError(_explain(fv, argv, str(e))) from None
    except RecursionError:  # absl looks for names that are like a long one
        longest = max(argv, key=len)
        raise flags.IllegalFlagValueError(
            f"{_cut(longest)}: there is no such flag"
        ) from None
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        # An override of a place that the config, with the overrides before it, does not have.
        raise flags.IllegalFlagValueError(_cut(str(e).strip("\"'"), 200)) from None
    for flag in {id(fv[name]): fv[name] for name in fv}.values():
        if once and flag.present > 1 and not isinstance(flag, flags.MultiFlag):
            raise flags.IllegalFlagValueError(
                f"--{flag.name}: given {flag.present} times; expected once"
            )
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise flags.IllegalFlagValueError(
                f"--{flag.name}={flag.value}: expected a finite {accepted(flag.parser)}"
            )
    return rest


def _explain(fv: flags.FlagValues, argv: Sequence[str], message: str) -> str:
    """Returns one line that says which flag has which value, and what is accepted."""
    if message.startswith(_MISSING):
        name = message.removeprefix(_MISSING)
        return f"{name}: a value is missing; expected {name}=VALUE"
    if unknown := _UNKNOWN.match(message):
        hint = did_you_mean(unknown[1], fv).replace("mean ", "mean --")
        return f"--{_cut(unknown[1])}: there is no such flag{hint}"
    illegal = re.match(r"flag --([^=]+)=", message)
    if illegal and illegal[1] in fv:
        rest = message[illegal.end() :]
        value = next((text for text in _values(argv) if rest.startswith(text)), "…")
        what = accepted(fv[illegal[1]].parser)
        return f"--{illegal[1]}={_cut(value)}: expected {what}"
    return _cut(" ".join(message.removeprefix("flag ").split()), 4 * LONGEST)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown name; empty if no known one is close to it."""
    close = difflib.get_close_matches(name.strip().lower(), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _values(argv: Sequence[str]) -> list[str]:
    """Returns what may be a flag's value, the longest text first."""
    values = [arg.partition("=")[2] if "=" in arg else arg for arg in argv]
    return sorted(values, key=len, reverse=True)


def accepted(parser: flags.ArgumentParser) -> str:
    """Returns what a flag accepts, such as `int >= 1`."""
    for kind, name in _NUMBERS:
        if isinstance(parser, kind):
            bounds = ((">=", parser.lower_bound), ("<=", parser.upper_bound))
            limits = [
                f"{sign} {bound if isinstance(bound, int) else f'{bound:g}'}"
                for sign, bound in bounds
                if bound is not None
            ]
            return f"{name} {' and '.join(limits)}".rstrip()
    if isinstance(parser, flags.BooleanParser):
        return "true or false"
    if isinstance(parser, flags.EnumParser):
        return f"one of {', '.join(parser.enum_values)}"
    if isinstance(parser, flags.ListParser):
        return 'a,b,c, where "a,b",c has a comma in its first element'
    return parser.syntactic_help or "a text"
