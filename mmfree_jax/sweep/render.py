"""A sweep as files for a cluster that is not here: SkyPilot tasks, or Kubernetes JobSets. Nothing is launched.

Each chain of runs is one task, on as many devices as its mesh has. Tasks do not depend on each other, do the same
command as every other executor (`mmfree_jax.sweep.worker`), share one folder of runs and may be stopped and started at
any point: exit status 75 asks for another start.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from mmfree_jax.config import RunConfig, require
from mmfree_jax.files import write_atomically
from mmfree_jax.sweep.experiment import Study, chains, machines
from mmfree_jax.training.interrupt import PREEMPTED

Target = Literal["skypilot", "jobset"]
RUNS = "/runs"  # where the shared folder is mounted
SENT = "/experiment"  # where a container finds the experiment file
PORT = 61440  # of process 0 of a run that several processes share
RESTARTS = 100  # of a task whose machines are taken away


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator by its names: SkyPilot's (of one, or of a slice of {n} chips), GKE's node label, the pip extra."""

    sky: str
    gke: str
    extra: str
    per_host: int

    @property
    def is_tpu(self) -> bool:
        """Whether several make a slice with a topology."""
        return self.extra == "tpu"


DEVICES = {
    "h200": Device("H200", "nvidia-h200-141gb", "cuda13", 8),
    "h100": Device("H100", "nvidia-h100-80gb", "cuda13", 8),
    "a100": Device("A100-80GB", "nvidia-a100-80gb", "cuda13", 8),
    "tpu-v5e": Device("tpu-v5litepod-{n}", "tpu-v5-lite-podslice", "tpu", 4),
    "tpu-v6e": Device("tpu-v6e-{n}", "tpu-v6e-slice", "tpu", 4),
}
TOPOLOGIES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What rendered tasks run on. How many devices a task gets is the size of its runs' mesh."""

    device: Literal["h200", "h100", "a100", "tpu-v5e", "tpu-v6e"] = "h200"
    """Accelerator."""
    storage: str = ""
    """Folder for the runs that all machines see: a bucket (s3://…, gs://…) for SkyPilot, a volume claim for JobSet."""
    spot: bool = True
    """Machines that may be taken away: cheaper, and a run goes on where it was."""
    image: str = ""
    """Container image with this package and JAX for the device (JobSet); SkyPilot sends the working folder."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The machines of one task: hosts, devices on each, and all of them together."""

    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        """Of all hosts."""
        return self.hosts * self.per_host


def render(study: Study, experiment: Path, out: Path, target: Target, cloud: Cloud) -> list[Path]:
    """Write the files of a sweep into out/TARGET and return their paths.

    Raises ConfigError for a mesh that no such machines have, runs of one chain on different meshes, or no storage.
    """
    example = {"skypilot": "s3://my-bucket/runs", "jobset": "my-claim"}[target]
    require(bool(cloud.storage), f"--render {target} needs a folder that all machines see: --cloud.storage {example}")
    require(target != "jobset" or bool(cloud.image), "--render jobset needs an image with this package: --cloud.image")
    tasks = {task_name(study, chain): (chain, shape(chain, cloud)) for chain in chains(study.runs)}
    require(len(tasks) == len(chains(study.runs)), f"study {study.name}: some names differ only in signs or at the end")
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    if target == "skypilot":
        return _skypilot(study, experiment, folder, cloud, tasks)
    sent = experiment_map(study, experiment)
    documents = [sent, *(jobset(study, experiment, name, chain, cut, cloud) for name, (chain, cut) in tasks.items())]
    path = folder / "jobsets.yaml"
    write_atomically(path, "---\n".join(map(_yaml, documents)))
    return [path]


def task_name(study: Study, chain: Sequence[RunConfig]) -> str:
    """A name that Kubernetes and SkyPilot take: letters, digits and dashes; that of the chain's first run."""
    return _plain(f"{study.name}-{chain[0].name}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-")


def shape(chain: Sequence[RunConfig], cloud: Cloud) -> Shape:
    """The machines for a chain's mesh."""
    device, count = DEVICES[cloud.device], chain[0].mesh.devices
    if device.is_tpu:
        near = ", ".join(map(str, TOPOLOGIES))
        require(count in TOPOLOGIES, f"{chain[0].name}: no {cloud.device} slice has {count} chips: use one of {near}")
    return Shape(*machines(chain, device.per_host, "host"))


