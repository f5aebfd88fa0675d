"""Programs on eight simulated devices, in processes of their own: their number is fixed when JAX starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.files import locked
from tests.compiling import xla_flags

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 900  # for what takes a minute or two on an idle machine


def run(*arguments: str) -> tuple[str, str]:
    """What `python ARGUMENTS`, from the project's root, says on the standard output and beside it."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def run_once(folders: pytest.TempPathFactory, name: str, *arguments: str) -> tuple[str, str]:
    """The same, run once for all the processes that share the tests."""
    shared = folders.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path = shared / f"{name}-{os.environ.get('PYTEST_XDIST_TESTRUNUID', 'alone')}.json"
    with locked(shared / path.stem, wait_s=PATIENCE_SECONDS):
        if not path.exists():
            path.write_text(json.dumps(run(*arguments)), encoding="utf-8")
    said, beside = json.loads(path.read_text(encoding="utf-8"))
    return said, beside
