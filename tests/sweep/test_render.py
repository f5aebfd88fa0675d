"""Sweeps as files for clusters: what they say, and that the command in them is the one that runs anywhere."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments import quickstart
from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.sweep.experiment import chains
from mmfree_jax.sweep.render import DEVICES, Cloud, render

EXPERIMENT = Path("experiments/quickstart.py")
STUDY = quickstart.study()
BUCKET = {"storage": "s3://bucket/runs"}
CLAIM = {"storage": "claim", "image": "registry/mmfree"}


def on_mesh(**axes):
    """The quickstart with every run on a mesh of these axes."""
    wide = dataclasses.replace(quickstart.DATA, batch=96)
    runs = [dataclasses.replace(run, mesh=MeshConfig(**axes), data=wide) for run in STUDY.runs]
    return dataclasses.replace(STUDY, runs=tuple(runs))


def tasks(tmp_path, study=STUDY, **cloud):
    paths = render(study, EXPERIMENT, tmp_path, "skypilot", Cloud(**BUCKET, **cloud))
    return [yaml.safe_load(path.read_text()) for path in paths if path.suffix == ".yaml"]


def jobsets(tmp_path, study=STUDY, **cloud):
    (path,) = render(study, EXPERIMENT, tmp_path, "jobset", Cloud(**CLAIM, **cloud))
    return list(yaml.safe_load_all(path.read_text()))


def names_in(command):
    return shlex.split(command.strip().splitlines()[-1])


def test_a_skypilot_task_for_every_chain_and_a_script_that_launches_them(tmp_path):
    found = tasks(tmp_path)
    assert len(found) == len(chains(STUDY.runs)) == len({task["name"] for task in found})
    for task, chain in zip(found, chains(STUDY.runs), strict=True):
        assert names_in(task["run"])[-len(chain) :] == [run.name for run in chain]
        assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
        assert (task["resources"]["accelerators"], task["num_nodes"]) == ("H200:1", 1)
    script = (tmp_path / "skypilot" / "launch.sh").read_text()
    assert all(f"--name {task['name']} {tmp_path}/skypilot/{task['name']}.yaml" in script for task in found)


@pytest.mark.parametrize(
    ("device", "axes", "accelerators", "nodes"),
    [
        ("h200", {"fsdp": 16}, "H200:8", 2),
        ("a100", {"fsdp": 4}, "A100-80GB:4", 1),
        ("tpu-v5e", {"fsdp": 8, "data": 2}, "tpu-v5litepod-16", 1),
    ],
)
def test_the_mesh_decides_how_many_devices_a_task_gets(tmp_path, device, axes, accelerators, nodes):
    task = tasks(tmp_path, on_mesh(**axes), device=device)[0]
    assert (task["resources"]["accelerators"], task["num_nodes"]) == (accelerators, nodes)


def test_a_jobset_has_a_pod_a_host_and_carries_the_experiment(tmp_path):
    sent, first, *_ = jobsets(tmp_path, on_mesh(fsdp=16), device="tpu-v6e")
    assert sent["data"][EXPERIMENT.name] == EXPERIMENT.read_text()
    job = first["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == CLAIM["image"]
    names = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert names["JAX_NUM_PROCESSES"] == "4"
    assert names["JAX_COORDINATOR_ADDRESS"].startswith(f"{first['metadata']['name']}-worker-0-0.")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"{mounted['experiment']}/{EXPERIMENT.name}" in names_in(container["command"][-1])
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("Ignore", [75])


def test_names_are_those_that_kubernetes_takes(tmp_path):
    for document in jobsets(tmp_path):
        name = document["metadata"]["name"]
        assert len(name) <= 63
        assert name == name.lower().strip("-")
        assert all(letter.isalnum() or letter == "-" for letter in name)


@pytest.mark.parametrize(
    ("target", "axes", "cloud", "reason"),
    [
        ("skypilot", {}, {}, "--cloud.storage"),
        ("jobset", {}, {"storage": "claim"}, "--cloud.image"),
        ("skypilot", {"fsdp": 2}, {**BUCKET, "device": "tpu-v5e"}, "no tpu-v5e slice has 2 chips: use one of 1, 4, 8"),
        ("skypilot", {"fsdp": 12}, {**BUCKET, "device": "h200"}, "12 devices do not fill hosts of 8"),
    ],
)
def test_what_no_machine_has_is_refused(tmp_path, target, axes, cloud, reason):
    with pytest.raises(ConfigError, match=reason):
        render(on_mesh(**axes), EXPERIMENT, tmp_path, target, Cloud(**cloud))


def test_the_flag_writes_files_and_launches_nothing(tmp_path):
    command = [sys.executable, "launch.py", "sweep", str(EXPERIMENT), "--out", str(tmp_path), "--render", "skypilot"]
    done = subprocess.run([*command, "--cloud.storage", "gs://b/r"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in done.stdout.splitlines()]
    assert len(written) == len(chains(STUDY.runs)) + 1
    assert all(path.exists() for path in written)
    assert not (tmp_path / "runs").exists()
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1


def test_skypilot_itself_accepts_the_tasks(tmp_path, monkeypatch):
    """With SkyPilot's own parser, where it is installed: it knows every key and type."""
    monkeypatch.setenv("HOME", str(tmp_path))  # it writes there
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    for device in DEVICES:
        for path in render(on_mesh(fsdp=8), EXPERIMENT, tmp_path, "skypilot", Cloud(device=device, **BUCKET)):
            if path.suffix == ".yaml":
                task = sky.Task.from_yaml(str(path))
                assert task.num_nodes == 1
                assert task.run is not None
                break
