"""Sweeps as files for clusters: what they say, and that the command in them is the one that runs anywhere."""

import dataclasses
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import launch
from experiments import ladder, quickstart
from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.sweep.experiment import chains
from mmfree_jax.sweep.render import DEVICES, Cloud, render
from mmfree_jax.sweep.worker import parse
from tests.in_process import called

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
    paths = render(study, EXPERIMENT, tmp_path, "skypilot", Cloud(**{**BUCKET, **cloud}))
    return [yaml.safe_load(path.read_text()) for path in paths if path.suffix == ".yaml"]


def jobsets(tmp_path, study=STUDY, **cloud):
    (path,) = render(study, EXPERIMENT, tmp_path, "jobset", Cloud(**CLAIM, **cloud))
    return list(yaml.safe_load_all(path.read_text()))


def names_in(command):
    return shlex.split(command.strip().splitlines()[-1])


def after_worker(words):
    return words[words.index("mmfree_jax.sweep.worker") + 1 :]


def test_a_skypilot_task_for_every_chain_and_a_script_that_launches_them(tmp_path):
    found = tasks(tmp_path)
    assert len(found) == len(chains(STUDY.runs)) == len({task["name"] for task in found})
    for task, chain in zip(found, chains(STUDY.runs), strict=True):
        assert names_in(task["run"])[-len(chain) :] == [run.name for run in chain]
        assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
        assert (task["resources"]["accelerators"], task["num_nodes"]) == ("H200:1", 1)
    script = (tmp_path / "skypilot" / "launch.sh").read_text()
    assert all(f"--name {task['name']} {tmp_path}/skypilot/{task['name']}.yaml" in script for task in found)
    assert f"\ncd {Path.cwd()}  #" in script
    subprocess.run(["sh", "-n", tmp_path / "skypilot" / "launch.sh"], check=True)


@pytest.mark.parametrize(
    ("device", "axes", "accelerators", "nodes"),
    [
        ("h200", {"fsdp": 16}, "H200:8", 2),
        ("a100", {"fsdp": 4}, "A100-80GB:4", 1),
        ("tpu-v5e", {"fsdp": 8, "data": 2}, "tpu-v5litepod-16", 1),
        ("tpu-v5p", {"fsdp": 16}, "tpu-v5p-32", 1),  # by cores, of which a chip has two
    ],
)
def test_the_mesh_decides_how_many_devices_a_task_gets(tmp_path, device, axes, accelerators, nodes):
    task = tasks(tmp_path, on_mesh(**axes), device=device, storage="gs://b")[0]
    assert (task["resources"]["accelerators"], task["num_nodes"]) == (accelerators, nodes)
    assert task["file_mounts"]["/runs"]["mode"] == ("MOUNT_CACHED" if device == "a100" else "MOUNT")  # of one host


