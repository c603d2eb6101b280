"""A server that speaks Cloud Storage's protocol, for tests: gcsfs, TensorStore and google-cloud-
storage talk to it.

`gcp-storage-emulator`, in memory, as a process of its own. It does not do all that the real one
does: conditions on generations are ignored (Orbax sends them, and needs them only where two
  processes write the same object), and a listing
takes `prefix` but neither `startOffset` nor `endOffset` (TensorStore's own listing, which nothing
here asks for).
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

BUCKET = "bucket"
# With every write it would write down all that it holds, for a next start that never comes: most of
# its time.
START = """
from gcp_storage_emulator import __main__, storage
storage.Storage._write_config_to_file = lambda self: None
__main__.main()
"""


@contextlib.contextmanager
def serve() -> Iterator[dict[str, str]]:
    """The environment that leads every client to a new server with one empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["-H", "127.0.0.1", f"--port={port}", f"--default-bucket={BUCKET}"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, "start", "-M", "-q", *where],
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(process, f"http://127.0.0.1:{port}")
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",  # TensorStore looks for no other
            # it would ask another service what kind of bucket this is
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(url),
        ):
            return
        assert process.poll() is None and time.monotonic() < deadline, (
            "the server of buckets does not start"
        )
        time.sleep(0.05)
