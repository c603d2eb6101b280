r"""Tells secrets from other texts, and hides them in what is printed or written.

launch/ has this file by a link, because it runs where rlhfjax is not installed.

A value is a secret by its form, which its issuer documents, or by the name that it is given:

    OPENAI_KEY=sk-…               by both
    x = "Bearer abc…"             by its form
    HF_TOKEN=abcdefgh             by its name
    ppo.truncate.token=<|end|>    no secret: our option, whose value has no secret's form
"""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST = 6  # characters of a secret; what is shorter would blacken half of a log
RANDOM = 16  # characters from which random ones are told from words
BITS = 3.0  # per character, from which they count as random; English has fewer in 16 characters

# Who issues secrets of a form, and the form. From the issuers' documents and gitleaks' rules,
# https://github.com/gitleaks/gitleaks/blob/master/config/gitleaks.toml.
FORMS = {
    "OpenAI, Anthropic, DeepSeek, OpenRouter": r"sk-(?:[a-z]+\d*-)*(?=[\w-]*\d)[\w-]{16,}",
    "Stripe": r"[sr]k_(?:live|test)_\w{10,}",
    "Hugging Face": r"(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "GitHub": r"gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}",
    "GitLab": r"glpat-[\w-]{16,}",
    "AWS": r"(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",
    "Google": r"AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}",
    "Slack": r"xox[abeoprs]-[\w-]{10,}|xapp-\d-[\w-]{10,}",
    "Weights & Biases": r"wandb_v\d_\w{20,}|local-[0-9a-f]{40}",
    "npm, PyPI": r"npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}",
    "Groq, NVIDIA, Replicate, xAI": r"gsk_\w{20,}|nvapi-[\w-]{20,}|r8_\w{20,}|xai-\w{20,}",
    "JSON Web Token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",
    "HTTP": r"(?i:bearer|basic)\s+(?=[^\s\"',;]*[\d=])[\w.~+/=-]{12,}",
    "a URL with a password": r"(?<=://)[^\s/:@\"']*:[^\s/@\"']+(?=@)",
    "PEM": r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
}
_FORM = re.compile(
    "|".join(
        rf"(?:{form})" if form.startswith("(?<=") else rf"(?<![A-Za-z0-9])(?:{form})"
        for form in FORMS.values()
    ),
    re.DOTALL,
)
_WORDS = (
    r"(?<![A-Za-z])"
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PWD|CREDENTIALS?|AUTHORIZATION|"
    r"(?:API|ACCESS|PRIVATE)?_?KEY)"
    r"(?![A-Za-z])"
)
_NAME = re.compile(_WORDS, re.IGNORECASE)  # in HF_TOKEN, not in `tokenizer`
_TOKEN = re.compile(r"(?<![A-Za-z])TOKEN(?![A-Za-z])\w*$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?P<name>\b[\w.]*{_WORDS}\w*)(?P<sign>=|: ?)(?P<value>[^\s\"'$]{{{SHORTEST},}})",
    re.IGNORECASE,
)  # $: a reference
_OPAQUE = re.compile(r"[\w.~+/=-]+")


def has_form(value: str) -> bool:
    """Returns whether a text has a part with the form of a secret."""
    return _FORM.search(value) is not None


def is_secret(name: str, value: str) -> bool:
    """Returns whether the value of a variable, flag or option is a secret."""
    return has_form(value) or (_NAME.search(name) is not None and _fits(name, value))


def _fits(name: str, value: str) -> bool:
    """Returns whether a value may be the secret that its name promises.

    A token may also be one of a tokenizer: then a number is none, and an option with a dot, of our
    configs, is asked for a random value.
    """
    if len(value) < SHORTEST:
        return False
    if re.match(r"(?:[.~]{0,2}/|gs://)", value) and not _random(_last_part(value)):
        return False  # the path of a file
    if not _TOKEN.search(name):
        return True
    return _random(value) if "." in name else not re.fullmatch(r"[-+.\d]+", value)


def _last_part(path: str) -> str:
    return path.rpartition("/")[2]


def _random(value: str) -> bool:
    """Returns whether a text has letters and digits in an order without meaning."""
    if len(value) < RANDOM or not _OPAQUE.fullmatch(value):
        return False
    if not re.search(r"\d", value) or not re.search(r"[A-Za-z]", value):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= BITS


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Returns a text with *** in place of every secret.

    These are values of a secret's form, those given to a secret's name as NAME=VALUE, and those of
    environment variables with such a name.
    """
    environ = os.environ if environ is None else environ
    values = [value for name, value in environ.items() if is_secret(name, value)]
    for value in sorted(values, key=len, reverse=True):  # one may hold another
        text = text.replace(value, HIDDEN)
    return _ASSIGNED.sub(_hide_assigned, _FORM.sub(HIDDEN, text))


def _hide_assigned(found: re.Match[str]) -> str:
    if not _fits(found["name"], found["value"]):
        return found[0]
    return f"{found['name']}{found['sign']}{HIDDEN}"


def printable(text: str) -> str:
    """Returns a text with escapes in place of line breaks, control characters and half characters.

    A name or a value in a message can thereby neither add lines nor color a terminal.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
