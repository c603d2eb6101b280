"""Stands in for gcloud: records calls, refuses flags that gcloud lacks, plays TPU VMs here.

A node is a folder, and in it every worker's home; what is sent by ssh really runs there. A bucket
is gs/BUCKET. `scenario.json` says how the services misbehave:

    workers: how many a node has; 1
    states: what a created request goes through; ACTIVE
    nodes: {NODE: STATE} where it is not READY
    late: {NODE.WORKER: N}, a worker that does not answer the first N times
    follow: what happens each time that a log is followed, "" for nothing:
      lost         the connection breaks
      unavailable  gcloud ends with 1, for a reason of its own
      preempt      the request is SUSPENDED, and its machines are gone
      node         the node is PREEMPTED, and the request still ACTIVE
      reboot       the machines start again: files are there, processes are not
      gone         somebody deletes the queued resource
    describe: broken; storage: broken
"""

import json
import os
import sys

ROOT = os.environ["STANDIN"]
TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gcloud_flags.json")
# https://cloud.google.com/tpu/docs/runtimes
IMAGES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
}
IMAGES["v6e"] = "v2-alpha-tpuv6e"


def load(name, default):
    path = os.path.join(ROOT, name)
    if not os.path.exists(path):
        return default
    with open(path) as f:
        return json.load(f)


def save(name, value):
    with open(os.path.join(ROOT, name), "w") as f:
        json.dump(value, f)


def fail(text, code=1):
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    sys.exit(code)


def main():
    words = sys.argv[1:]
    with open(os.path.join(ROOT, "calls.jsonl"), "a") as f:
        f.write(json.dumps(words) + "\n")
    plain = [word for word in words if not word.startswith("--")]
    pairs = [word[2:].partition("=") for word in words if word.startswith("--")]
    flags = {name: value for name, _, value in pairs}
    table = load(TABLE, None)
    command = next(
        (c for c in table["commands"] if plain[: c.count(" ") + 1] == c.split()), None
    )
    if command is None or set(flags) - set(table["commands"][command]) - set(
        table["everywhere"]
    ):
        fail(f"unrecognized arguments: {words}", 2)
    rest = plain[command.count(" ") + 1 :]
    if command == "secrets versions access":
        print("the-stored-value")
    elif command.startswith("storage"):
        storage(command.split()[1], rest)
    elif "zone" not in flags:
        fail("zone is required", 2)
    else:
        group, verb = command.split()[-2:]
        globals()["describe_node" if (group, verb) == ("tpu-vm", "describe") else verb](
            rest, flags
        )


# ------------------------------------------------------------------ queued resources


def create(names, flags):
    if {"accelerator-type", "runtime-version"} - set(flags):
        fail("accelerator-type and runtime-version are required", 2)
    image = IMAGES[flags["accelerator-type"].rpartition("-")[0]]
    if flags["runtime-version"] != image:
        fail(f"INVALID_ARGUMENT: {flags['runtime-version']} is not for this chip")
    if ("node-id" in flags) == ("node-count" in flags) or flags.get(
        "node-count"
    ) == "1":
        fail("exactly one of node-id and node-count, the latter above 1", 2)
    if load("states", None):
        fail("ALREADY_EXISTS")
    scenario = load("scenario.json", {})
    save("states", scenario.get("states", ["ACTIVE"]))
    save("scenario.json", scenario | {"nodes": {}})
    count = int(flags.get("node-count", 0))
    nodes = [f"{flags.get('node-prefix')}-{i}" for i in range(count)] or [
        flags["node-id"]
    ]
    for node in nodes:
        for worker in range(scenario.get("workers", 1)):
            os.makedirs(os.path.join(ROOT, node, str(worker)))
    save("nodes", nodes)


def describe(names, flags):
    if load("scenario.json", {}).get("describe") == "broken":
        fail("PERMISSION_DENIED: nobody may")
    states = load("states", None)
    if not states:
        fail(f"NOT_FOUND: Resource {names[0]} was not found")
    about = {"state": states[0]}
    if states[0] == "FAILED":
        about["failedData"] = {"error": {"message": "the time is over"}}
    print(json.dumps({"state": about}))
    save("states", states[1:] or states)


def describe_node(names, flags):
    state = load("scenario.json", {}).get("nodes", {}).get(names[0], "READY")
    if not os.path.isdir(os.path.join(ROOT, names[0])):
        fail("NOT_FOUND")
    print(
        json.dumps({"state": state, "networkEndpoints": [{} for _ in homes(names[0])]})
    )


