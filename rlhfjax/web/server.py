"""Runs an application: binds its address, serves, and ends without cutting replies off."""

import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from rlhfjax.errors import ConfigError

START_SECONDS = 30
BACKLOG = 512  # connections that wait to be accepted


class Server:
    """An application at an address, which is bound at once.

    Args:
      port: 0 takes a free one; `port` has it.
      grace: seconds that running replies may take once the server is told to end.

    Raises:
      ConfigError: the address cannot be bound; the message says why.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, grace: int = 10):
        self._socket = bind(host, port)
        self.host, self.port = host, self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serves until Ctrl-C or SIGTERM; what runs then may end within `grace` seconds."""
        try:
            self._server.run(sockets=[self._socket])
        except KeyboardInterrupt:  # raised again by uvicorn after a clean end
            pass
        finally:
            self._socket.close()

    def start(self) -> None:
        """Serves in a separate thread; returns when requests are answered."""
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start; its log says why")
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends a server that `start` began; a second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._server.should_exit = True
            thread.join()
        self._socket.close()

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address, or raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as e:
        listener.close()
        reason = e.strerror or str(e)
        raise ConfigError(
            f"--host={host} --port={port}: {reason}; --port=0 takes a free port"
        ) from None
    return listener
