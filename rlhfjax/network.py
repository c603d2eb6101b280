"""Whether servers can be reached, in seconds also where name servers do not answer."""

import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable

SECONDS = 5.0


def unreachable(urls: Iterable[str]) -> str | None:
    """Returns why no server of some URLs can be reached; None if one can, or if there is no URL.

    With a proxy in the environment, it is the proxy that is asked.
    """
    addresses = {address for url in urls if (address := _address(url))}
    outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
    for address in addresses:
        # Not in a pool: it would wait for threads that no name server answers.
        arguments = (address, outcomes)
        threading.Thread(target=_connect, args=arguments, daemon=True).start()
    end = time.monotonic() + SECONDS
    reason = None
    for host, _ in addresses:
        try:
            reason = outcomes.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return f"{host} does not answer within {SECONDS:g} s"
        if not reason:
            return None
    return reason


def _connect(address: tuple[str, int], outcomes: queue.SimpleQueue[str]) -> None:
    """Puts "" into the queue if a server can be reached, else why not."""
    try:
        socket.create_connection(address, timeout=SECONDS).close()
        outcomes.put("")
    except OSError as error:
        outcomes.put(f"{address[0]}: {error.strerror or error}")


def _address(url: str) -> tuple[str, int] | None:
    """Returns the host and port that a download of a URL connects to; None for a local file."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy)
    if not parts.hostname:
        return None
    ports = {"http": 80, "ftp": 21}
    usual = ports.get(parts.scheme, 443)
    return parts.hostname, usual if parts.port is None else parts.port
