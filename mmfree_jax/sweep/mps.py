"""NVIDIA's Multi-Process Service (MPS): kernels of several processes run beside each other on a GPU, where without it
processes take turns."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mmfree_jax.nvidia import VISIBLE

# The daemon belongs to a user and a pipe directory. Ours has a directory of its own, so it neither meets nor ends one
# that somebody else has started, and clients are those processes whose environment names the directory. It sees all
# GPUs: from a selection, clients would have to choose by new numbers.

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
SECONDS = 30.0  # for the daemon and for its first client
# A client: the driver answers, and gives it a context on the first GPU that it sees.
CLIENT = """
import ctypes
cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
failed = cuda.cuInit(0) or cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0) or cuda.cuCtxDestroy_v2(context)
raise SystemExit(failed and f"the driver's error {failed}")
"""


@contextlib.contextmanager
def service(gpus: list[str], say: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """Start a daemon for these GPUs, and end it when the block ends. Yields the environment that makes a client.

    It is empty, and `say` is told why, where there is no daemon, where the user runs one already, or where it does not
    serve: in containers without permission, for example.
    """
    if os.environ.get(PIPES):
        say(f"MPS: {PIPES} is set: workers use the service that is there")
        yield {}
        return
    if shutil.which(CONTROL) is None:
        say(f"MPS: no {CONTROL} here: workers take turns on a GPU")
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mmfree-mps-") as folder:
        env = {PIPES: f"{folder}/pipes", LOGS: f"{folder}/logs"}
        for path in env.values():
            Path(path).mkdir()
        of_daemon = {name: value for name, value in {**os.environ, **env}.items() if name != VISIBLE}
        of_client = {**of_daemon, VISIBLE: gpus[0]}
        try:
            why = _failure([CONTROL, "-d"], of_daemon) or _failure([sys.executable, "-c", CLIENT], of_client)
            say(f"MPS: does not serve here ({why}): workers take turns on a GPU" if why else "MPS: workers share GPUs")
            yield {} if why else env
        finally:
            _failure([CONTROL], of_daemon, "quit\n")


def _failure(command: list[str], env: dict[str, str], typed: str = "") -> str:
    """Run a command. Returns why it failed, or nothing."""
    try:
        done = subprocess.run(command, env=env, input=typed, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"{command[0]} ended with status {done.returncode}"