def test_a_slice_of_v5p_is_a_cube(tmp_path):
    _, first, *_ = jobsets(tmp_path, on_mesh(fsdp=16), device="tpu-v5p")
    pod = first["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"


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
    assert first["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_a_preempted_pod_starts_again_and_one_whose_run_failed_does_not(tmp_path):
    first = jobsets(tmp_path)[1]
    policy = first["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]
    by_status = {
        status: rule["action"] for rule in policy["rules"] for status in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_status == {75: "Ignore", 1: "FailJob"}
    assert [rule["action"] for rule in policy["rules"] if "onPodConditions" in rule] == ["Ignore"]
    (failed,) = first["spec"]["failurePolicy"]["rules"]
    assert (failed["action"], failed["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_a_time_limit_and_a_corpus_that_has_to_be_brought_are_passed_on(tmp_path):
    study = ladder.study()
    script, *paths = render(study, EXPERIMENT, tmp_path, "skypilot", Cloud(**BUCKET), limit_hours=1.5)
    (jobs,) = render(study, EXPERIMENT, tmp_path, "jobset", Cloud(**CLAIM), limit_hours=1.5)
    assert "# First, once: mmfree corpus build m --vocab 4096" in script.read_text()
    assert jobs.read_text().startswith("# First, once: mmfree corpus build m --vocab 4096")
    task = yaml.safe_load(paths[0].read_text())
    container = list(yaml.safe_load_all(jobs.read_text()))[1]["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = container["template"]["spec"]["containers"][0]
    assert task["envs"] == {"MMFREE_JAX_CACHE": "/runs/cache"}
    assert {"name": "MMFREE_JAX_CACHE", "value": "/runs/cache"} in container["env"]
    for command in (task["run"], container["command"][-1]):
        assert parse(after_worker(names_in(command))).limit_hours == 1.5
    assert tasks(tmp_path)[0]["envs"] == {}
    last = STUDY.runs[-1]
    mixed = dataclasses.replace(last, name="mixed", data=dataclasses.replace(last.data, mixture=("s",)), branch=None)
    more = dataclasses.replace(STUDY, runs=(*STUDY.runs, mixed))
    script, *_ = render(more, EXPERIMENT, tmp_path / "more", "skypilot", Cloud(**BUCKET))
    assert "mmfree corpus build s --vocab 2048" in script.read_text()


LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"  # RFC 1035, which JobSet asks for


@pytest.mark.parametrize("study", ["quickstart", "2 Studies whose name goes on beyond what a pod's name can hold"])
def test_names_are_those_that_kubernetes_takes(tmp_path, study):
    """JobSet's webhook refuses a set whose longest pod's name would not fit; 256 chips are 64 hosts."""
    documents = jobsets(tmp_path, dataclasses.replace(on_mesh(fsdp=32, data=3), name=study), device="h200")
    sets = [document["metadata"] for document in documents[1:]]
    assert len({one["name"] for one in sets}) == len(chains(STUDY.runs))
    for one in sets:
        assert re.fullmatch(LABEL, one["name"])
        assert len(f"{one['name']}-worker-0-63-abcde") <= 63
        assert re.fullmatch(LABEL, one["labels"]["study"])


@pytest.mark.parametrize(
    ("target", "axes", "cloud", "reason"),
    [
        ("skypilot", {}, {}, "--cloud.storage"),
        ("skypilot", {}, {"storage": "my-claim"}, "needs a bucket"),
        ("skypilot", {}, {**BUCKET, "image": "i"}, "--cloud.image is for JobSets"),
        ("skypilot", {"fsdp": 16}, BUCKET, "its 2 hosts can share a Google bucket only"),
        ("jobset", {}, {**CLAIM, "storage": "gs://b/r"}, "needs a volume claim"),
        ("jobset", {}, {"storage": "claim"}, "--cloud.image"),
        ("skypilot", {"fsdp": 2}, {**BUCKET, "device": "tpu-v5e"}, "no tpu-v5e slice has 2 chips: use one of 1, 4, 8"),
        ("skypilot", {"fsdp": 12}, {**BUCKET, "device": "h200"}, "12 devices do not fill hosts of 8"),
    ],
)
def test_what_no_machine_has_is_refused(tmp_path, target, axes, cloud, reason):
    with pytest.raises(ConfigError, match=reason):
        render(on_mesh(**axes), EXPERIMENT, tmp_path, target, Cloud(**cloud))


def test_the_flag_writes_files_and_launches_nothing(tmp_path):
    command = ["sweep", EXPERIMENT, "--out", tmp_path, "--render", "skypilot"]
    done = called(launch.main, *command, "--cloud.storage", "gs://b/r")
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in done.stdout.splitlines()]
    assert len(written) == len(chains(STUDY.runs)) + 1
    assert all(path.exists() for path in written)
    assert not (tmp_path / "runs").exists()
    refused = called(launch.main, *command)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1


def test_an_experiment_outside_the_folder_that_skypilot_sends_is_refused(tmp_path):
    outside = tmp_path / "mine.py"
    outside.write_text("")
    with pytest.raises(ConfigError, match=r"mine.py: SkyPilot sends the working folder"):
        render(STUDY, outside, tmp_path, "skypilot", Cloud(**BUCKET))
    absolute = render(STUDY, EXPERIMENT.resolve(), tmp_path, "skypilot", Cloud(**BUCKET))[1]
    assert f"--experiment {EXPERIMENT} " in absolute.read_text()


def test_skypilot_itself_accepts_the_tasks(tmp_path, monkeypatch):
    """With SkyPilot's own parser, where it is installed: it knows every key and type."""
    monkeypatch.setenv("HOME", str(tmp_path))  # it writes there
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    for device, axes in itertools.product(DEVICES, ({}, {"fsdp": 8}, {"fsdp": 16})):
        cloud = Cloud(device=device, storage="gs://bucket/runs")
        path = render(on_mesh(**axes), EXPERIMENT, tmp_path, "skypilot", cloud)[1]
        task = sky.Task.from_yaml(str(path))
        (resources,) = task.resources
        assert resources.use_spot
        assert resources.job_recovery["recover_on_exit_codes"] == [75]
        assert list(task.storage_mounts) == ["/runs"]
        assert task.num_nodes == (2 if axes == {"fsdp": 16} and not DEVICES[device].is_tpu else 1)
        assert names_in(task.run)[-1] == chains(STUDY.runs)[0][-1].name
