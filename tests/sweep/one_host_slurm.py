"""A real SLURM of one node, this machine, without accounting: starts in a second or two, as root, beside any other."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.sweep.ports import free_port

CPUS = 4  # whatever the machine has
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")

# cred_expire: how long a requeued job is kept back. config_overrides: do not count the machine's cores.
# linuxproc, task/none, gather/none: no cgroups, which a container may not touch.
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=3
CompleteWait=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty if there can."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"SLURM's {', '.join(absent)} not found (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "starting SLURM takes root"


@contextlib.contextmanager
def one_host_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands reach it. Raises RuntimeError, with the logs, if it does not start.

    `folder`: new, with a short name, as it holds a socket.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=host, cpus=CPUS, controller=free_port(), daemon=free_port()))
    env = {**os.environ, "SLURM_CONF": str(config)}
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"))]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    try:
        for command in (["munged", "--force", *munge], ["slurmctld", "-c"], ["slurmd", "-c"]):
            subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120)
        _wait_until_idle(env, folder)
        yield env
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["scancel", "--state=RUNNING", "--signal=KILL"], env=env, timeout=60, capture_output=True)
            subprocess.run(["scancel", "--me"], env=env, timeout=60, capture_output=True)
        for name in ("slurmd.pid", "slurmctld.pid", "munge.pid"):
            _end(folder / name)


def _wait_until_idle(env: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    said = ""
    while time.monotonic() < deadline:
        asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True)
        said = asked.stdout.strip() + asked.stderr.strip()
        if said == "idle":
            return
        time.sleep(0.1)
    logs = "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in folder.glob("*.log"))
    raise RuntimeError(f"SLURM did not come up ({said}){logs}")


def _end(pid_file: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, 15)
        for _ in range(10):
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, 9)
