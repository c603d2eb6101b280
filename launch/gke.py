"""Runs a command on TPU slices of a GKE cluster, as a JobSet.

It supports several slices, spot nodes, and admission by Kueue.

    python -m launch.gke run --name=a --image=… --chip=v5e --topology=4x4 --slices=2 --queue=tpu \\
        -- rlhfjax run --config=experiments/… --workdir=gs://BUCKET/runs/a
    python -m launch.gke submit … -- …        the same without waiting for its end
    python -m launch.gke manifest … -- …      prints the manifest for `kubectl apply`
    python -m launch.gke logs | down --name=a
    python -m launch.gke states NAME …        prints the state of each job as JSON: Queued, Running,
                                              Completed, Failed or Missing
    python -m launch.gke queue --name=tpu --topology=4x4 --chips=64
                                              prints Kueue's objects for `kubectl apply`
    python -m launch.gke pool --name=tpu --topology=4x4 --cluster=C --region=R --zone=Z
                                              prints the gcloud commands for a node pool

Manifests are JSON, which is YAML. If a pod exits with 75 or its node is taken away, the JobSet
starts again, without limit, because the state is in the bucket. It is restarted at most
--max_restarts times after any other failure.
"""

import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import gke_manifest
from launch.check import validate_command
from launch.gke_manifest import BUCKET, CHIPS, CONTAINER, Job, manifest
from launch.shell import (
    LaunchError,
    Shell,
    bucket_of,
    environment,
    field,
    given,
    launch,
    parsed,
    required,
    secrets,
    slug,
    workdir_of,
)

OLDEST_JOBSET = (0, 6)  # with rules by the reason of a failure
WORDS = ("run", "submit", "manifest", "logs", "down", "states", "queue", "pool")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Which cluster and namespace kubectl asks."""

    context: str | None = None
    namespace: str | None = None

    def kubectl(self, *words: str) -> list[str]:
        options = {"context": self.context, "namespace": self.namespace}
        return [
            "kubectl",
            *(f"--{name}={value}" for name, value in options.items() if value),
            *words,
        ]

    def state(self, name: str) -> list[str]:
        """The command that prints Completed, Failed, or nothing while the JobSet goes on."""
        return self.kubectl(
            "get", "jobset", name, "--output=jsonpath={.status.terminalState}"
        )

    def states(self, names: Sequence[str]) -> list[str]:
        """The command that prints the JobSets of these names, as JSON, without those that are not
        there.
        """
        return self.kubectl(
            "get", "jobset", *names, "--ignore-not-found", "--output=json"
        )

    def logs(self, name: str, worker: str = "0", slice_index: str = "0") -> list[str]:
        """The command that shows the output of one pod as it comes, or of all of a job's pods."""
        labels = {"jobset-name": name, "replicatedjob-name": "slice"}
        if worker != "all":
            labels["job-index"] = slice_index
        selector = [
            f"jobset.sigs.k8s.io/{key}={value}" for key, value in labels.items()
        ]
        if worker != "all":
            selector.append(f"batch.kubernetes.io/job-completion-index={worker}")
        # By name: where a bucket is mounted the pod has a container of FUSE's too.
        options = [
            "--follow",
            "--pod-running-timeout=1h",
            "--tail=100",
            f"--container={CONTAINER}",
        ]
        if worker == "all":
            options += ["--prefix", "--max-log-requests=1000"]
        return self.kubectl("logs", *options, f"--selector={','.join(selector)}")

    def down(self, name: str) -> list[str]:
        return self.kubectl("delete", "jobset", name, "--ignore-not-found")

    def jobset_image(self) -> list[str]:
        """The command that prints the image of JobSet's controller, whose tag is its version."""
        path = "{.spec.template.spec.containers[*].image}"
        words = [
            "get",
            "deployment",
            "jobset-controller-manager",
            "--namespace=jobset-system",
        ]
        return dataclasses.replace(self, namespace=None).kubectl(
            *words, f"--output=jsonpath={path}"
        )


def cloud_logs(name: str) -> str:
    """The query of Cloud Logging that finds the output of all pods, also of those that are gone."""
    terms = {
        "resource.type": "k8s_container",
        "resource.labels.container_name": CONTAINER,
        'labels."k8s-pod/jobset_sigs_k8s_io/jobset-name"': name,
    }
    return " ".join(f'{key}="{value}"' for key, value in terms.items())


