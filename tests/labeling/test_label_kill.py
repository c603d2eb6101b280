"""The server is killed under twenty labelers, twice: no label that a page saw confirmed is lost."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhfjax import paths
from rlhfjax.labeling.client import Client
from rlhfjax.labeling.store import FILE, Store

ROOT = Path(__file__).parents[2]
LABELERS = [f"labeler-{i}" for i in range(20)]
BEFORE_KILL = 60  # labels


def serve(tmp_path: Path) -> tuple[subprocess.Popen, list[str]]:
    """Returns the server's process and the links of the labelers."""
    command = [
        sys.executable,
        "-m",
        "rlhfjax",
        "label",
        f"--workdir={tmp_path / 'label'}",
    ]
    command += [f"--from={tmp_path / 'rows.jsonl'}", "--task=compare", "--port=0"]
    command += [f"--labelers={','.join(LABELERS)}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    links: list[str] = []
    while len(links) < len(LABELERS):
        line = process.stdout.readline()
        assert line, "the server has ended"
        if found := re.match(r"labeler-\d+: (http\S+)", line):
            links.append(found[1])
    return process, links


@pytest.mark.slow
def test_no_confirmed_label_is_lost_when_the_server_is_killed_under_twenty(tmp_path):
    rows = [{"prompt": f"p{i}", "completions": [f"a{i}", f"b{i}"]} for i in range(1000)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    confirmed: list[int] = []
    enough = threading.Event()

    def work(link: str, target: int) -> None:
        client = Client(link)
        try:
            while True:
                event = client.next()["event"]
                confirmed.append(client.submit(event, {"ranks": [1, 2]}, 1.0)["label"])
                if len(confirmed) >= target:
                    enough.set()
        except ConnectionError:  # the server was killed
            client.close()

    for _ in range(2):
        process, links = serve(tmp_path)
        enough.clear()
        target = len(confirmed) + BEFORE_KILL
        with ThreadPoolExecutor(len(links)) as pool:
            futures = [pool.submit(work, link, target) for link in links]
            assert enough.wait(120)
            process.send_signal(signal.SIGKILL)
            process.wait()
            for future in futures:
                future.result()
    file = paths.path(tmp_path / "label" / FILE)
    with sqlite3.connect(file) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    labels = Store(file).labels()
    assert len(confirmed) >= 2 * BEFORE_KILL
    assert set(confirmed) <= {label.id for label in labels}
    assert len({(label.who, label.item) for label in labels}) == len(labels)
