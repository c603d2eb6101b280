"""launch.gke: its manifests against the schemas of Kubernetes and JobSet, and what it asks of
kubectl.
"""

import dataclasses
import json
import os
import re
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from jsonschema.exceptions import ValidationError

from launch import gke
from launch import gke_manifest as manifests
from launch.shell import launch

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "jobset.schema.json").read_text())
KUEUE = json.loads((HERE / "kueue.schema.json").read_text())
KUBERNETES = ("1.29", "1.37")  # the oldest and newest that are looked at
COMMAND = (
    "rlhfjax",
    "run",
    "--config=experiments/quickstart/recipe.py",
    "--workdir=gs://b/runs/a",
)
PLAIN = manifests.Job("a", "image:1", COMMAND, "v5e", "4x4")
FULL = manifests.Job(
    name="a",
    image="image:1",
    command=COMMAND,
    chip="v5p",
    topology="4x4x4",
    slices=2,
    spot=True,
    bucket="b",
    service_account="trainer",
    queue="tpu",
    priority="high",
    privileged=True,
    env={"XLA_FLAGS": "--x=1"},
    secrets={"WANDB_API_KEY": "wandb:key", "HF_TOKEN": "hf"},
)


def validate(manifest: dict) -> None:
    """Raises for what the schemas of the JobSet, its job and its pod do not have, unknown fields
    included.
    """
    jsonschema.validate(manifest, SCHEMA)
    for replicated in manifest["spec"]["replicatedJobs"]:
        spec = replicated["template"]["spec"]
        pod = spec["template"]
        for version in KUBERNETES:
            job = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "x"},
                "spec": spec,
            }
            kubernetes_validate.validate(job, version, strict=True)
            metadata = {"name": "x", **pod.get("metadata", {})}
            whole = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": metadata,
                "spec": pod["spec"],
            }
            kubernetes_validate.validate(whole, version, strict=True)


@pytest.mark.parametrize("job", [PLAIN, FULL])
def test_manifests_are_valid(job):
    validate(manifests.manifest(job))


BREAK = [
    ("spec.failurePolicy.rules.0.action", "Restart"),
    ("spec.replicatedJobs.0.replica", 1),
    ("spec.replicatedJobs.0.template.spec.parallel", 4),
    ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.action", 4),
    ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelectors", {}),
    ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.env.0.val", "x"),
    (
        "spec.replicatedJobs.0.template.spec.template.spec.volumes.0.csi.volumeAttributes",
        "b",
    ),
]


@pytest.mark.parametrize(("path", "value"), BREAK, ids=[path for path, _ in BREAK])
def test_the_schemas_notice_a_mistake(path, value):
    manifest = manifests.manifest(FULL)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = manifest
    for part in parents:
        node = node[part]
    node[last] = value
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        validate(manifest)


def test_a_slice_has_one_pod_per_host():
    """4x4x4 = 64 chips, 4 a host: 16 pods; each asks for its host's 4 chips."""
    spec = manifests.manifest(FULL)["spec"]["replicatedJobs"][0]
    assert spec["replicas"] == 2
    assert (
        spec["template"]["spec"]["parallelism"]
        == spec["template"]["spec"]["completions"]
        == 16
    )
    pod = spec["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert manifests.Job("a", "i", (), "v6e", "2x4", chips_per_host=8).hosts == 1
    with pytest.raises(ValueError, match="2 chips are no multiple of 4"):
        _ = manifests.Job("a", "i", (), "v5e", "1x2").hosts


def test_preemption_restarts_without_limit_and_a_failure_ends_it():
    """Exit code 75 and an evicted pod fail their job by its pod failure policy, for which the
    JobSet has a rule.
    """
    spec = manifests.manifest(PLAIN)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    exits, conditions = (
        [rule[key] for rule in job["podFailurePolicy"]["rules"] if key in rule]
        for key in ("onExitCodes", "onPodConditions")
    )
    assert (
        exits == [{"operator": "In", "values": [75]}]
        and conditions[0][0]["type"] == "DisruptionTarget"
    )
    assert all(rule["action"] == "FailJob" for rule in job["podFailurePolicy"]["rules"])
    assert (
        job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    )
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule[
        "onJobFailureReasons"
    ] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] == 0


