"""A sweep as files for a cluster that is not here: SkyPilot tasks, or Kubernetes JobSets. Nothing is launched."""

import dataclasses
import functools
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import yaml

from mmfree_jax.config import RunConfig, require
from mmfree_jax.data.building.distributions import TIERS
from mmfree_jax.devices import SLICES
from mmfree_jax.files import write_atomically
from mmfree_jax.sweep.executor import RUN_FAILED
from mmfree_jax.sweep.experiment import Study, chains, machines
from mmfree_jax.training.interrupt import PREEMPTED

# Each chain of runs is one task, on as many devices as its mesh has. Tasks do not depend on each other. They run the
# command of every executor (`mmfree_jax.sweep.worker`), share one folder of runs, and may be stopped and started at any
# point: exit status 75 asks for another start, 1 for none.

Target = Literal["skypilot", "jobset"]
RUNS = "/runs"  # where the shared folder is mounted
CACHE = f"{RUNS}/cache"  # for corpora that have to be built first: they are copied there once, for all tasks
SENT = "/experiment"  # where a container finds the experiment file
PORT = 61440  # of process 0 of a run that several processes share
RESTARTS = 100  # of a task whose machines are taken away
GRACE_SECONDS = 300  # time to save before a pod is killed; spot machines give less
LONGEST_NAME = 44  # the pods' names, NAME-worker-0-HOST-xxxxx, may have 63 characters


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
_yaml: Callable[[dict], str] = functools.partial(yaml.dump, Dumper=_Dumper, sort_keys=False, width=120)  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator by its names: SkyPilot's (of one, or of a slice of {chips} or {cores}), GKE's node label, the pip
    extra; and how many are on a host and in the slices that there are."""

    sky: str
    gke: str
    extra: str
    per_host: int
    topologies: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def is_tpu(self) -> bool:
        """Whether several make a slice with a topology."""
        return self.extra == "tpu"


DEVICES = {
    "h200": Device("H200", "nvidia-h200-141gb", "cuda13", 8),
    "h100": Device("H100", "nvidia-h100-80gb", "cuda13", 8),
    "a100": Device("A100-80GB", "nvidia-a100-80gb", "cuda13", 8),
    "tpu-v5e": Device("tpu-v5litepod-{chips}", "tpu-v5-lite-podslice", "tpu", 4, SLICES["tpu-v5e"]),
    "tpu-v5p": Device("tpu-v5p-{cores}", "tpu-v5p-slice", "tpu", 4, SLICES["tpu-v5p"]),
    "tpu-v6e": Device("tpu-v6e-{chips}", "tpu-v6e-slice", "tpu", 4, SLICES["tpu-v6e"]),
}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Machines for rendered tasks. A task gets as many devices as the mesh of its runs has."""

    device: Literal["h200", "h100", "a100", "tpu-v5e", "tpu-v5p", "tpu-v6e"] = "h200"
    """Accelerator."""
    storage: str = ""
    """Storage for the runs that all machines can see.
    SkyPilot: a bucket (s3://…; gs://… if a run spans hosts). JobSet: a volume claim."""
    spot: bool = True
    """Use spot machines: cheaper, and a run that loses its machine continues where it was."""
    image: str = ""
    """Container image with this package and JAX for the device (JobSet only; SkyPilot sends the working folder)."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One chain of a study, on the machines of its mesh. A run may take `limit_hours` (0: no limit)."""

    study: Study
    name: str
    chain: Sequence[RunConfig]
    hosts: int
    per_host: int  # devices of each
    cloud: Cloud
    limit_hours: float
    environment: dict[str, str]


