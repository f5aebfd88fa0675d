"""NVIDIA's MPS around workers, with stand-ins for its daemon and for the driver."""

import os
import stat
from pathlib import Path

import pytest

from mmfree_jax.sweep import mps

# Writes what it is told into a log; `-d` fails if a file says so.
CONTROL = """#!/bin/sh
case "$1" in -d)
    echo "start ${{CUDA_VISIBLE_DEVICES-all}}" >> {log}
    test -d "$CUDA_MPS_PIPE_DIRECTORY" && test -d "$CUDA_MPS_LOG_DIRECTORY" || exit 3
    if test -e {broken}; then echo "cannot start: no permission"; exit 1; fi
    exit 0
esac
read line; echo "$line" >> {log}
"""


CLIENT = "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == '0'; os.stat(os.environ['CUDA_MPS_PIPE_DIRECTORY'])"


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """The folder of the stand-in, first in PATH; `log` has what it did."""
    program = tmp_path / mps.CONTROL
    program.write_text(CONTROL.format(log=tmp_path / "log", broken=tmp_path / "broken"))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(mps.PIPES, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(mps, "CLIENT", CLIENT)
    return tmp_path


def done(daemon):
    return (daemon / "log").read_text().splitlines()


def test_workers_become_clients_and_the_daemon_ends_with_the_block(daemon):
    said: list[str] = []
    with mps.service(["0", "1"], said.append) as env:
        assert set(env) == {mps.PIPES, mps.LOGS}
        assert all(Path(path).is_dir() for path in env.values())
        assert done(daemon) == ["start all"]
    assert done(daemon) == ["start all", "quit"]
    assert not any(Path(path).exists() for path in env.values())
    assert said == ["MPS: workers share GPUs"]


def test_it_ends_when_the_sweep_fails(daemon):
    with pytest.raises(KeyboardInterrupt), mps.service(["0"], print):
        raise KeyboardInterrupt
    assert done(daemon)[-1] == "quit"


@pytest.mark.parametrize("fault", ["daemon", "client", "missing", "set"])
def test_where_it_cannot_serve_workers_take_turns_and_the_reason_is_said(daemon, monkeypatch, fault):
    said: list[str] = []
    expected = {
        "daemon": "cannot start: no permission",
        "client": "the driver's error 805",
        "missing": f"no {mps.CONTROL} here",
        "set": "workers use the service that is there",
    }[fault]
    if fault == "daemon":
        (daemon / "broken").touch()
    elif fault == "client":
        monkeypatch.setattr(mps, "CLIENT", 'raise SystemExit("the driver\'s error 805")')
    elif fault == "missing":
        monkeypatch.setenv("PATH", str(daemon / "nowhere"))
    else:
        monkeypatch.setenv(mps.PIPES, "/tmp/theirs")
    with mps.service(["0"], said.append) as env:
        assert env == {}
    assert len(said) == 1
    assert expected in said[0]
    ours = (daemon / "log").exists() and done(daemon)[-1] == "quit"
    assert ours == (fault in ("daemon", "client"))  # somebody else's daemon is not ended
