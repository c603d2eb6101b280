"""Builds the objects for GKE: a JobSet, Kueue's queues, and gcloud commands for node pools."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.shell import PREEMPTED


@dataclasses.dataclass(frozen=True)
class Chip:
    """What GKE calls a TPU, and the machine type of a host by its number of chips."""

    accelerator: str  # the value of cloud.google.com/gke-tpu-accelerator
    machines: Mapping[int, str]


CHIPS = {
    "v4": Chip("tpu-v4-podslice", {4: "ct4p-hightpu-4t"}),
    "v5e": Chip(
        "tpu-v5-lite-podslice",
        {1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"},
    ),
    "v5p": Chip(
        "tpu-v5p-slice",
        {1: "ct5p-hightpu-1t", 2: "ct5p-hightpu-2t", 4: "ct5p-hightpu-4t"},
    ),
    "v6e": Chip(
        "tpu-v6e-slice",
        {1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
    ),
    "tpu7x": Chip("tpu7x", {4: "tpu7x-standard-4t"}),
}
PORTS = (8471, 8080)  # within a slice, and between slices
BUCKET = "/bucket"  # where a pod sees it
CONTAINER = "rlhfjax"
PREEMPTION = (
    "PodFailurePolicy"  # the reason of a job that its pod failure policy has ended
)
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
KUEUE = "kueue.x-k8s.io/v1beta2"


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
    queue: str | None = (
        None  # a LocalQueue of Kueue: all pods are admitted together, or wait together
    )
    priority: str | None = None  # a WorkloadPriorityClass of Kueue
    privileged: bool = False  # Autopilot refuses it, and libtpu runs without it
    grace: int = 120  # seconds between SIGTERM and SIGKILL; of a spot node about 15
    max_restarts: int = 0  # after failures that are no preemptions
    keep_days: float = 7.0  # days that an ended JobSet is kept, for `logs`
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # {variable: SECRET:KEY}

    @property
    def hosts(self) -> int:
        """Pods per slice.

        Raises:
          ValueError: the slice is no whole number of hosts.
        """
        chips = count_chips(self.topology)
        if chips % self.chips_per_host:
            raise ValueError(
                f"--topology={self.topology}: {chips} chips are no multiple of "
                f"{self.chips_per_host} per host"
            )
        return chips // self.chips_per_host


def count_chips(topology: str) -> int:
    """Chips of a slice of 4x4, 4x4x8.

    Raises:
      ValueError: a side is no positive number.
    """
    sides = topology.split("x")
    if not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(
            f"--topology={topology}: expected sides in chips, such as 4x4 or 4x4x8"
        )
    return math.prod(int(side) for side in sides)


def validate(job: Job) -> None:
    """Checks what the cluster would only say by never starting a pod.

    Raises:
      ValueError: the slice is no whole number of hosts, or several slices have one host each.
    """
    if job.slices > 1 and job.hosts == 1:
        raise ValueError(
            f"--slices={job.slices} of --topology={job.topology}: GKE joins slices of several "
            "hosts alone, and this "
            f"one is a single host; expected a larger topology"
        )


# ------------------------------------------------------------------ the JobSet


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet: one job per slice, one pod per host, started and restarted together.

    It needs JobSet 0.6 or later.
    """
    rule = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": [PREEMPTION],
    }
    labels = {QUEUE: job.queue, PRIORITY: job.priority}
    labels = {name: value for name, value in labels.items() if value}
    metadata: dict[str, Any] = {
        "name": job.name,
        # one slice, one node pool
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    if labels:
        metadata["labels"] = labels
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [rule]},
            "ttlSecondsAfterFinished": round(86_400 * job.keep_days),
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": job.slices,
                    "template": {"spec": _slice(job)},
                }
            ],
        },
    }


def _slice(job: Job) -> dict[str, Any]:
    """One slice: a Kubernetes Job of as many pods as the slice has hosts.

    The first failure ends all of them.
    """
    return {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {"operator": "In", "values": [PREEMPTED]},
                },
            ]
        },
        "template": _pod(job),
    }


def _pod(job: Job) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": CHIPS[job.chip].accelerator,
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
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ]
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    if not job.bucket:
        return {"spec": spec}
    attributes = {"bucketName": job.bucket, "mountOptions": "implicit-dirs"}
    spec["volumes"] = [
        {
            "name": "bucket",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "volumeAttributes": attributes,
            },
        }
    ]
    return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": spec}