def validate_jobset(shell: Shell, cluster: Cluster, poll: float) -> None:
    """Checks that the cluster has JobSet, and a version that knows the manifest's rules.

    Raises:
      LaunchError: it has none, or an older one.
    """
    oldest = ".".join(str(part) for part in OLDEST_JOBSET)
    image = shell.ask(cluster.jobset_image(), "NotFound", poll)
    if image is None:
        raise LaunchError(
            f"this cluster has no JobSet: install version {oldest} or later (docs/launching.md)"
        )
    version = re.search(r":v(\d+)\.(\d+)", image)
    if version and (int(version[1]), int(version[2])) < OLDEST_JOBSET:
        raise LaunchError(
            f"this cluster has JobSet {version[1]}.{version[2]}: expected {oldest} or later"
        )


def submit(shell: Shell, cluster: Cluster, job: Job, poll: float) -> None:
    """Applies the manifest. A JobSet of the name that goes on is left as it is.

    One that has ended is deleted first.
    """
    text = json.dumps(manifest(job), indent=2, allow_nan=False)
    if shell.dry_run:
        shell.say(text)
        shell.say(
            f"# where one of the name has ended: {shlex.join(cluster.down(job.name))}"
        )
        shell.must(cluster.kubectl("apply", "--filename=-"), stdin=text)
        return
    validate_jobset(shell, cluster, poll)
    if shell.ask(cluster.state(job.name), "NotFound", poll):
        shell.must(cluster.down(job.name))
    shell.must(cluster.kubectl("apply", "--filename=-"), stdin=text)


def run(shell: Shell, cluster: Cluster, job: Job, poll: float) -> int:
    """Submits the job and follows it to its end: 0 where it completed, 1 where it failed."""
    submit(shell, cluster, job, poll)
    if shell.dry_run:
        shell.show(cluster.logs(job.name))
        shell.say(
            f"# until it prints Completed or Failed: {shlex.join(cluster.state(job.name))}"
        )
        return 0
    while not (end := shell.ask(cluster.state(job.name), "NotFound", poll)):
        if end is None:
            raise LaunchError(f"{job.name}: the JobSet was deleted before it ended")
        shell.run(
            cluster.logs(job.name)
        )  # it ends with the pod; a restarted job has another one
        time.sleep(poll)
    shell.say(f"{job.name}: {end}")
    if end != "Completed":
        shell.say(
            f"{job.name}: the output of all pods, in Cloud Logging: {cloud_logs(job.name)}"
        )
    return 0 if end == "Completed" else 1


def states(
    shell: Shell, cluster: Cluster, names: Sequence[str], poll: float
) -> dict[str, str]:
    """The state of each job, in one call: Queued, Running, Completed, Failed or Missing."""
    words = cluster.states([slug(name) for name in names])
    found = parsed(shell.ask(words, "NotFound", poll) or "{}", "kubectl")
    # One JobSet is printed as itself, several as a list.
    items = [found] if found else []
    if found.get("kind") == "List":
        items = field(found, "items", list, "kubectl")
    by_name = {_name_of(item): _state_of(item) for item in items}
    return {name: by_name.get(slug(name), "Missing") for name in names}


def _state_of(item: dict) -> str:
    """Completed or Failed where it has ended; Queued while Kueue has not admitted it."""
    end = item.get("status", {}).get("terminalState")
    if end:
        return end
    spec = field(item, "spec", dict, "kubectl")
    return "Queued" if spec.get("suspend") else "Running"


def _name_of(item: Any) -> str:
    if not isinstance(item, dict):
        raise LaunchError(f"kubectl: {item!r} in its answer; expected a JobSet")
    metadata = field(item, "metadata", dict, "kubectl")
    return field(metadata, "name", str, "kubectl")


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    word, *names = words or [""]
    if word not in WORDS or (names and word != "states"):
        raise flags.IllegalFlagValueError(
            f"{' '.join(words) or 'no word'}: expected one of {', '.join(WORDS)}"
        )
    shell, cluster = Shell(fv.dry_run), Cluster(fv.context, fv.namespace)
    if word == "states":
        print(json.dumps(states(shell, cluster, names, fv.poll), allow_nan=False))
        return 0
    required(fv, "name")
    if word == "logs":
        shell.say(f"# in Cloud Logging: {cloud_logs(slug(fv.name))}")
        return shell.run(cluster.logs(slug(fv.name), fv.worker, fv.slice))
    if word == "down":
        return shell.run(cluster.down(slug(fv.name)))
    try:
        return _with_topology(fv, word, command, shell, cluster)
    except ValueError as e:
        raise flags.IllegalFlagValueError(str(e)) from None