def render(
    study: Study, experiment: Path, out: Path, target: Target, cloud: Cloud, limit_hours: float = 0.0
) -> list[Path]:
    """Write the files of a sweep into out/TARGET and return their paths. A run may take `limit_hours` (0: no limit).

    Raises ConfigError for a mesh that no such machines have, runs of one chain on different meshes, storage or an
    experiment file that the machines could not see, or two chains of one name.
    """
    _check_storage(target, cloud)
    corpora = dict.fromkeys(name for run in study.runs for name in (run.data.corpus, *run.data.mixture))
    tiers = [name for name in corpora if name in TIERS]  # which tasks cannot build themselves
    environment = {"MMFREE_JAX_CACHE": CACHE} if tiers else {}
    # A chain is a task, so a machine that is taken away stops one chain and the others go on.
    tasks, device = [], DEVICES[cloud.device]
    for chain in chains(study.runs):
        count, near = chain[0].mesh.devices, ", ".join(map(str, device.topologies))
        possible = not device.is_tpu or count in device.topologies
        require(possible, f"{chain[0].name}: no {cloud.device} slice has {count} chips: use one of {near}")
        hosts, per_host = machines(chain, device.per_host, "host")
        name = _plain(f"{study.name}-{chain[0].name}")
        tasks.append(Task(study, name, chain, hosts, per_host, cloud, limit_hours, environment))
    require(len({task.name for task in tasks}) == len(tasks), f"study {study.name}: some names differ only in signs")
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    vocab = study.runs[0].data.vocab
    to_do = "".join(
        f"# First, once: mmfree corpus build {name} --vocab {vocab}, and copy the folder tier-{name}-{vocab} of "
        f"~/.cache/mmfree_jax into cache/ on {cloud.storage}.\n"
        for name in tiers
    )
    if target == "skypilot":
        return _skypilot(tasks, experiment, folder, to_do)
    documents = [experiment_map(study, experiment), *(jobset(task, experiment) for task in tasks)]
    path = folder / "jobsets.yaml"
    write_atomically(path, to_do + "---\n".join(map(_yaml, documents)))
    return [path]


def _check_storage(target: Target, cloud: Cloud) -> None:
    shape, what, example = {
        "skypilot": (r"\w+://\w.*", "a bucket", "s3://my-bucket/runs"),
        "jobset": (r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "a volume claim", "my-claim"),
    }[target]
    fits = re.fullmatch(shape, cloud.storage) is not None
    require(fits, f"--render {target} needs {what} that all machines see: --cloud.storage {example}")
    require(target != "jobset" or bool(cloud.image), "--render jobset needs an image with this package: --cloud.image")
    require(target != "skypilot" or not cloud.image, "--cloud.image is for JobSets: SkyPilot sends the working folder")


def _plain(name: str) -> str:
    """A name that Kubernetes and SkyPilot accept: letters, digits and dashes. A long one is cut and gets a digest."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"s-{plain}"
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 7].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def worker_command(task: Task, experiment: str | Path) -> str:
    """Return the worker's command for a machine that has the experiment file and the folder of runs."""
    limit = ["--limit-hours", f"{task.limit_hours:g}"] if task.limit_hours else []
    words = [*limit, "--experiment", str(experiment), f"{RUNS}/{task.study.name}", *(run.name for run in task.chain)]
    return f"-m mmfree_jax.sweep.worker {shlex.join(words)}"


def skypilot(task: Task, experiment: Path) -> dict:
    """Return a managed job (docs.skypilot.co, "SkyPilot YAML"). Of a TPU slice SkyPilot counts each host as a node."""
    cloud, device = task.cloud, DEVICES[task.cloud.device]
    chips = task.hosts * task.per_host
    named = device.sky.format(chips=chips, cores=2 * chips)
    accelerators = named if device.is_tpu else f"{device.sky}:{task.per_host}"
    return {
        "name": task.name,
        "resources": {
            "accelerators": accelerators,
            "use_spot": cloud.spot,
            "job_recovery": {"max_restarts_on_errors": 1, "recover_on_exit_codes": [PREEMPTED]},
        },
        "num_nodes": 1 if device.is_tpu else task.hosts,
        "workdir": ".",
        "envs": task.environment,
        "file_mounts": {RUNS: {"source": cloud.storage, "mode": _mount(task)}},
        # SkyPilot brings uv with it, and often a Python that is too old.
        "setup": 'export PATH="$HOME/.local/bin:$PATH"\n'
        + "uv venv --allow-existing --python 3.12 ~/mmfree\n"
        + f"uv pip install --python ~/mmfree/bin/python . 'jax[{device.extra}]'\n",
        "run": f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"\n'
        + "export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK\n"
        + f"exec ~/mmfree/bin/python {worker_command(task, experiment)}\n",
    }