def test_kubernetes_expands_nothing_in_a_command():
    """It would take $(HOME) for the variable, and $$ for $."""
    words = ("rlhfjax", "--config.x=$(HOME) $$5 $y")
    job = dataclasses.replace(PLAIN, command=words, env={"A": "$(B)"})
    (slices,) = manifests.manifest(job)["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["rlhfjax", "--config.x=$$(HOME) $$$$5 $$y"]
    assert {"name": "A", "value": "$$(B)"} in container["env"]


def test_a_secret_is_a_reference():
    env = manifests.manifest(FULL)["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]["spec"]["containers"][0]["env"]
    assert env == [
        {"name": "RLHFJAX_JOIN", "value": "1"},
        {"name": "XLA_FLAGS", "value": "--x=1"},
        {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}},
        },
        {
            "name": "HF_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}},
        },
    ]


def test_kueue_admits_all_pods_together():
    """The queue and the priority are labels of the JobSet.

    Without a queue Kueue leaves the job alone.
    """
    labels = manifests.manifest(FULL)["metadata"]["labels"]
    assert labels == {
        "kueue.x-k8s.io/queue-name": "tpu",
        "kueue.x-k8s.io/priority-class": "high",
    }
    assert "labels" not in manifests.manifest(PLAIN)["metadata"]


def container(job: manifests.Job) -> dict:
    replicated = manifests.manifest(job)["spec"]["replicatedJobs"][0]
    return replicated["template"]["spec"]["template"]["spec"]["containers"][0]


def test_a_container_is_privileged_only_where_that_is_asked_for():
    """Autopilot clusters refuse privileged pods, and run TPUs."""
    assert "securityContext" not in container(PLAIN)
    assert container(FULL)["securityContext"] == {"privileged": True}


