"""Runs a command on TPU slices of a GKE cluster as a JobSet: several slices, spot, a bucket for checkpoints.

    python -m launch.gke run --name=a --image=… --chip=v5e --topology=4x4 --slices=2 --bucket=B -- rlhfjax run \\
        --config=experiments/… --workdir=/bucket/runs/a
    python -m launch.gke manifest … -- …      prints what `kubectl apply` would get
    python -m launch.gke logs | down --name=a

The manifest is JSON, which is YAML. A pod that exits with 75, or whose node is taken away, makes the JobSet start again
without limit: the state is in the bucket. Any other failure ends it.
"""

import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from launch.shell import PREEMPTED, LaunchError, Shell, environment, given, launch, required, secrets, slug

# GKE's names of the chips: cloud.google.com/gke-tpu-accelerator
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
PORTS = (8471, 8080)  # within a slice, and between slices
BUCKET = "/bucket"  # where a pod sees it
PREEMPTION = "PodFailurePolicy"  # the reason of a job that its pod failure policy has ended


@dataclasses.dataclass(frozen=True)
class Job:
    """What runs where. `topology` is that of one slice, in chips: 4x4, 4x4x8."""

    name: str
    image: str
    command: tuple[str, ...]
    chip: str
    topology: str
    slices: int = 1
    chips_per_host: int = 4
    spot: bool = False
    bucket: str | None = None
    service_account: str | None = None
    grace: int = 120  # seconds between SIGTERM and SIGKILL
    max_restarts: int = 0  # after failures that are no pre-emptions
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {variable: SECRET:KEY}

    @property
    def hosts(self) -> int:
        """Pods a slice.

        Raises:
          ValueError: the slice is no whole number of hosts.
        """
        chips = math.prod(int(side) for side in self.topology.split("x"))
        if chips % self.chips_per_host:
            raise ValueError(
                f"--topology={self.topology}: {chips} chips are no multiple of {self.chips_per_host} a host"
            )
        return chips // self.chips_per_host


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet: one job a slice, one pod a host, started and restarted together."""
    rule = {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": [PREEMPTION]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            # one slice, one node pool
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [rule]},
            "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": _slice(job)}}],
        },
    }


def _slice(job: Job) -> dict[str, Any]:
    """One slice: a Kubernetes Job of as many pods as the slice has hosts; the first failure ends all of them."""
    return {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
            ]
        },
        "template": _pod(job),
    }


def _pod(job: Job) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[job.chip],
        "cloud.google.com/gke-tpu-topology": job.topology,
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # as a pod failure policy needs it
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": selector,
        "containers": [_container(job)],
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    if not job.bucket:
        return {"spec": spec}
    attributes = {"bucketName": job.bucket, "mountOptions": "implicit-dirs"}
    spec["volumes"] = [
        {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    ]
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": spec}


def _container(job: Job) -> dict[str, Any]:
    """The command is the container's first process, so that SIGTERM reaches it."""
    stored = [(name, reference.partition(":")) for name, reference in job.secrets.items()]
    container: dict[str, Any] = {
        "name": "rlhfjax",
        "image": job.image,
        "command": list(job.command),
        "env": [
            *({"name": name, "value": value} for name, value in job.env.items()),
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key or name}}}
                for name, (secret, _, key) in stored
            ),
        ],
        "resources": {
            "requests": {"google.com/tpu": job.chips_per_host},
            "limits": {"google.com/tpu": job.chips_per_host},
        },
        "ports": [{"containerPort": port} for port in PORTS],
        "securityContext": {"privileged": True},  # as libtpu needs it
    }
    if job.bucket:
        container["volumeMounts"] = [{"name": "bucket", "mountPath": BUCKET}]
    return container


def state(name: str) -> list[str]:
    """The command that prints Completed, Failed, or nothing while the JobSet goes on."""
    return ["kubectl", "get", "jobset", name, "--output=jsonpath={.status.terminalState}"]