def delete(names, flags):
    if load("states", None) is None:
        fail("NOT_FOUND")
    os.remove(os.path.join(ROOT, "states"))
    for node in load("nodes", []):
        end_processes(node)
        count = sum(name.startswith("deleted-") for name in os.listdir(ROOT))
        os.rename(os.path.join(ROOT, node), os.path.join(ROOT, f"deleted-{count}"))


def list(names, flags):
    print("NAME ZONE STATE")


def end_processes(node):
    """What a machine's end is to what runs on it."""
    for home in homes(node):
        folder = os.path.join(home, "launch")
        for file in os.listdir(folder) if os.path.isdir(folder) else ():
            status = (
                load(os.path.join(folder, file), {}) if file.endswith(".json") else {}
            )
            for pid in (
                (status.get("pid"), -status.get("child", 0)) if "pid" in status else ()
            ):
                try:
                    if pid:
                        os.kill(pid, 9)
                except ProcessLookupError:
                    pass


# ------------------------------------------------------------------ ssh and scp


def homes(node):
    folder = os.path.join(ROOT, node)
    return [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.isdigit()
    ]


def reached(node, flags):
    """The homes of the workers that a command reaches, and whether all of those meant answer."""
    if load("states", ["none"])[0] != "ACTIVE" or not os.path.isdir(
        os.path.join(ROOT, node)
    ):
        fail(f"{node} is not there")
    scenario = load("scenario.json", {})
    state = scenario.get("nodes", {}).get(node, "READY")
    if state != "READY":
        fail(f'This TPU has terminal state "{state}", so it cannot be used anymore.')
    meant = homes(node)
    if flags.get("worker", "0") != "all":
        meant = [meant[int(flags.get("worker", "0"))]]
    late = scenario.get("late", {})
    missing = [
        home for home in meant if late.get(f"{node}.{os.path.basename(home)}", 0) > 0
    ]
    for home in missing:
        late[f"{node}.{os.path.basename(home)}"] -= 1
    if missing:
        save("scenario.json", scenario)
    return [home for home in meant if home not in missing], not missing


def scp(names, flags):
    node = names[-1].partition(":")[0]
    there, whole = reached(node, flags)
    if len(homes(node)) > 1 and not os.path.exists(os.path.join(ROOT, "key-in-agent")):
        fail(
            'SSH Key is not present in the SSH agent. Please run "ssh-add …" to add it.'
        )
    for home in there:
        for file in names[:-1]:
            to = os.path.join(home, os.path.basename(file))
            with open(file, "rb") as source, open(to, "wb") as copy:
                copy.write(source.read())
    if not whole:
        fail("scp: a worker does not answer", 255)


def ssh(names, flags):
    command = flags["command"]
    if " follow " in command:
        happen(names[0])
    there, whole = reached(names[0], flags)
    codes = [0 if whole else 255]
    for home in there:
        env = {**os.environ, "HOME": home, "WORKER": os.path.basename(home)}
        if len(there) == 1 and whole:
            os.chdir(home)
            os.execvpe("bash", ["bash", "-c", command], env)
        pid = os.fork()
        if not pid:
            os.chdir(home)
            os.execvpe("bash", ["bash", "-c", command], env)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sys.exit(max(codes))


def happen(node):
    """What the scenario has for this time that a log is followed."""
    scenario = load("scenario.json", {})
    outcome, *scenario["follow"] = scenario.get("follow") or [""]
    if outcome in ("preempt", "node", "reboot"):
        for one in load("nodes", []):
            end_processes(one)
    if outcome == "preempt":
        save("states", ["SUSPENDED"])
    if outcome == "node":
        scenario["nodes"] = {node: "PREEMPTED"}
    if outcome == "gone":
        delete([], {})
    save("scenario.json", scenario)
    if outcome:
        sys.exit(1 if outcome in ("unavailable", "node") else 255)


# ------------------------------------------------------------------ buckets


def storage(verb, names):
    if load("scenario.json", {}).get("storage") == "broken":
        fail("HTTPError 403: no access")
    import glob
    import shutil

    local = [name.replace("gs://", os.path.join(ROOT, "gs", "")) for name in names]
    if verb == "cp":
        os.makedirs(local[-1], exist_ok=True)
        for file in local[:-1]:
            shutil.copy(file, local[-1])
        return
    found = [file for name in local for file in sorted(glob.glob(name, recursive=True))]
    if not found:
        fail("One or more URLs matched no objects.")
    for file in found:
        if verb == "ls":
            print("gs://" + os.path.relpath(file, os.path.join(ROOT, "gs")))
        else:
            with open(file) as f:
                sys.stdout.write(f.read())


if __name__ == "__main__":
    main()