@pytest.mark.parametrize("spot", [False, True])
def test_queues_are_valid_and_hold_their_quota(spot):
    flavor, cluster_queue, local_queue = manifests.queues(
        "tpu", "v6e", "4x4", 64, "research", spot
    )
    for item in (flavor, cluster_queue, local_queue):
        jsonschema.validate(item, KUEUE[item["kind"]])
    labels = flavor["spec"]["nodeLabels"]
    assert labels["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    assert ("cloud.google.com/gke-spot" in labels) == spot
    (flavors,) = cluster_queue["spec"]["resourceGroups"][0]["flavors"]
    assert flavors == {
        "name": "tpu",
        "resources": [{"name": "google.com/tpu", "nominalQuota": 64}],
    }
    assert local_queue["metadata"] == {"name": "tpu", "namespace": "research"}
    broken = json.loads(json.dumps(cluster_queue))
    broken["spec"]["resourceGroups"][0]["flavours"] = []
    with pytest.raises(ValidationError):
        jsonschema.validate(broken, KUEUE["ClusterQueue"])


def test_several_slices_of_one_host_are_refused():
    """GKE joins multi-host slices alone: the pods of such a job would never find each other."""
    manifests.validate(FULL)
    with pytest.raises(
        ValueError,
        match="--slices=2 of --topology=2x2: GKE joins slices of several hosts alone",
    ):
        manifests.validate(manifests.Job("a", "i", (), "v5e", "2x2", slices=2))


def test_a_pool_is_scaled_from_zero_and_is_deleted_by_its_last_line():
    job = manifests.Job("tpu", "", (), "v5e", "4x4", spot=True)
    create, delete = manifests.pool_commands(
        job, ["--cluster=c", "--region=r-1"], "r-1-a", "p"
    )
    assert create == [
        *(
            "gcloud",
            "container",
            "node-pools",
            "create",
            "tpu-0",
            "--cluster=c",
            "--region=r-1",
        ),
        *(
            "--node-locations=r-1-a",
            "--machine-type=ct5lp-hightpu-4t",
            "--enable-autoscaling",
        ),
        *(
            "--num-nodes=0",
            "--max-nodes=4",
            "--tpu-topology=4x4",
            "--spot",
            "--project=p",
        ),
    ]
    assert delete[:6] == [
        "gcloud",
        "container",
        "node-pools",
        "delete",
        "tpu-0",
        "--cluster=c",
    ]


def test_a_pool_of_tpu7x_has_a_placement_policy_in_the_place_of_a_topology():
    job = manifests.Job("tpu", "", (), "tpu7x", "4x4x4")
    policy, create, _ = manifests.pool_commands(
        job, ["--cluster=c", "--region=r-1"], "r-1-a", None
    )
    assert (
        policy[4:6] == ["workload-policy", "tpu-policy"]
        and "--accelerator-topology=4x4x4" in policy
    )
    assert "--placement-policy=tpu-policy" in create and not any(
        "tpu-topology" in word for word in create
    )


def test_a_host_has_the_chips_of_a_machine_type():
    with pytest.raises(
        ValueError, match="--chips_per_host=2: a host of v5e has 1, 4, 8 chips"
    ):
        manifests.pool_commands(
            manifests.Job("a", "", (), "v5e", "4x4", chips_per_host=2), [], "z", None
        )


KUBECTL = """#!/bin/sh
# A JobSet that is not there at the first look and ends after two looks at its logs.
echo "$*" >> $STANDIN/calls
while [ "${1#--}" != "$1" ]; do shift; done
case "$1 $2" in
  apply*) cat > $STANDIN/applied.json ;;
  logs*) echo training; echo "$HF_TOKEN"; echo x >> $STANDIN/looks ;;
  delete*) rm -f $STANDIN/ended ;;
  'get deployment')
    [ -e $STANDIN/jobset ] || { echo 'Error (NotFound)' >&2; exit 1; }
    cat $STANDIN/jobset ;;
  'get jobset')
    if [ -e $STANDIN/states.json ]; then cat $STANDIN/states.json
    elif [ -e $STANDIN/ended ]; then cat $STANDIN/ended
    elif [ ! -e $STANDIN/applied.json ] || [ -e $STANDIN/gone ]; then
      echo 'Error (NotFound)' >&2; exit 1
    elif [ "$(cat $STANDIN/looks 2>/dev/null | wc -l)" -ge 2 ]; then cat $STANDIN/end
    fi ;;
esac
exit 0
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of a stand-in for kubectl."""
    (tmp_path / "bin").mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "local-secret-value")
    (tmp_path / "end").write_text("Completed")
    (tmp_path / "jobset").write_text("registry/jobset/jobset:v0.8.0")
    return tmp_path


