"""Who may reach a server: this machine alone, or who has a token."""

import importlib.util
import ipaddress

from rlhfjax.errors import ConfigError, install

PACKAGES = ("starlette", "uvicorn")
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # names of this machine
SHORTEST_TOKEN = 16  # characters; shorter ones can be guessed


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def validate(host: str, port: int, token: str) -> None:
    """Raises ConfigError for an address that a server may not have.

    Args:
      token: what clients must send; "" where they need none.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port={port}: expected 0 (a free one) to 65535")
    if not token and not is_loopback(host):
        raise ConfigError(
            f"--host={host}: other machines could reach this server; give a --token=… of"
            f" {SHORTEST_TOKEN} characters or more that clients must send"
        )
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii()):
        raise ConfigError(
            f"--token: expected {SHORTEST_TOKEN} ASCII characters or more, given {len(token)}"
        )


def validate_installed(*others: str) -> None:
    """Raises ConfigError if a package of the extra `serve` is missing.

    Args:
      others: packages that are needed besides PACKAGES.
    """
    for package in (*PACKAGES, *others):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the package {package} is not installed; {install('serve')}"
            )
