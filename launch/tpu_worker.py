"""Runs on every worker of a TPU VM: sets up, runs the command, starts it again, and ends the cost.

    python3 rlhfjax_worker.py start SLICE [GENERATION]
    python3 rlhfjax_worker.py status | follow | tail | stop SLICE

launch.tpu copies this file to the workers, with the archive (rlhfjax.tar.gz) and a description of
the run (rlhfjax.json: launch.tpu_job.Job.description). It needs nothing but Python 3.8.

Each worker has a supervisor, a process that does not depend on any connection. It runs the command
until it ends, restarts it on exit code 75, and uploads its log to the bucket. Its state is in
~/launch/worker-SLICE-WORKER.json. The lead, which is worker 0 of slice 0, decides when the run has
ended, and deletes the queued resource once everything is in the bucket.

launch.tpu reads a line "RLHFJAX {…}", because the exit codes of gcloud and ssh do not tell how the
run ended.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

MARK = "RLHFJAX "
PREEMPTED = 75
INTERRUPTED = 130
RETRIES = 3  # of plain failures, while the checkpoint's step advances
SET_UP_FAILED = "set-up failed"
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

HOME = os.path.expanduser("~")
FOLDER = os.path.join(HOME, "launch")
CODE = os.path.join(HOME, "rlhfjax")
ARCHIVE = os.path.join(HOME, "rlhfjax.tar.gz")
DESCRIPTION = os.path.join(HOME, "rlhfjax.json")
INSTALLED = os.path.join(
    FOLDER, "installed"
)  # the hash of archive and set-up that is installed
UNPACKED = os.path.join(FOLDER, "unpacked.json")  # the names of the archive's files


def is_text(value):
    return isinstance(value, str)


def is_count(value):
    return type(value) is int and value >= 0


def is_process(value):
    return type(value) is int and value > 1  # signals to 0, 1 and -1 are for others


def is_number(value):
    return type(value) in (int, float) and 0 <= value < 1e12


# The fields of a status, and what each has to be.
STATUS = {
    "generation": is_text,
    "id": is_text,
    "run_id": is_text,
    "phase": is_text,
    "pid": is_process,
    "boot": is_text,
    "poll": is_number,
    "offset": is_count,
    "since": is_number,
}
# Those of a run that has ended, and those that some have.
ENDED = {"code": lambda code: type(code) is int, "why": is_text}
OTHERS = {"child": is_process, "slice": is_count, "worker": is_count}
DESCRIBED = ("generation", "archive", "installed", "setup", "command", "poll")


class Place:
    """A worker's numbers, and where its log and its status stand."""

    def __init__(self, slice_number, worker):
        self.slice, self.worker = slice_number, worker
        self.lead = (slice_number, worker) == (0, 0)
        name = os.path.join(FOLDER, f"worker-{slice_number}-{worker}")
        self.log, self.status, self.lock = name + ".log", name + ".json", name + ".lock"


def main(argv):
    verb, slice_number = argv[1], int(argv[2])
    os.makedirs(FOLDER, exist_ok=True)
    place = Place(slice_number, worker_number())
    if verb == "start":
        start(place, *argv[3:])
        return
    {"status": report, "follow": follow, "tail": tail, "stop": stop}[verb](place)


def worker_number():
    """The worker's number in its slice, by the TPU's metadata or the end of the host's name."""
    kept = os.path.join(FOLDER, "number")
    if os.path.exists(kept):
        with open(kept) as f:
            return int(f.read())
    words = ["curl", "-sf", "--retry", "5", "-H", "Metadata-Flavor: Google"]
    words.append(METADATA + "agent-worker-number")
    asked = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    text = (
        asked.stdout.strip()
        or (re.findall(r"-w-(\d+)$", os.uname().nodename) or [""])[0]
    )
    if not text.isdigit():
        sys.exit(
            "launch: neither the metadata nor the host's name say which worker this is"
        )
    write(kept, text)
    return int(text)


# ------------------------------------------------------------------ what the launcher asks for