def call(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        launch("", gke._flags, gke.act, ["launch.gke", *args])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def calls(cluster: Path) -> list[str]:
    """The verbs that kubectl was asked, with what `get` was asked for."""
    path = cluster / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    words = [
        [word for word in line.split() if not word.startswith("--")] for line in lines
    ]
    return [" ".join(line[:2]) if line[0] == "get" else line[0] for line in words]


HEAD = [
    "--name=a",
    "--image=image:1",
    "--topology=4x4",
    "--poll=0",
    "--secret=HF_TOKEN=hf",
]
RUN = [*HEAD, "--nocheck", "--", *COMMAND]


@pytest.mark.parametrize(("end", "code"), [("Completed", 0), ("Failed", 1)])
def test_a_job_is_followed_to_its_end_through_restarts(end, code, cluster, capsys):
    (cluster / "end").write_text(end)
    got, out, _ = call(capsys, "run", *RUN)
    assert got == code and f"a: {end}\n" in out
    assert ("in Cloud Logging: " in out) == (end == "Failed")
    looks = ["get jobset", "logs", "get jobset", "logs", "get jobset"]
    assert calls(cluster) == ["get deployment", "get jobset", "apply", *looks]
    applied = json.loads((cluster / "applied.json").read_text())
    validate(applied)
    assert (
        "local-secret-value" not in out + json.dumps(applied)
        and "training\n***\n" in out
    )


def test_runs_in_a_bucket_share_what_they_compile(cluster, capsys):
    """All runs of a sweep, and a run after its preemption; a value that is given stands."""
    own = "--env=JAX_COMPILATION_CACHE_DIR=gs://b/mine"
    for flags, expected in (([], "gs://b/cache"), ([own], "gs://b/mine")):
        _, printed, _ = call(capsys, "manifest", *HEAD, *flags, "--", *COMMAND)
        pod = json.loads(printed)["spec"]["replicatedJobs"][0]["template"]["spec"][
            "template"
        ]["spec"]
        values = {
            variable["name"]: variable.get("value")
            for variable in pod["containers"][0]["env"]
        }
        assert values["JAX_COMPILATION_CACHE_DIR"] == expected
    _, printed, _ = call(
        capsys, "manifest", *HEAD, "--", "rlhfjax", "run", "--workdir=/bucket/a"
    )
    assert "JAX_COMPILATION_CACHE_DIR" not in printed


def test_a_config_that_cannot_run_creates_no_job(cluster, capsys):
    command = [
        "rlhfjax",
        "run",
        "--config=experiments/quickstart/recipe.py",
        "--config.ppo.clipp=1",
    ]
    code, _, err = call(
        capsys, "submit", *HEAD, "--", *command, "--workdir=gs://b/runs/a"
    )
    assert (
        code == 1
        and "clip" in err
        and err.endswith("nothing was created\n")
        and calls(cluster) == []
    )


def test_submit_leaves_the_job_to_the_cluster_and_a_second_time_to_itself(
    cluster, capsys
):
    assert call(capsys, "submit", *RUN)[0] == call(capsys, "submit", *RUN)[0] == 0
    assert calls(cluster) == ["get deployment", "get jobset", "apply"] * 2
    assert not (cluster / "looks").exists()


def test_a_job_that_has_ended_is_replaced(cluster, capsys):
    """A sweep starts its failed runs again: the end of the one before is not theirs."""
    (cluster / "ended").write_text("Failed")
    code, out, _ = call(capsys, "run", *RUN)
    assert code == 0 and out.startswith(
        "+ kubectl delete jobset a --ignore-not-found\n"
    )
    assert calls(cluster)[1:4] == ["get jobset", "delete", "apply"]


def test_a_deleted_job_is_not_waited_for(cluster, capsys):
    (cluster / "gone").touch()
    code, _, err = call(capsys, "run", *RUN)
    assert code == 1 and err == "launch: a: the JobSet was deleted before it ended\n"


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (None, "has no JobSet: install version 0.6 or later"),
        ("registry/jobset/jobset:v0.5.2", "has JobSet 0.5: expected 0.6 or later"),
    ],
)
def test_a_cluster_without_the_rules_of_the_manifest_is_refused(
    image, error, cluster, capsys
):
    (cluster / "jobset").unlink()
    if image:
        (cluster / "jobset").write_text(image)
    code, _, err = call(capsys, "run", *RUN)
    assert code == 1 and error in err and "apply" not in calls(cluster)


def test_a_version_that_cannot_be_read_is_no_reason_to_refuse(cluster, capsys):
    (cluster / "jobset").write_text("mirror/jobset@sha256:0123")
    assert call(capsys, "submit", *RUN)[0] == 0


def test_context_and_namespace_go_with_every_call(cluster, capsys):
    assert call(capsys, "run", "--context=c", "--namespace=n", *RUN)[0] == 0
    lines = (cluster / "calls").read_text().splitlines()
    assert all(line.startswith("--context=c ") for line in lines)
    # JobSet's controller has a namespace of its own.
    assert all(
        ("--namespace=n" in line) != ("get deployment" in line) for line in lines
    )