def logs(name: str) -> list[str]:
    """The command that shows the output of the first pod of the first slice, as it comes."""
    select = {"jobset-name": name, "replicatedjob-name": "slice", "job-index": "0"}
    labels = [f"jobset.sigs.k8s.io/{key}={value}" for key, value in select.items()]
    labels.append("batch.kubernetes.io/job-completion-index=0")
    return ["kubectl", "logs", "--follow", "--pod-running-timeout=1h", f"--selector={','.join(labels)}", "--tail=100"]


def down(name: str) -> list[str]:
    return ["kubectl", "delete", "jobset", name, "--ignore-not-found"]


def run(shell: Shell, job: Job, poll: float) -> int:
    """Applies the manifest and follows the job to its end: 0 where it completed, 1 where it failed.

    One that goes on is followed; one that has ended is deleted first, since it would only be told again how.
    """
    text = json.dumps(manifest(job), indent=2, allow_nan=False)
    if shell.dry_run:
        shell.say(text)
        shell.say(f"# where one of the name has ended: {shlex.join(down(job.name))}")
    elif shell.ask(state(job.name), "NotFound", poll):
        shell.must(down(job.name))
    shell.must(["kubectl", "apply", "--filename=-"], stdin=text)
    if shell.dry_run:
        shell.show(logs(job.name))
        shell.say(f"# until it prints Completed or Failed: {shlex.join(state(job.name))}")
        return 0
    while not (end := shell.ask(state(job.name), "NotFound", poll)):
        if end is None:
            raise LaunchError(f"{job.name}: the JobSet was deleted before it ended")
        shell.run(logs(job.name))  # it ends with the pod; a restarted job has another one
        time.sleep(poll)
    shell.say(f"{job.name}: {end}")
    return 0 if end == "Completed" else 1


def _flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string("image", None, "with rlhfjax installed, and the experiment files", flag_values=fv)
    flags.DEFINE_enum("chip", "v5e", list(ACCELERATORS), "of the node pool", flag_values=fv)
    flags.DEFINE_string("topology", None, "of one slice: 4x4, 4x4x8", flag_values=fv)
    flags.DEFINE_integer("slices", 1, "node pools of this topology", 1, flag_values=fv)
    flags.DEFINE_integer("chips_per_host", 4, "of the node pool's machine type", 1, flag_values=fv)
    flags.DEFINE_bool("spot", False, "nodes that may be taken away", flag_values=fv)
    flags.DEFINE_string("bucket", None, f"a bucket's name; a pod sees it as {BUCKET}", flag_values=fv)
    flags.DEFINE_string("service_account", None, "Kubernetes', with access to the bucket", flag_values=fv)
    flags.DEFINE_integer("grace", 120, "seconds that a run has to save", 1, flag_values=fv)
    flags.DEFINE_multi_string("secret", [], "NAME=SECRET[:KEY], a Kubernetes secret", flag_values=fv)
    flags.DEFINE_float("poll", 30.0, "seconds between looks at the state", 0.0, flag_values=fv)


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    if list(words) not in (["run"], ["manifest"], ["logs"], ["down"]):
        raise flags.IllegalFlagValueError(f"{' '.join(words) or 'no word'}: expected one of run, manifest, logs, down")
    required(fv, "name")
    name, shell = slug(fv.name), Shell(fv.dry_run)
    if words[0] in ("logs", "down"):
        return shell.run(logs(name) if words[0] == "logs" else down(name))
    required(fv, "image", "topology")
    same = ("image", "chip", "topology", "slices", "chips_per_host", "spot", "bucket", "service_account", "grace")
    given_ = {key: fv[key].value for key in same}
    job = Job(name=name, command=tuple(given(command)), env=environment(fv.env), secrets=secrets(fv.secret), **given_)
    try:
        text = json.dumps(manifest(job), indent=2, allow_nan=False)
    except ValueError as e:
        raise flags.IllegalFlagValueError(str(e)) from None
    if words[0] == "manifest":
        print(text)
        return 0
    return run(shell, job, fv.poll)


def main() -> None:
    launch(__doc__, _flags, act, sys.argv)


if __name__ == "__main__":
    main()