def report(place):
    """Prints what is known of this worker, as one marked line."""
    status = read_status(place)
    status["alive"] = alive(status)
    status.update(slice=place.slice, worker=place.worker)
    print(MARK + json.dumps(status, sort_keys=True, allow_nan=False), flush=True)


def start(place, generation=None):
    """Starts a supervisor for the described run unless it has one; returns when the set-up is done.

    generation: of the start that is meant; nothing is done where its description did not arrive.
    """
    wanted = read_description()
    if not wanted or (generation and wanted["generation"] != generation):
        print("launch: the description of this start did not arrive")
        return
    with open(place.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = read_status(place)
        if not attended(place, status, wanted):
            if not installed(wanted) and sha256(ARCHIVE) != wanted["archive"]:
                print("launch: the archive did not arrive whole")
                return
            replace(status, wanted["poll"])
            launch(place, wanted, lock)
    status = read_status(place)
    while status.get("phase") == "setup" and alive(status):
        time.sleep(tick(wanted))
        status = read_status(place)
    if status.get("why") == SET_UP_FAILED:
        show_last(place, 20)
    report(place)


def attended(place, status, wanted):
    """Whether this start of the run has a supervisor, or needs none because it has ended.

    A lead that was lost after the end still has to delete the queued resource.
    """
    if status.get("generation") != wanted["generation"]:
        return False
    return alive(status) or (status["phase"] == "ended" and not place.lead)


def launch(place, wanted, lock):
    """Forks the supervisor, detached from the connection; returns once its status is written."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return
    os.setsid()
    os.close(reading)
    lock.close()
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        name = place.log if number else os.devnull
        opened = os.open(name, flags | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    try:
        supervisor = Supervisor(place, wanted)
        os.close(writing)
        supervisor.run()
    finally:
        os._exit(0)


def replace(status, poll):
    """Ends the supervisor of another start, with its command."""
    if not alive(status):
        return
    os.kill(status["pid"], signal.SIGTERM)
    for _ in range(100):
        if not alive(status):
            return
        time.sleep(min(0.2, poll))
    os.kill(status["pid"], signal.SIGKILL)


def stop(place):
    """SIGTERM to the command, on which a run saves and exits; it is not started again."""
    status = read_status(place)
    if alive(status):
        os.kill(status["pid"], signal.SIGUSR1)
    report(place)


def tail(place):
    """Prints the log's last 20 lines and reports."""
    show_last(place, 20)
    report(place)


def follow(place):
    """Prints the log as it grows, until the run or its supervisor has ended; then reports."""
    out = sys.stdout.buffer
    text, shown = read_log(place, 100)
    out.write(text)
    out.flush()
    running = True
    while running:
        status = read_status(place)
        running = alive(status) and status["phase"] != "ended"
        shown = pass_on(place.log, shown, out)
        if running:
            time.sleep(min(0.2, status.get("poll", 0.2)))
    if shown and not read_log(place, 1)[0].endswith(b"\n"):
        print()
    report(place)


def show_last(place, lines):
    """Prints the log's last lines, each with this worker's numbers."""
    text = read_log(place, lines)[0].decode(errors="replace")
    head = f"[{place.slice}.{place.worker}] "
    for line in text.splitlines():
        print(head + line, flush=True)


def pass_on(log, begin, out):
    """Writes what a log has from an offset on; returns the offset of its end."""
    with open(log, "rb") as f:
        f.seek(begin)
        text = f.read()
    out.write(text)
    out.flush()
    return begin + len(text)


def read_log(place, lines):
    """The last lines of this start's log, as bytes, and the offset of their end."""
    begin = read_status(place).get("offset", 0)
    with open(place.log, "ab+") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(begin, size - 65536))
        text = f.read(size)
        return b"".join(text.splitlines(True)[-lines:]), f.tell()


# ------------------------------------------------------------------ the supervisor