def test_states_of_many_jobs_are_one_call(cluster, capsys):
    """Names as a sweep has them; Kueue suspends what it has not admitted."""

    def item(name, suspend=False, end=None):
        return {
            "metadata": {"name": name},
            "spec": {"suspend": suspend},
            "status": {"terminalState": end} if end else {},
        }

    items = [
        item("a"),
        item("b", suspend=True),
        item("c", end="Failed"),
        item("kl-0-1-3b41d2", end="Completed"),
    ]
    items[3]["metadata"]["name"] = gke.slug("kl=0.1")
    (cluster / "states.json").write_text(json.dumps({"kind": "List", "items": items}))
    code, out, _ = call(capsys, "states", "a", "b", "c", "kl=0.1", "d")
    assert code == 0 and len(calls(cluster)) == 1
    assert json.loads(out) == {
        "a": "Running",
        "b": "Queued",
        "c": "Failed",
        "kl=0.1": "Completed",
        "d": "Missing",
    }
    (cluster / "states.json").write_text(json.dumps(items[2] | {"kind": "JobSet"}))
    assert json.loads(call(capsys, "states", "c")[1]) == {"c": "Failed"}


def test_logs_are_those_of_our_container_on_any_worker(cluster, capsys):
    """A mounted bucket has a container of its own in the pod."""
    call(capsys, "logs", "--name=a", "--worker=3", "--slice=1")
    _, out, _ = call(capsys, "logs", "--name=a", "--worker=all")
    one, every = (cluster / "calls").read_text().splitlines()
    assert "--container=rlhfjax" in one and "--container=rlhfjax" in every
    assert "job-index=1,batch.kubernetes.io/job-completion-index=3" in one
    assert "job-index" not in every and "--prefix" in every
    assert 'jobset-name"="a"' in out


def test_manifest_and_dry_run_print_what_would_be_applied(cluster, capsys):
    _, printed, _ = call(capsys, "manifest", *RUN)
    _, dry, _ = call(capsys, "run", "--dry_run", *RUN)
    assert not (cluster / "calls").exists()
    assert (
        dry.startswith(printed)
        and "\nkubectl apply --filename=-\nkubectl logs --follow" in dry
    )
    call(capsys, "run", *RUN)
    assert json.loads((cluster / "applied.json").read_text()) == json.loads(printed)


def test_queue_and_pool_print_what_makes_them(cluster, capsys):
    code, out, _ = call(
        capsys, "queue", "--name=tpu", "--topology=4x4", "--chips=64", "--namespace=n"
    )
    assert code == 0 and out.count('"kind"') == 3 and '"namespace": "n"' in out
    where = ["--cluster=c", "--region=r-1", "--zone=r-1-a"]
    code, out, _ = call(capsys, "pool", "--name=tpu", "--topology=4x4", *where)
    assert code == 0 and [line.split()[3] for line in out.splitlines()] == [
        "create",
        "delete",
    ]
    assert not (cluster / "calls").exists()


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["fly"], "expected one of run, submit, manifest"),
        (
            ["run", "--name=a", "--image=i", "--topology=1x1", "--", "true"],
            "1 chips are no multiple of 4 per host",
        ),
        (
            ["run", "--name=a", "--image=i", "--topology=4by4", "--", "true"],
            "expected sides in chips, such as 4x4",
        ),
        (
            [
                "run",
                "--name=a",
                "--image=i",
                "--topology=2x2",
                "--slices=2",
                "--",
                "true",
            ],
            "expected a larger topology",
        ),
        (["run", "--name=a", "--topology=4x4", "--", "true"], "--image is required"),
        (["logs", "a"], "expected one of"),
    ],
)
def test_what_is_invalid_is_one_line(args, error, cluster, capsys):
    code, _, err = call(capsys, *args)
    assert (
        code == 2
        and error in err
        and err.count("\n") == 1
        and not (cluster / "calls").exists()
    )


def test_the_image_installs_what_its_commands_need():
    """The Dockerfile's extras and constraints exist, and its folder's rubbish stays out of it."""
    text = (HERE.parents[1] / "Dockerfile").read_text()
    extras = re.search(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)[1].split(",")
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"]) and {
        "tpu",
        "gcs",
        "quickstart",
    } <= set(extras)
    constraints = re.search(r"^ARG CONSTRAINTS=(.*)$", text, re.MULTILINE)[1]
    assert (HERE.parents[1] / constraints).is_file()