def _with_topology(
    fv: flags.FlagValues,
    word: str,
    command: Sequence[str],
    shell: Shell,
    cluster: Cluster,
) -> int:
    """The words that need to know of a slice: queue and pool, and those that start a job."""
    required(fv, "topology")
    if word == "queue":
        required(fv, "chips")
        gke_manifest.count_chips(fv.topology)
        name, namespace = slug(fv.name), fv.namespace or "default"
        for item in gke_manifest.queues(
            name, fv.chip, fv.topology, fv.chips, namespace, fv.spot
        ):
            print(json.dumps(item, indent=2, allow_nan=False))
        return 0
    if word == "pool":
        required(fv, "cluster", "region", "zone")
        where = [f"--cluster={fv.cluster}", f"--region={fv.region}"]
        for line in gke_manifest.pool_commands(
            _job(fv, ()), where, fv.zone, fv.project
        ):
            print(shlex.join(line))
        return 0
    required(fv, "image")
    job = _job(fv, tuple(given(command)))
    gke_manifest.validate(job)
    if word == "manifest":
        print(json.dumps(manifest(job), indent=2, allow_nan=False))
        return 0
    if fv.check:
        validate_command(shell, job.command, fv.spot)
    if word == "submit":
        submit(shell, cluster, job, fv.poll)
        return 0
    return run(shell, cluster, job, fv.poll)


_OF_FLAGS = (  # the fields of a Job that flags of the same name give
    *(
        "image",
        "chip",
        "topology",
        "slices",
        "chips_per_host",
        "spot",
        "bucket",
        "service_account",
    ),
    *("queue", "priority", "privileged", "grace", "max_restarts", "keep_days"),
)


def _job(fv: flags.FlagValues, command: tuple[str, ...]) -> Job:
    options = {name: fv[name].value for name in _OF_FLAGS}
    bucket = bucket_of(workdir_of(command))
    # What was compiled before a preemption, or for another run of a sweep, is not compiled again.
    env = {"JAX_COMPILATION_CACHE_DIR": f"{bucket}/cache"} if bucket else {}
    env |= environment(fv.env)
    return Job(
        name=slug(fv.name),
        command=command,
        env=env,
        secrets=secrets(fv.secret),
        **options,
    )


def _flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "context", None, "kubectl context; default: the current one", flag_values=fv
    )
    flags.DEFINE_string(
        "namespace", None, "default: the context's namespace", flag_values=fv
    )
    flags.DEFINE_string(
        "image",
        None,
        "container image with rlhfjax and the experiment files (Dockerfile)",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "chip", "v5e", list(CHIPS), "TPU type of the node pool", flag_values=fv
    )
    flags.DEFINE_string(
        "topology", None, "topology of a slice: 4x4, 4x4x8", flag_values=fv
    )
    flags.DEFINE_integer(
        "slices", 1, "number of slices, one node pool each", 1, flag_values=fv
    )
    flags.DEFINE_integer(
        "chips_per_host", 4, "chips of the node pool's machine type", 1, flag_values=fv
    )
    flags.DEFINE_bool(
        "spot", False, "use spot nodes, which may be preempted", flag_values=fv
    )
    flags.DEFINE_string(
        "bucket",
        None,
        f"bucket for reading data, mounted at {BUCKET}",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "service_account",
        None,
        "Kubernetes service account with access to the bucket",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "queue",
        None,
        "Kueue LocalQueue; default: none, pods start one by one",
        flag_values=fv,
    )
    flags.DEFINE_string("priority", None, "Kueue WorkloadPriorityClass", flag_values=fv)
    flags.DEFINE_bool(
        "privileged",
        False,
        "run privileged containers; Autopilot rejects them",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "grace",
        120,
        "seconds a run has to save; about 15 on spot nodes",
        1,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_restarts",
        0,
        "restarts after failures other than preemptions",
        0,
        flag_values=fv,
    )
    flags.DEFINE_float(
        "keep_days", 7.0, "days before an ended JobSet is deleted", 0.0, flag_values=fv
    )
    flags.DEFINE_multi_string(
        "secret", [], "NAME=SECRET[:KEY], a Kubernetes secret", flag_values=fv
    )
    flags.DEFINE_bool(
        "check",
        True,
        "validate the config here before the job is created",
        flag_values=fv,
    )
    flags.DEFINE_float(
        "poll", 30.0, "seconds between checks of the state", 0.0, flag_values=fv
    )
    flags.DEFINE_string(
        "worker",
        "0",
        "logs: number of the host within its slice, or all",
        flag_values=fv,
    )
    flags.DEFINE_string("slice", "0", "logs: number of the slice", flag_values=fv)
    flags.DEFINE_integer("chips", None, "queue: quota in chips", 1, flag_values=fv)
    flags.DEFINE_string("cluster", None, "pool: the cluster's name", flag_values=fv)
    flags.DEFINE_string("region", None, "pool: the cluster's region", flag_values=fv)
    flags.DEFINE_string("zone", None, "pool: where its nodes are", flag_values=fv)
    flags.DEFINE_string(
        "project", None, "pool: project; default: gcloud's", flag_values=fv
    )


def main() -> None:
    launch(__doc__, _flags, act, sys.argv)


if __name__ == "__main__":
    main()
