"""Brings one run on a queued resource from any state to the end that a worker reports."""

import json
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from launch import shell as sh
from launch import tpu_gcloud as gcloud
from launch import tpu_worker as worker
from launch.shell import LaunchError, Shell
from launch.tpu_gcloud import Tpu
from launch.tpu_job import Job

TAKEN = ("SUSPENDED", "FAILED")  # of a request whose machines are not there any more
NODE_TAKEN = ("PREEMPTED", "TERMINATED", "gone")
NODE_STUCK = ("STOPPED", "HIDDEN", "UNKNOWN")  # somebody has to decide
LOOKS = 60  # in a row that say nothing, before the launcher leaves the run to its supervisors
SENT = ("rlhfjax.tar.gz", "rlhfjax.json", "rlhfjax_worker.py")

Worker = tuple[int, int]  # slice, worker
Report = dict[str, Any]  # what a worker says of itself: launch.tpu_worker.report
LEAD = (0, 0)


class End(NamedTuple):
    """How a run ended, by the lead's own word, and whether the queued resource is gone already."""

    code: int
    why: str = ""
    deleted: bool = False


class Look(NamedTuple):
    """What gcloud says of a request, of its nodes, and why it failed."""

    state: str | None
    nodes: dict[str, str]
    why: str = ""

    def ready(self) -> bool:
        return self.state == "ACTIVE" and set(self.nodes.values()) == {"READY"}

    def taken(self) -> bool:
        """Whether its machines were taken away, also while the request still says ACTIVE."""
        return self.state in TAKEN or bool(set(NODE_TAKEN) & set(self.nodes.values()))

    def text(self) -> str:
        odd = [
            f"{node} is {state}"
            for node, state in self.nodes.items()
            if state != "READY"
        ]
        return "; ".join([str(self.state or "gone"), *odd])