def _mount(task: Task) -> str:
    """How SkyPilot mounts the bucket. Raises ConfigError for a bucket that the hosts of a run could not share.

    MOUNT_CACHED behaves like a disk, but a host sees the files of others late. Hosts that write one checkpoint together
    need MOUNT; and there only Google's buckets can rename folders and append to files.
    """
    if task.hosts == 1:
        return "MOUNT_CACHED"
    shared = task.cloud.storage.startswith("gs://")
    require(shared, f"{task.name}: its {task.hosts} hosts can share a Google bucket only: --cloud.storage gs://…")
    return "MOUNT"


def _skypilot(tasks: Sequence[Task], experiment: Path, folder: Path, to_do: str) -> list[Path]:
    """Write a file for each task and a script that launches them all from the working folder, which SkyPilot sends."""
    # Paths in the task are relative to that folder, because on the machine it has another name.
    here = Path.cwd()
    inside = experiment.resolve().is_relative_to(here)
    require(inside, f"{experiment}: SkyPilot sends the working folder, {here}: put the experiment file into it")
    experiment = experiment.resolve().relative_to(here)
    made = {folder / f"{task.name}.yaml": skypilot(task, experiment) for task in tasks}
    for path, task in made.items():
        write_atomically(path, _yaml(task))
    launch = "".join(
        f"sky jobs launch --yes --async --name {path.stem} {shlex.quote(str(path.resolve()))}\n" for path in made
    )
    script = folder / "launch.sh"
    go = f"cd {shlex.quote(str(here))}  # SkyPilot sends this folder to the machines"
    write_atomically(script, f"#!/bin/sh\n{to_do}set -e\n{go}\n{launch}")
    script.chmod(0o755)
    return [script, *made]


def experiment_map(study: Study, experiment: Path) -> dict:
    """Return the experiment file as a ConfigMap, for containers that do not hold it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{_plain(study.name)}-experiment"},
        "data": {experiment.name: experiment.read_text(encoding="utf-8")},
    }


def jobset(task: Task, experiment: Path) -> dict:
    """Return a JobSet (jobset.sigs.k8s.io, v1alpha2) on GKE's node labels: an indexed job with one pod for each host.

    A pod that exits with 75, or loses its machine, starts again, and this does not count as a failure. One that exits
    with 1 ends the set, because its runs would fail again. After any other exit the entire set starts again.
    """
    # Kubernetes counts restarts of a pod and of the set apart. Preemption must count for neither, an error of the run
    # must end all at once, and anything else, such as a lost connection between hosts, needs a restart of every host
    # together.
    labels = {"study": _plain(task.study.name)}
    after = lambda status: {"onExitCodes": {"containerName": "worker", "operator": "In", "values": [status]}}
    job = {
        "parallelism": task.hosts,
        "completions": task.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", **after(PREEMPTED)},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", **after(RUN_FAILED)},
            ]
        },
        "template": {"spec": _pod(task, worker_command(task, f"{SENT}/{experiment.name}"))},
    }
    # Otherwise the hosts of two runs may be spread over two slices, and neither run gets a complete one.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    one_slice = {"annotations": exclusive} if DEVICES[task.cloud.device].is_tpu and task.hosts > 1 else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": task.name, "labels": labels, **one_slice},
        "spec": {
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "worker", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(task: Task, command: str) -> dict:
    cloud, device = task.cloud, DEVICES[task.cloud.device]
    resource = "google.com/tpu" if device.is_tpu else "nvidia.com/gpu"
    selector = {f"cloud.google.com/gke-{'tpu-' if device.is_tpu else ''}accelerator": device.gke}
    if device.is_tpu:
        selector["cloud.google.com/gke-tpu-topology"] = device.topologies[task.hosts * task.per_host]
    if cloud.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{task.name}-worker-0-0.{task.name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(task.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        *({"name": variable, "value": value} for variable, value in task.environment.items()),
    ]
    container = {
        "name": "worker",
        "image": cloud.image,
        "command": ["sh", "-c", f"exec python {command}"],
        "env": variables,
        "resources": {"limits": {resource: task.per_host}},
        "volumeMounts": [{"name": "runs", "mountPath": RUNS}, {"name": "experiment", "mountPath": SENT}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": cloud.storage}},
            {"name": "experiment", "configMap": {"name": f"{_plain(task.study.name)}-experiment"}},
        ],
    }
