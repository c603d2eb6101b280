"""Stands in for gcloud: records every call, refuses flags that gcloud does not have, and plays TPU VMs on this machine.

A node is a folder, its workers one; scripts sent by ssh really run there. `scenario.json` holds what goes wrong:
{"follow": ["preempt", …]}, a word for each time that a log is followed, "" for nothing. A worker whose log is
followed in earnest has a file `followed`.
Flags are those of Google Cloud SDK 528.0.0, `gcloud compute tpus … --help`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["STANDIN"])
ANY = {"zone", "project", "quiet", "format"}
FLAGS = {
    "queued-resources create": ANY
    | {"accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "network", "service-account"}
    | {"spot", "reserved"},
    "queued-resources describe": ANY,
    "queued-resources delete": ANY | {"force"},
    "tpu-vm scp": ANY | {"worker"},
    "tpu-vm ssh": ANY | {"worker", "command", "ssh-flag"},
    "secrets versions access": {"secret", "project"},
}


def load(name: str, default):
    path = ROOT / name
    return json.loads(path.read_text()) if path.exists() else default


def save(name: str, value) -> None:
    (ROOT / name).write_text(json.dumps(value))


def fail(text: str, code: int = 1) -> None:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    words = sys.argv[1:]
    with (ROOT / "calls.jsonl").open("a") as f:
        f.write(json.dumps(words) + "\n")
    plain = [word for word in words if not word.startswith("--")]
    flags = {word[2:].partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
    plain = plain[2:] if plain[:2] == ["compute", "tpus"] else plain
    group = " ".join(plain[: 3 if plain[0] == "secrets" else 2])
    if group not in FLAGS or set(flags) - FLAGS[group]:
        fail(f"unrecognized arguments: {words}", 2)
    if group == "secrets versions access":
        print("the-stored-value")
        return
    if "zone" not in flags:
        fail("zone is required", 2)
    globals()[plain[1]](plain[2:], flags)


def create(names, flags):
    if {"accelerator-type", "runtime-version"} - set(flags):
        fail("accelerator-type and runtime-version are required", 2)
    if ("node-id" in flags) == ("node-count" in flags) or flags.get("node-count") == "1":
        fail("exactly one of node-id and node-count, the latter above 1", 2)
    if load("states", None):
        fail("ALREADY_EXISTS")
    save("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    count = int(flags.get("node-count", 0))
    nodes = [f"{flags.get('node-prefix')}-{i}" for i in range(count)] or [flags["node-id"]]
    for node in nodes:
        (ROOT / node).mkdir()
    save("nodes", nodes)


def describe(names, flags):
    if load("scenario.json", {}).get("describe") == "broken":
        fail("PERMISSION_DENIED: nobody may")
    states = load("states", None)
    if not states:
        fail(f"NOT_FOUND: Resource {names[0]} was not found")
    print(states[0])
    save("states", states[1:] or states)


def delete(names, flags):
    if load("states", None) is None:
        fail("NOT_FOUND")
    for node in load("nodes", []):
        (ROOT / node).rename(ROOT / f"deleted-{len(list(ROOT.glob('deleted-*')))}")
    (ROOT / "states").unlink()


def scp(names, flags):
    node, _, to = names[1].partition(":")
    (home(node) / to).write_bytes(Path(names[0]).read_bytes())


def ssh(names, flags):
    folder, command = home(names[0]), flags["command"]
    if "tail -n" in command:
        scenario = load("scenario.json", {})
        outcome, *scenario["follow"] = scenario.get("follow") or [""]
        save("scenario.json", scenario)
        if outcome == "preempt":
            save("states", ["SUSPENDED"])
        if outcome:  # "preempt" or "lost"
            sys.exit(255)
        (folder / "followed").touch()
    env = {**os.environ, "HOME": str(folder)}
    sys.exit(subprocess.run(["bash", "-c", command], env=env, cwd=folder, stdin=subprocess.DEVNULL).returncode)


def home(node: str) -> Path:
    if load("states", ["none"])[0] != "ACTIVE" or not (ROOT / node).is_dir():
        fail(f"{node} is not there")
    return ROOT / node


if __name__ == "__main__":
    main()
