"""Readers of what other programs answer: compilers, clouds and clusters."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from launch import gke, tpu_run, tpu_worker
from launch.shell import LaunchError
from launch.tpu_gcloud import Tpu
from launch.tpu_job import Job
from rlhfjax.evals import text as surface
from rlhfjax.plan import compiler, hlo
from rlhfjax.plan.hlo_cost import module_cost
from rlhfjax.rewards import tasks
from rlhfjax.sweep import queued
from tests.fuzz.inputs import json_bytes, text_bytes
from tests.fuzz.readers.table import Reader, Table, Trial, dumped, text_reader
from tests.plan.test_plan_hlo import TEXT

TABLE: Table = {}

# ------------------------------------------------------------------ the compiler

PIECES = (
    *("%p0", "%x = ", "f32[", "f32[8,8]", "s32[]", "(", ")", "{", "}", "parameter(0)"),
    *(
        "constant(3)",
        "dot(",
        "fusion(%w), calls=%sliced",
        "while(%a)",
        "ROOT ",
        "ENTRY ",
    ),
    *("convolution(%x, %w), window={size=1x2}, dim_labels=b0f_0io->b0f", "index=9"),
    *("get-tuple-element(%arg), index=7", "all-reduce(%y)", "replica_groups={{0}}"),
    *("call(%x), to_apply=%body", "conditional(%x)", "body=%body", "condition=%body"),
    *("dynamic-update-slice(%x)", "lhs_contracting_dims={9}", "f32[99999999999,9]"),
    *("known_trip_count={n:" + "9" * 5000 + "}", "copy(%x)", "tuple()", "send(%r)"),
)


def _program(text: str) -> None:
    module = hlo.Module(text)
    module.buffers()
    module.buffers([("loop{2}", 1.0), ("q{}", 2.0)])
    module_cost(module)


ASSIGNMENT = "allocation 0: size 48, color 1, page 0, parameter 0:\n"
RANGES = "0 (peak):\n x: 16 bytes\nStack trace\n"


def _assignment(text: str) -> None:
    compiler._memory(text)
    compiler._live_at_peak(text)


text_reader(TABLE, "hlo", [TEXT], PIECES, _program)
text_reader(
    TABLE,
    "buffer_assignment",
    [ASSIGNMENT + RANGES],
    (
        "allocation ",
        "size ",
        "color ",
        "(peak):",
        " bytes",
        "maybe-live-out",
        "9" * 5000,
    ),
    _assignment,
)

# ------------------------------------------------------------------ clouds


def _runner(answer: Callable[[], str]) -> tpu_run.Runner:
    shell = mock.Mock(dry_run=False)
    shell.ask = lambda *words: answer()
    shell.peek = lambda words: answer()
    tpu = Tpu("x", "zone")
    job = mock.Mock(spec=Job, logs="gs://b/logs", run_id="r")
    job.id = lambda archive: "id"
    return tpu_run.Runner(shell, tpu, job, poll=0.0)


def _described(content: bytes) -> None:
    """What gcloud says of a request, and of its node."""
    text = content.decode("utf-8", "replace")
    answers = iter((text, '{"state": "READY"}'))
    _looked(_runner(lambda: next(answers)))


def _described_node(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    answers = iter(('{"state": {"state": "ACTIVE"}}', text))
    _looked(_runner(lambda: next(answers)))


def _looked(runner: tpu_run.Runner) -> None:
    look = runner.look()
    look.text()
    look.ready()
    look.taken()


def _recorded(content: bytes) -> None:
    runner = _runner(lambda: content.decode("utf-8", "replace"))
    look = tpu_run.Look("SUSPENDED", {})
    runner.remove = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    for runner.generation in ("", "g"):
        runner.recorded_end(look)


def _reports(content: bytes) -> None:
    """What workers print while they are asked for their status."""
    runner = _runner(lambda: "")
    printed = tpu_worker.MARK + content.decode("utf-8", "replace").replace("\n", " ")
    runner.shell.run = lambda words, keep: keep(printed)
    runner.generation = "g"
    reports = runner.ask_all("status")
    runner.known_end(reports)
    runner.set_up_failure(reports)
    runner._silent(reports)
    runner.wait_for_another(reports) if "run_id" not in printed else None


def _states(content: bytes) -> None:
    shell = mock.Mock()
    shell.ask = lambda *words: content.decode("utf-8", "replace")
    gke.states(shell, gke.Cluster(), ["a", "b"], 0.0)


def _queue(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    done = types.SimpleNamespace(returncode=0, stdout=text, stderr="")
    with mock.patch.object(queued.subprocess, "run", return_value=done):
        found, _ = queued._ask(["states"], ["a", "b"])
    for job in ("a", "b"):
        queued.CODES.get(found.get(job, ""))


REPORT = {
    "slice": 0,
    "worker": 0,
    "phase": "ended",
    "code": 0,
    "why": "",
    "generation": "g",
    "alive": True,
    "id": "id",
    "run_id": "r",
    "lead": True,
}
JOB = {"metadata": {"name": "a"}, "spec": {"suspend": False}, "status": {}}
ANSWERS: dict[str, tuple[Callable[[bytes], None], list[Any]]] = {
    "tpu_request": (
        _described,
        [
            {"state": {"state": "ACTIVE"}},
            {"state": {"state": "FAILED", "failedData": {"error": {"message": "x"}}}},
        ],
    ),
    "tpu_node": (
        _described_node,
        [{"state": "READY", "networkEndpoints": [{}], "networkConfigs": [{}]}],
    ),
    "tpu_record": (_recorded, [REPORT, {"phase": "running"}]),
    "tpu_report": (_reports, [REPORT]),
    "gke_states": (_states, [JOB, {"kind": "List", "items": [JOB]}]),
    "queue_states": (_queue, [{"a": "Completed", "b": "Running"}]),
}


def _answer(name: str) -> Callable[[Path], Trial]:
    def make(folder: Path) -> Trial:
        call, values = ANSWERS[name]
        seeds = dumped(*values)
        return Trial(seeds, json_bytes(seeds), call)

    return make


for _name in ANSWERS:
    TABLE[_name] = Reader(_answer(_name), 150, (LaunchError,))


def _status(folder: Path) -> Trial:
    """A worker's own status."""
    file = folder / "status.json"
    place = types.SimpleNamespace(status=str(file))

    def call(content: bytes) -> None:
        file.write_bytes(content)
        status = tpu_worker.read_status(place)
        tpu_worker.alive(status)
        status.get("offset", 0)
        tpu_worker.parse(content.decode("utf-8", "replace")).get("phase")

    seeds = dumped({"pid": 1, "boot": "x", "phase": "running", "offset": 0})
    return Trial(seeds, json_bytes(seeds), call)


TABLE["tpu_status"] = Reader(_status, 150, (LaunchError,))

# ------------------------------------------------------------------ responses


def _responses(content: bytes) -> None:
    """Texts as a model samples them."""
    text = content.decode("utf-8", "replace")
    surface.describe([text, "", text * 2])
    tasks.extract(text)
    json.dumps(surface.words(text))


def _sampled(folder: Path) -> Trial:
    seeds = ["The cat's 12 mats. <answer>3</answer> 猫が好き", "a"]
    parts = ("<answer>", "</answer>", "'", "猫", "_", "<answer></answer>")
    return Trial([s.encode() for s in seeds], text_bytes(seeds, parts), _responses)


TABLE["responses"] = Reader(_sampled, 100)