def worker_command(study: Study, experiment: str | Path, chain: Sequence[RunConfig]) -> str:
    """The one command of every executor, for a machine that has the experiment file and the folder of runs."""
    names = shlex.join(run.name for run in chain)
    place = shlex.join(["--experiment", str(experiment), f"{RUNS}/{study.name}"])
    return f"python -m mmfree_jax.sweep.worker {place} {names}"


def skypilot(study: Study, experiment: Path, name: str, chain: Sequence[RunConfig], cut: Shape, cloud: Cloud) -> dict:
    """A managed job (docs.skypilot.co, "SkyPilot YAML"); on a slice SkyPilot counts each host as a node."""
    device = DEVICES[cloud.device]
    accelerators = device.sky.format(n=cut.devices) if device.is_tpu else f"{device.sky}:{cut.per_host}"
    return {
        "name": name,
        "resources": {
            "accelerators": accelerators,
            "use_spot": cloud.spot,
            "job_recovery": {"max_restarts_on_errors": 1, "recover_on_exit_codes": [PREEMPTED]},
        },
        "num_nodes": 1 if device.is_tpu else cut.hosts,
        "workdir": ".",
        "file_mounts": {RUNS: {"source": cloud.storage, "mode": "MOUNT_CACHED"}},
        "setup": f"pip install . 'jax[{device.extra}]'\n",
        "run": f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"\n'
        + "export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK\n"
        + f"exec {worker_command(study, experiment, chain)}\n",
    }


def _skypilot(study: Study, experiment: Path, folder: Path, cloud: Cloud, tasks: dict) -> list[Path]:
    paths = []
    for name, (chain, cut) in tasks.items():
        paths.append(folder / f"{name}.yaml")
        write_atomically(paths[-1], _yaml(skypilot(study, experiment, name, chain, cut, cloud)))
    launch = "".join(f"sky jobs launch --yes --async --name {path.stem} {shlex.quote(str(path))}\n" for path in paths)
    script = folder / "launch.sh"
    write_atomically(script, f"#!/bin/sh\n# From the folder that holds {experiment}.\nset -e\n{launch}")
    script.chmod(0o755)
    return [script, *paths]


def experiment_map(study: Study, experiment: Path) -> dict:
    """The experiment file as a ConfigMap, for containers that do not hold it."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{_plain(study.name)}-experiment"},
        "data": {experiment.name: experiment.read_text(encoding="utf-8")},
    }


def jobset(study: Study, experiment: Path, name: str, chain: Sequence[RunConfig], cut: Shape, cloud: Cloud) -> dict:
    """A JobSet (jobset.sigs.k8s.io, v1alpha2) on GKE's node labels: an indexed job with a pod a host.

    Exit status 75 starts a pod again without counting; a failed or evicted one starts the whole set again.
    """
    device = DEVICES[cloud.device]
    resource = "google.com/tpu" if device.is_tpu else "nvidia.com/gpu"
    selector = {f"cloud.google.com/gke-{'tpu-' if device.is_tpu else ''}accelerator": device.gke}
    if device.is_tpu:
        selector["cloud.google.com/gke-tpu-topology"] = TOPOLOGIES[cut.devices]
    if cloud.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables = [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-worker-0-0.{name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(cut.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
    container = {
        "name": "worker",
        "image": cloud.image,
        "command": ["sh", "-c", f"exec {worker_command(study, f'{SENT}/{experiment.name}', chain)}"],
        "env": variables,
        "resources": {"limits": {resource: cut.per_host}},
        "volumeMounts": [{"name": "runs", "mountPath": RUNS}, {"name": "experiment", "mountPath": SENT}],
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": cloud.storage}},
            {"name": "experiment", "configMap": {"name": f"{_plain(study.name)}-experiment"}},
        ],
    }
    again = {"action": "Ignore", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [PREEMPTED]}}
    job = {
        "parallelism": cut.hosts,
        "completions": cut.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [again]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "labels": {"study": _plain(study.name)}},
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS},
            "replicatedJobs": [{"name": "worker", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _yaml(document: dict) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks of lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