class Runner:
    """Takes one job through lost connections, reboots and pre-emptions to its end."""

    def __init__(self, shell: Shell, tpu: Tpu, job: Job, poll: float):
        self.shell, self.tpu, self.job, self.poll = shell, tpu, job, poll
        self.workers: dict[str, int] = {}  # of each node
        self.folder = os.path.join(
            tempfile.gettempdir(), f"rlhfjax-{os.getuid()}-{tpu.name}"
        )
        self.archive = ""  # its hash
        self.generation = ""  # of the start that is followed
        self.fresh = False  # created here, and not yet active
        self.restarts = self.unknown = 0

    def finish(self) -> End:
        """Creates the queued resource, starts the command, and follows it to its end.

        Raises:
          LaunchError: the end is unknown, and looking again does not tell; nothing was deleted.
        """
        os.makedirs(self.folder, exist_ok=True)
        self.archive = sh.pack(self.shell, self._file(SENT[0]))
        if self.shell.dry_run:
            self._show()
            return End(code=0)
        end = None
        while end is None:
            look = self.settle()
            if look.ready():
                end = self.attend()
                continue
            end = self.recorded_end(look)
            if end is None and look.state is None:
                self.create()
            elif end is None:
                self.recreate(look)
        return end

    def say(self, text: str) -> None:
        self.shell.say(f"{self.tpu.name}: {text}")

    def _error(self, text: str) -> LaunchError:
        return LaunchError(f"{self.tpu.name}: {text}")

    # -------------------------------------------------------------- states

    def look(self) -> Look:
        """Asks for the request's state and, where it is ACTIVE, for that of every node."""
        text = self.shell.ask(gcloud.describe(self.tpu), "NOT_FOUND", self.poll)
        if text is None:
            return Look(state=None, nodes={})
        about = sh.field(sh.parsed(text, "gcloud"), "state", dict, "gcloud")
        state = sh.field(about, "state", str, "gcloud")
        failed = about.get("failedData", {}).get("error", {})
        nodes = self.tpu.nodes if state == "ACTIVE" else []
        return Look(
            state=state,
            nodes={node: self._node(node) for node in nodes},
            why=failed.get("message", "no reason is given"),
        )

    def _node(self, node: str) -> str:
        """A node's state; its number of workers is kept."""
        text = self.shell.ask(
            gcloud.describe_node(self.tpu, node), "NOT_FOUND", self.poll
        )
        if text is None:
            return "gone"
        about = sh.parsed(text, "gcloud")
        networks = max(1, len(about.get("networkConfigs", [])))
        self.workers[node] = max(1, len(about.get("networkEndpoints", [])) // networks)
        return sh.field(about, "state", str, "gcloud")

    def settle(self) -> Look:
        """Waits until the machines are ready, taken away, or not there; hours, without capacity."""
        before = ""
        while True:
            look = self.look()
            if look.ready() or look.taken() or look.state is None:
                return look
            if stuck := set(NODE_STUCK) & set(look.nodes.values()):
                raise self._error(f"a node is {min(stuck)}; {look.text()}")
            if look.text() != before:
                self.say(look.text())
            before = look.text()
            time.sleep(self.poll)

    def recorded_end(self, look: Look) -> End | None:
        """The end of a run whose machines are gone, as the lead's status in the bucket has it.

        That is the run which is followed; or, when the launcher begins, this run if it finished.
        """
        record = self._record()
        if record.get("phase") != "ended":
            return None
        begun = self.generation or self.fresh
        finished = self._same(record) and record["code"] == 0
        if record["generation"] != self.generation and (begun or not finished):
            return None
        self.say(
            f"{self.job.logs}/worker-0-0.json tells how its run ended; nothing is created"
        )
        if look.state is not None:
            self.remove()
        return End(code=record["code"], why=record["why"], deleted=True)

    def create(self) -> None:
        """Creates the queued resource.

        Raises:
          LaunchError: it was there a moment ago, and nothing tells how its run ended.
        """
        if self.generation or self.fresh:
            raise self._error(
                "the request was deleted, and nothing tells how its run ended"
            )
        self._create()

    def recreate(self, look: Look) -> None:
        """Deletes a request whose machines were taken away, and makes it again.

        Raises:
          LaunchError: that has happened too often, or the request itself cannot be met.
        """
        if look.state == "FAILED" and self.fresh:
            raise self._error(f"FAILED before it was active: {look.why}")
        self.restarts += bool(self.fresh or self.generation)
        most = self.job.max_restarts
        if self.restarts > most:
            raise self._error(
                f"preempted more than --max_restarts={most} times; its state is saved",
            )
        count = f"restart {self.restarts} of {most}"
        self.say(f"its machines were taken away ({look.text()}); {count}")
        self.shell.must(gcloud.delete(self.tpu))
        self._create()

    def _create(self) -> None:
        self.shell.must(gcloud.create(self.tpu))
        self.fresh, self.generation = True, ""

    def _record(self) -> Report:
        """The lead's last status that reached the bucket."""
        if not self.job.logs:
            return {}
        file = f"{self.job.logs}/worker-0-0.json"
        return worker.parse(self.shell.peek(["gcloud", "storage", "cat", file]) or "")

    def _same(self, report: Report) -> bool:
        return report.get("id") == self.job.id(self.archive)

    # -------------------------------------------------------------- the run

    def attend(self) -> End | None:
        """Starts the command wherever it does not run, and follows it to its end.

        None: the end is unknown.
        """
        self.fresh = False
        reports = self.ask_all("status")
        if self.wait_for_another(reports):
            return None
        end = self.known_end(reports)
        if end is None and self.start(reports):
            end = self.set_up_failure(reports) or self.follow()
        if end is not None:
            return end
        self.unknown = 0 if self._started(reports.get(LEAD, {})) else self.unknown + 1
        if self.unknown == LOOKS:
            raise self._error(f"worker 0 did not answer in {LOOKS} looks")
        self.say("whether its run has ended is unknown: look again")
        time.sleep(self.poll)
        return None

    def wait_for_another(self, reports: dict[Worker, Report]) -> bool:
        """Whether another command ran there; it is followed to its end first."""
        lead = reports.get(LEAD, {})
        if not _running(lead) or lead.get("run_id") == self.job.run_id:
            return False
        self.say("another command runs there; this one waits for its end")
        self.follow()
        time.sleep(self.poll)
        return True

    def known_end(self, reports: dict[Worker, Report]) -> End | None:
        """The end of the run that is followed, or of this very run at an earlier time."""
        lead = reports.get(LEAD, {})
        if lead.get("phase") != "ended":
            return None
        if lead["generation"] == self.generation or (
            self._same(lead) and lead["code"] == 0
        ):
            return End(code=lead["code"], why=lead["why"])
        return None

    def start(self, reports: dict[Worker, Report]) -> bool:
        """Sends and starts the run on every worker that lacks it; whether all have it.

        What the workers answer is added to the reports.
        """
        lead = reports.get(LEAD, {})
        running = _running(lead)
        if running and not self._same(lead):
            self.generation = lead["generation"]
            self.say(
                "other code runs there and is followed; `stop` it to start this one"
            )
            return True
        if running or (self._same(lead) and lead["phase"] != "ended"):
            self.generation = lead["generation"]
        elif (
            lead.get("generation") == self.generation
        ):  # it was lost, and had other code
            self.generation = ""
        self.generation = self.generation or secrets.token_hex(4)
        lacking = {number[0] for number in self._silent(reports)}
        self._side_by_side(self._send, sorted(lacking))
        reports |= self.ask_all("start", sorted(lacking))
        silent = self._silent(reports)
        if silent:
            numbers = ", ".join(f"{node}.{number}" for node, number in silent)
            self.say(f"the run is not started on worker {numbers}")
        return not silent

    def set_up_failure(self, reports: dict[Worker, Report]) -> End | None:
        """Stops the run where a worker could not be set up."""
        failed = [
            f"{r['slice']}.{r['worker']}" for r in reports.values() if _not_set_up(r)
        ]
        if not failed:
            return None
        self.ask_all("stop")
        return End(
            code=1, why=f"{worker.SET_UP_FAILED} on worker {', '.join(sorted(failed))}"
        )

    def follow(self) -> End | None:
        """Shows the lead's log until the run ends; None where the connection ended before."""
        reports = self.ask_all("follow", [0], number="0")
        return self.known_end(reports)

    def ask_all(
        self,
        verb: str,
        slices: Sequence[int] | None = None,
        number: str = "all",
    ) -> dict[Worker, Report]:
        """Runs a verb of launch/tpu_worker.py on workers, slices side by side; what they report.

        gcloud's exit code is not looked at: it is 1 for troubles of its own as well.
        """
        reports: dict[Worker, Report] = {}

        def keep(line: str) -> bool:
            if not line.startswith(worker.MARK):
                return False
            report = worker.parse(line.removeprefix(worker.MARK))
            if not {"slice", "worker"} <= set(report):
                return False
            reports[report["slice"], report["worker"]] = report
            return True

        def ask(i: int) -> None:
            script = worker_script(verb, i, self.generation if verb == "start" else "")
            self.shell.run(
                gcloud.ssh(self.tpu, self.tpu.nodes[i], script, number), keep=keep
            )

        self._side_by_side(ask, range(self.tpu.slices) if slices is None else slices)
        return reports

    def _send(self, i: int) -> None:
        """Copies archive, description and supervisor to the workers of a slice."""
        folder = self._file(str(i))
        os.makedirs(folder, exist_ok=True)
        description = self.job.description(
            archive=self.archive,
            generation=self.generation,
            slice_number=i,
            delete=gcloud.delete(self.tpu),
            poll=self.poll,
        )
        files = [
            self._file(SENT[0]),
            os.path.join(folder, SENT[1]),
            os.path.join(folder, SENT[2]),
        ]
        if not self.shell.dry_run:
            worker.write(files[1], json.dumps(description, allow_nan=False))
            shutil.copy(worker.__file__, files[2])
        self.shell.run(gcloud.copy(self.tpu, self.tpu.nodes[i], files))

    def _silent(self, reports: dict[Worker, Report]) -> list[Worker]:
        """The workers that do not report this start of the run."""
        silent = []
        for i, node in enumerate(self.tpu.nodes):
            everyone = [(i, number) for number in range(self.workers.get(node, 1))]
            silent += [
                worker
                for worker in everyone
                if not self._started(reports.get(worker, {}))
            ]
        return silent

    def _started(self, report: Report) -> bool:
        ours = report.get("generation") == self.generation
        return ours and (report.get("alive") or report["phase"] == "ended")

    def _side_by_side(self, act: Callable[[int], None], slices: Sequence[int]) -> None:
        """Calls `act` for several slices at once; in a dry run in turn."""
        if self.shell.dry_run or len(slices) < 2:
            for i in slices:
                act(i)
            return
        with ThreadPoolExecutor(len(slices)) as pool:
            list(pool.map(act, slices))

    def _file(self, name: str) -> str:
        return os.path.join(self.folder, name)

    # -------------------------------------------------------------- after the end

    def remove(self) -> None:
        """Deletes the queued resource, which the lead may be deleting too."""
        code = self.shell.run(gcloud.delete(self.tpu))
        if code and self.look().state not in (None, "DELETING"):
            raise self._error("it could not be deleted; gcloud's output is above")

    def _show(self) -> None:
        """What `finish` runs where nothing is there and nothing goes wrong."""
        self.shell.show(gcloud.create(self.tpu))
        asked = [("ACTIVE", gcloud.describe(self.tpu))]
        asked += [
            ("READY", gcloud.describe_node(self.tpu, node)) for node in self.tpu.nodes
        ]
        for state, words in asked:
            self.shell.say(f"# until it is {state}: {shlex.join(words)}")
        self.generation = "START"
        self.ask_all("status")
        self._side_by_side(self._send, range(self.tpu.slices))
        self.ask_all("start")
        self.ask_all("follow", [0], number="0")


def worker_script(verb: str, slice_number: int, generation: str = "") -> str:
    """Runs launch/tpu_worker.py on a worker that has it."""
    words = f"python3 {SENT[2]} {verb} {slice_number} {generation}".rstrip()
    return f"test ! -e {SENT[2]} || {words}"


def _running(report: Report) -> bool:
    return bool(report.get("alive")) and report.get("phase", "ended") != "ended"


def _not_set_up(report: Report) -> bool:
    return report.get("phase") == "ended" and report["why"] == worker.SET_UP_FAILED