class Supervisor:
    """Takes the described run to its end on this worker."""

    def __init__(self, place, wanted):
        self.place, self.wanted = place, wanted
        before = read_status(place)
        same = before.get("generation") == wanted["generation"]
        self.before = before
        self.stopped = ""  # why the command is not started again
        self.told = 0.0  # when the command got SIGTERM
        self.child = None
        self.upload = None
        self.uploaded = time.time()
        self.status = {
            "generation": wanted["generation"],
            "id": wanted["id"],
            "run_id": wanted["run_id"],
            "phase": "setup",
            "pid": os.getpid(),
            "boot": boot(),
            "poll": wanted["poll"],
            "offset": before["offset"] if same else os.path.getsize(place.log),
            "since": before["since"] if same else time.time(),
        }
        signal.signal(signal.SIGTERM, lambda *_: self.stop("gone"))
        signal.signal(signal.SIGUSR1, lambda *_: self.stop("stopped"))
        self.note()

    def stop(self, why):
        if why == "gone" or not self.stopped:
            self.stopped = why

    def note(self, **what):
        """Keeps the status, in memory and in its file."""
        self.status.update(what)
        write(self.place.status, json.dumps(self.status, allow_nan=False) + "\n")

    def run(self):
        if (
            "ended" in self.before
            and self.before["generation"] == self.wanted["generation"]
        ):
            self.conclude(self.before["code"], self.before["why"])
            return
        code, why = self.set_up()
        if not code:
            self.note(phase="running")
            code, why = self.attend()
        if self.stopped == "gone":  # the machine is going down: the run has not ended
            self.note(phase="interrupted")
            self.save()
            return
        self.conclude(code, why)

    # -------------------------------------------------------------- set-up

    def set_up(self):
        """Unpacks and installs, unless this very archive and set-up are installed."""
        if installed(self.wanted):
            return 0, ""
        unpack()
        for attempt in range(3):
            code = self.call(self.wanted["setup"])
            if not code:
                write(INSTALLED, self.wanted["installed"])
                return 0, ""
            if self.stopped:
                return code, self.stopped
            say(f"the set-up ended with exit code {code}, attempt {attempt + 1} of 3")
            self.pause()
        return 1, SET_UP_FAILED

    # -------------------------------------------------------------- the command

    def attend(self):
        """Runs the command, again where it has to; returns the last exit code, and why it ended."""
        restarts = retries = 0
        step = self.newest_step() if self.place.lead else None
        while True:
            code = self.once()
            if self.stopped or code in (0, INTERRUPTED):
                return code, self.stopped
            if code == PREEMPTED or not self.place.lead:
                restarts += 1
                most = self.wanted["max_restarts"]
                if restarts > most:
                    return code, "started again --max_restarts times"
                why = self.decided_elsewhere()
                if why:
                    return code, why
                say(f"exit code {code}: start {restarts} of {most}")
            else:
                before, step = step, self.newest_step()
                retries += 1
                if (
                    step is None
                    or retries > RETRIES
                    or (before is not None and step <= before)
                ):
                    return code, ""
                say(f"exit code {code} at a later checkpoint, {step}: tried again")
            self.pause()

    def once(self):
        """Makes the machine ready and runs the command; its exit code, or 75 if it cannot start."""
        left_over(self.before)
        self.before = {}
        if self.call(self.wanted["prepare"]) and not self.stopped:
            say("the machine is not ready: see above; the command is not started")
            return PREEMPTED
        code = self.call("trap : TERM; " + self.wanted["command"] + "; exit $?")
        left_over(self.status)
        if code not in (0, PREEMPTED, INTERRUPTED) and self.call(self.wanted["check"]):
            say(f"exit code {code}, and the bucket's mount is lost")
            return PREEMPTED
        return code

    def call(self, text):
        """Runs a script in the code's folder, in a session of its own; returns its exit code."""
        if self.stopped:
            return PREEMPTED
        self.told = 0.0
        env = dict(
            os.environ, PATH=os.path.join(HOME, "venv/bin") + ":" + os.environ["PATH"]
        )
        os.makedirs(CODE, exist_ok=True)
        self.child = subprocess.Popen(
            ["bash", "-c", text],
            cwd=CODE,
            env=env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.note(child=self.child.pid)
        while self.child.poll() is None:
            self.tend()
            time.sleep(tick(self.wanted))
        code = self.child.returncode
        return code if code >= 0 else 128 - code

    def tend(self):
        """What has to be done while a command runs: signals, the time limit, the log's upload."""
        limit = self.wanted["max_run_duration"]
        if limit and time.time() > self.status["since"] + limit:
            self.stop("--max_run_duration is over")
        if self.stopped and not self.told:
            self.told = time.time()
            send(self.child.pid, signal.SIGTERM)
        grace = 20 * self.wanted["poll"]
        if self.told and time.time() > self.told + grace:
            send(self.child.pid, signal.SIGKILL)
        if time.time() > self.uploaded + 10 * self.wanted["poll"]:
            self.begin_upload()

    def pause(self):
        """Waits a little, not longer than until a signal comes."""
        end = time.time() + min(10.0, self.wanted["poll"])
        while not self.stopped and time.time() < end:
            time.sleep(tick(self.wanted))

    def newest_step(self):
        """The newest whole checkpoint under the workdir, as (stage, step); None without one."""
        workdir = self.wanted["workdir"]
        if not workdir:
            return None
        if workdir.startswith("gs://"):
            words = [
                "gcloud",
                "storage",
                "ls",
                workdir.rstrip("/") + "/**/commit_success.txt",
            ]
            names = ask(words).split()
        else:
            folder = os.path.join(CODE, workdir)
            names = glob.glob(folder + "/checkpoints/*") + glob.glob(
                folder + "/*/checkpoints/*"
            )
        whole = re.compile(r"([^/]+)/checkpoints/(\d+)(/commit_success.txt)?$")
        found = [m.groups() for m in map(whole.search, names) if m]
        return max(((stage, int(step)) for stage, step, _ in found), default=None)

    def decided_elsewhere(self):
        """Why the run is over by another worker's status in the bucket; "" where it is not."""
        if not self.wanted["logs"]:
            return ""
        for line in ask(
            ["gcloud", "storage", "cat", self.wanted["logs"] + "/*.json"]
        ).split("\n"):
            other = parse(line)
            over = other.get("phase") == "ended"
            over = over and other.get("generation") == self.wanted["generation"]
            if over and (other.get("lead") or other.get("why") == SET_UP_FAILED):
                return "another worker has ended: " + (
                    other["why"] or str(other["code"])
                )
        return ""

    # -------------------------------------------------------------- the end

    def conclude(self, code, why):
        """Writes the end down, uploads it, and lets the lead delete the queued resource."""
        self.note(
            phase="ended", code=code, why=why, ended=time.time(), lead=self.place.lead
        )
        say("the run ended with exit code {}{}".format(code, ": " + why if why else ""))
        saved = self.save()
        if not self.place.lead or self.wanted["linger"] < 0:
            return
        if not self.wanted["logs"]:
            say("no bucket has its log: the TPU is not deleted from here, and it costs")
            return
        wait = self.wait_after(code, why)
        say(f"the TPU is deleted in {wait:.0f} s")
        self.rest(wait)
        while not saved and self.stopped != "gone":
            say("not deleted before its log is in the bucket, and it costs")
            self.rest(self.wanted["poll"])
            saved = self.save()
        while self.stopped != "gone":
            say("gcloud is asked to delete the TPU; it costs while this line repeats")
            self.save()
            ask(self.wanted["delete"])
            self.rest(10 * self.wanted["poll"])

    def wait_after(self, code, why):
        """Seconds until the deletion; a finished run has only to be seen by its launcher."""
        if "max_run_duration" in why:
            return 0.0
        linger = self.wanted["linger"]
        return min(linger, 2 * self.wanted["poll"]) if code == 0 else linger

    def rest(self, seconds):
        """Waits, or until another start replaces this one."""
        self.stopped = ""
        end = time.time() + seconds
        while self.stopped != "gone" and time.time() < end:
            time.sleep(tick(self.wanted))

    # -------------------------------------------------------------- the log's upload

    def begin_upload(self):
        """Starts an upload of log and status, unless there is no bucket, or one is under way."""
        self.uploaded = time.time()
        if not self.wanted["logs"] or (self.upload and self.upload.poll() is None):
            return
        files = [self.place.log, self.place.status]
        words = [
            "timeout",
            "300",
            "gcloud",
            "storage",
            "cp",
            *files,
            self.wanted["logs"] + "/",
        ]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        self.upload = subprocess.Popen(words, stderr=subprocess.DEVNULL, **quiet)

    def save(self):
        """Uploads log and status; returns whether both are in the bucket."""
        if self.upload:  # it began before the log's last lines
            self.upload.wait()
        self.begin_upload()
        return bool(self.upload) and self.upload.wait() == 0


# ------------------------------------------------------------------ small things


def tick(wanted):
    return min(0.2, wanted["poll"])


def say(text):
    print("launch: " + text, flush=True)


def read_json(file):
    """A file's JSON; None where there is none."""
    try:
        with open(file, "rb") as f:
            return json.loads(f.read())
    except (OSError, ValueError, RecursionError):
        return None


def read_status(place):
    """A worker's status; {} where there is none, or a damaged one."""
    status = sound(read_json(place.status))
    return status if set(STATUS) <= set(status) else {}


def read_description():
    """The described run; {} where its description did not arrive whole."""
    wanted = read_json(DESCRIPTION)
    whole = isinstance(wanted, dict) and all(name in wanted for name in DESCRIBED)
    return wanted if whole else {}


def parse(line):
    """A line's status; {} where it is none."""
    try:
        return sound(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def sound(status):
    """The status; {} where a field of it is missing or has another type."""
    if not isinstance(status, dict):
        return {}
    both = {"generation", "phase"}
    needed = both if both & set(status) else set()
    if status.get("phase") == "ended" or "ended" in status:
        needed |= set(ENDED)
    kinds = dict(STATUS, **ENDED, **OTHERS)
    for name, kind in kinds.items():
        if name in status and not kind(status[name]):
            return {}
    return status if needed <= set(status) else {}


def write(file, text):
    """Writes a file whole or not at all."""
    with open(file + ".new", "w") as f:
        f.write(text)
    os.replace(file + ".new", file)


def ask(words):
    """The output of a command; "" where it fails."""
    quiet = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
    }
    try:
        return subprocess.run(words, text=True, timeout=300, **quiet).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def boot():
    """Changes when the machine starts again, after which numbers of processes mean others."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip()


def alive(status):
    """Whether the supervisor that wrote a status runs."""
    if "pid" not in status or status["boot"] != boot():
        return False
    try:
        with open("/proc/{}/cmdline".format(status["pid"]), "rb") as f:
            return b"rlhfjax_worker" in f.read()
    except OSError:
        return False


def send(session, number):
    """A signal to every process of a session's first group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def left_over(status):
    """Ends what is left of an earlier command, and whatever else holds the TPU."""
    if "child" in status and status["boot"] == boot():
        send(status["child"], signal.SIGKILL)
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    for link in glob.glob("/proc/[0-9]*/fd/*") if devices else ():
        try:
            held = os.readlink(link)
        except OSError:  # another user's process, or one that has ended
            continue
        if held.startswith(("/dev/accel", "/dev/vfio/")):
            os.kill(int(link.split("/")[2]), signal.SIGKILL)


def installed(wanted):
    if not os.path.exists(INSTALLED):
        return False
    with open(INSTALLED) as f:
        return f.read() == wanted["installed"]


def sha256(file):
    if not os.path.exists(file):
        return ""
    with open(file, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def unpack():
    """Unpacks the archive into ~/rlhfjax, and removes what only the one before had."""
    import tarfile

    os.makedirs(CODE, exist_ok=True)
    with tarfile.open(ARCHIVE) as tar:
        names = tar.getnames()
        tar.extractall(CODE)
    before = read_json(UNPACKED)
    for name in set(before if isinstance(before, list) else []) - set(names):
        file = os.path.join(CODE, name)
        if os.path.lexists(file):
            os.remove(file)
    write(UNPACKED, json.dumps(names, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv)