def _container(job: Job) -> dict[str, Any]:
    """The command is the container's first process, so that SIGTERM reaches it."""
    chips = {"google.com/tpu": job.chips_per_host}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "command": [_verbatim(word) for word in job.command],
        "env": _environment(job),
        "resources": {"requests": chips, "limits": chips},
        "ports": [{"containerPort": port} for port in PORTS],
    }
    if job.privileged:
        container["securityContext"] = {"privileged": True}
    if job.bucket:
        container["volumeMounts"] = [{"name": "bucket", "mountPath": BUCKET}]
    return container


def _verbatim(text: str) -> str:
    """A text in which Kubernetes, which expands $(NAME), expands nothing."""
    return text.replace("$", "$$")


def _environment(job: Job) -> list[dict[str, Any]]:
    """RLHFJAX_JOIN, so that every pod joins whatever variables GKE sets.

    Then the job's own, then its secrets.
    """
    plain = {"RLHFJAX_JOIN": "1"} | dict(job.env)
    variables: list[dict[str, Any]] = [
        {"name": name, "value": _verbatim(value)} for name, value in plain.items()
    ]
    for name, reference in job.secrets.items():
        secret, _, key = reference.partition(":")
        variables.append(
            {
                "name": name,
                "valueFrom": {"secretKeyRef": {"name": secret, "key": key or name}},
            }
        )
    return variables


# ------------------------------------------------------------------ Kueue's queues


def queues(
    name: str, chip: str, topology: str, chips: int, namespace: str, spot: bool
) -> list[dict[str, Any]]:
    """A queue for jobs of one kind of slice: ResourceFlavor, ClusterQueue and LocalQueue of one
    name.

    Args:
      chips: the quota, in chips. Kueue admits a job when all of its pods fit, and never a part of
        them.
    """
    labels = {
        "cloud.google.com/gke-tpu-accelerator": CHIPS[chip].accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if spot:
        labels["cloud.google.com/gke-spot"] = "true"
    resource = {"name": "google.com/tpu", "nominalQuota": chips}
    group = {
        "coveredResources": ["google.com/tpu"],
        "flavors": [{"name": name, "resources": [resource]}],
    }
    return [
        _kueue("ResourceFlavor", {"name": name}, {"nodeLabels": labels}),
        _kueue(
            "ClusterQueue",
            {"name": name},
            {
                "namespaceSelector": {},
                "queueingStrategy": "BestEffortFIFO",
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [group],
            },
        ),
        _kueue(
            "LocalQueue", {"name": name, "namespace": namespace}, {"clusterQueue": name}
        ),
    ]


def _kueue(kind: str, metadata: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": KUEUE, "kind": kind, "metadata": metadata, "spec": spec}


# ------------------------------------------------------------------ the node pool


def pool_commands(
    job: Job, cluster: Sequence[str], zone: str, project: str | None
) -> list[list[str]]:
    """The commands that create a node pool per slice, scaled from zero nodes and back to zero, and
    that delete it.

    Args:
      cluster: the flags that name the cluster: --cluster=C --region=R.
    Raises:
      ValueError: no machine type of the chip has so many chips.
    """
    machines = CHIPS[job.chip].machines
    if job.chips_per_host not in machines:
        known = ", ".join(str(n) for n in machines)
        raise ValueError(
            f"--chips_per_host={job.chips_per_host}: a host of {job.chip} has {known} chips"
        )
    flags = [
        *cluster,
        f"--node-locations={zone}",
        f"--machine-type={machines[job.chips_per_host]}",
        "--enable-autoscaling",
        "--num-nodes=0",
        f"--max-nodes={job.hosts}",
    ]
    commands: list[list[str]] = []
    if job.chip == "tpu7x" and job.hosts > 1:
        # A placement policy takes the place of --tpu-topology.
        region = zone.rpartition("-")[0]
        kind = [
            "--type=HIGH_THROUGHPUT",
            f"--accelerator-topology={job.topology}",
            f"--region={region}",
        ]
        policy = ["gcloud", "compute", "resource-policies", "create", "workload-policy"]
        commands.append([*policy, f"{job.name}-policy", *kind, *_project(project)])
        flags.append(f"--placement-policy={job.name}-policy")
    else:
        flags.append(f"--tpu-topology={job.topology}")
    if job.spot:
        flags.append("--spot")
    pools = [f"{job.name}-{i}" for i in range(job.slices)]
    words = ["gcloud", "container", "node-pools"]
    commands += [[*words, "create", pool, *flags, *_project(project)] for pool in pools]
    commands += [
        [*words, "delete", pool, *cluster, *_project(project), "--quiet"]
        for pool in pools
    ]
    return commands


def _project(project: str | None) -> list[str]:
    return [f"--project={project}"] if project else []
