"""Hostile input that was once read wrongly is refused in one line now, and some new input of every kind is too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.reliability_fuzz import READERS, all_inputs, fault, kept, restored

ROOT = Path(__file__).parents[2]
IN_PROCESS = [reader for reader in READERS if reader.name not in ("huggingface", "packed")]  # these need JAX's compiler


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_inputs_that_were_findings_are_refused_cleanly(reader, tmp_path):
    for path in kept(reader):
        assert not fault(reader, restored(path), tmp_path), path.name


@pytest.mark.parametrize("reader", IN_PROCESS, ids=lambda reader: reader.name)
def test_a_few_mutated_inputs_of_each_kind_are_read_or_refused_cleanly(reader, tmp_path):
    tried = all_inputs(reader, seed=7)
    for _ in range(len(kept(reader)) + 40):
        files = next(tried)
        assert not (why := fault(reader, files, tmp_path)), (files, why)


def test_what_a_reader_does_wrong_is_a_finding(tmp_path, monkeypatch):
    """A script that could not fail would prove nothing."""
    config = READERS[0]
    with monkeypatch.context() as patch:
        patch.setattr("mmfree_jax.run_folder.from_json", lambda *_: {}["missing"])
        assert "KeyError: 'missing'" in fault(config, config.seeds()[0], tmp_path)
    assert fault(config, config.seeds()[0], tmp_path) == ""


@pytest.mark.slow
def test_a_minute_of_hostile_input_finds_nothing():
    command = [sys.executable, "-m", "experiments.reliability_fuzz", "--seconds", "30"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
