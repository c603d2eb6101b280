"""launch.gke: its manifests against the schemas of Kubernetes and JobSet, and what it asks of kubectl."""

import json
import os
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from jsonschema.exceptions import ValidationError

from launch import gke
from launch.shell import launch

SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
KUBERNETES = ("1.29", "1.37")  # the oldest and newest that are looked at
COMMAND = ("rlhfjax", "run", "--config=experiments/quickstart/recipe.py", "--workdir=/bucket/runs/a")
PLAIN = gke.Job("a", "image:1", COMMAND, "v5e", "4x4")
FULL = gke.Job(
    name="a",
    image="image:1",
    command=COMMAND,
    chip="v5p",
    topology="4x4x4",
    slices=2,
    spot=True,
    bucket="b",
    service_account="trainer",
    env={"XLA_FLAGS": "--x=1"},
    secrets={"WANDB_API_KEY": "wandb:key", "HF_TOKEN": "hf"},
)


def validate(manifest: dict) -> None:
    """Raises for what the schemas of the JobSet, its job and its pod do not have, unknown fields included."""
    jsonschema.validate(manifest, SCHEMA)
    for replicated in manifest["spec"]["replicatedJobs"]:
        spec = replicated["template"]["spec"]
        pod = spec["template"]
        for version in KUBERNETES:
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
            kubernetes_validate.validate(job, version, strict=True)
            metadata = {"name": "x", **pod.get("metadata", {})}
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
            kubernetes_validate.validate(whole, version, strict=True)


@pytest.mark.parametrize("job", [PLAIN, FULL])
def test_manifests_are_valid(job):
    validate(gke.manifest(job))


BREAK = [
    ("spec.failurePolicy.rules.0.action", "Restart"),
    ("spec.replicatedJobs.0.replica", 1),
    ("spec.replicatedJobs.0.template.spec.parallel", 4),
    ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.action", 4),
    ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelectors", {}),
    ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.env.0.val", "x"),
    ("spec.replicatedJobs.0.template.spec.template.spec.volumes.0.csi.volumeAttributes", "b"),
]


@pytest.mark.parametrize(("path", "value"), BREAK, ids=[path for path, _ in BREAK])
def test_the_schemas_notice_a_mistake(path, value):
    manifest = gke.manifest(FULL)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = manifest
    for part in parents:
        node = node[part]
    node[last] = value
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        validate(manifest)


def test_a_slice_has_a_pod_a_host():
    """4x4x4 = 64 chips, 4 a host: 16 pods; each asks for its host's 4 chips."""
    spec = gke.manifest(FULL)["spec"]["replicatedJobs"][0]
    assert spec["replicas"] == 2
    assert spec["template"]["spec"]["parallelism"] == spec["template"]["spec"]["completions"] == 16
    pod = spec["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert gke.Job("a", "i", (), "v6e", "2x4", chips_per_host=8).hosts == 1
    with pytest.raises(ValueError, match="2 chips are no multiple of 4"):
        _ = gke.Job("a", "i", (), "v5e", "1x2").hosts


def test_pre_emption_restarts_without_limit_and_a_failure_ends_it():
    """Exit code 75 and an evicted pod fail their job by its pod failure policy, for which the JobSet has a rule."""
    spec = gke.manifest(PLAIN)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    exits, conditions = (
        [rule[key] for rule in job["podFailurePolicy"]["rules"] if key in rule]
        for key in ("onExitCodes", "onPodConditions")
    )
    assert exits == [{"operator": "In", "values": [75]}] and conditions[0][0]["type"] == "DisruptionTarget"
    assert all(rule["action"] == "FailJob" for rule in job["podFailurePolicy"]["rules"])
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] == 0


def test_a_secret_is_a_reference():
    env = gke.manifest(FULL)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
        "env"
    ]
    assert env == [
        {"name": "XLA_FLAGS", "value": "--x=1"},
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}}},
    ]


KUBECTL = """#!/bin/sh
echo "$*" >> $STANDIN/calls
case "$1" in
  apply) cat > $STANDIN/applied.json ;;
  logs) echo training; echo "$HF_TOKEN" ;;
  delete) rm $STANDIN/ended ;;
  get) n=$(grep -c '^get' $STANDIN/calls)
       [ $n = 1 ] && [ -e $STANDIN/ended ] && { cat $STANDIN/ended; exit; }
       [ $n = 1 ] || [ -e $STANDIN/gone ] && { echo 'Error (NotFound)' >&2; exit 1; }
       [ $n -ge 4 ] && cat $STANDIN/end ;;
esac
exit 0
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of a stand-in for kubectl, whose JobSet is not there at the first look and ends at the fourth."""
    (tmp_path / "bin").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "local-secret-value")
    (tmp_path / "end").write_text("Completed")
    return tmp_path


def call(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        launch("", gke._flags, gke.act, ["launch.gke", *args])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


RUN = ["--name=a", "--image=image:1", "--topology=4x4", "--poll=0", "--secret=HF_TOKEN=hf", "--", *COMMAND]


@pytest.mark.parametrize(("end", "code"), [("Completed", 0), ("Failed", 1)])
def test_a_job_is_followed_to_its_end_through_restarts(end, code, cluster, capsys):
    (cluster / "end").write_text(end)
    got, out, _ = call(capsys, "run", *RUN)
    assert got == code and out.endswith(f"a: {end}\n")
    assert [line.split()[0] for line in (cluster / "calls").read_text().splitlines()] == [
        "get", "apply", "get", "logs", "get", "logs", "get",
    ]  # fmt: skip
    applied = json.loads((cluster / "applied.json").read_text())
    validate(applied)
    assert "local-secret-value" not in out + json.dumps(applied) and "training\n***\n" in out


def test_a_job_that_has_ended_is_replaced(cluster, capsys):
    """A sweep starts its failed runs again: the end of the one before is not theirs."""
    (cluster / "ended").write_text("Failed")
    code, out, _ = call(capsys, "run", *RUN)
    assert code == 0 and out.startswith("+ kubectl delete jobset a --ignore-not-found\n")
    assert [line.split()[0] for line in (cluster / "calls").read_text().splitlines()][:3] == ["get", "delete", "apply"]


def test_a_deleted_job_is_not_waited_for(cluster, capsys):
    (cluster / "gone").touch()
    code, _, err = call(capsys, "run", *RUN)
    assert code == 1 and err == "launch: a: the JobSet was deleted before it ended\n"


def test_manifest_and_dry_run_print_what_would_be_applied(cluster, capsys):
    _, printed, _ = call(capsys, "manifest", *RUN)
    _, dry, _ = call(capsys, "run", "--dry_run", *RUN)
    assert not (cluster / "calls").exists()
    assert dry.startswith(printed) and "\nkubectl apply --filename=-\nkubectl logs --follow" in dry
    call(capsys, "run", *RUN)
    assert json.loads((cluster / "applied.json").read_text()) == json.loads(printed)


def test_a_topology_that_is_no_number_of_hosts(cluster, capsys):
    code, _, err = call(capsys, "run", "--name=a", "--image=i", "--topology=1x1", "--", "true")
    assert code == 2 and "1 chips are no multiple of 4 a host" in err and not (cluster / "calls").exists()
