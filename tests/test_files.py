"""Files are whole or absent; a folder has one writer at a time."""

import json
import os
import subprocess
import sys
import time

import pytest

from mmfree_jax.files import LockedError, last_line, locked, read_json, write_atomically, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(TypeError):
        write_atomically(path, 3)
    assert read_json(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_read_json_names_the_broken_file(tmp_path):
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not JSON"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("text", "expected"), [("", ""), ("a\nb\nhalf", "b"), ("half", ""), ("a\n" + "x" * 50 + "\n", "x" * 50)]
)
def test_last_line_is_the_last_complete_one(tmp_path, text, expected):
    (tmp_path / "log").write_text(text)
    assert last_line(tmp_path / "log", window=64) == expected


def test_a_folder_is_locked_against_other_processes_until_its_holder_dies(tmp_path):
    hold = """
import sys, time
from pathlib import Path
from mmfree_jax.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="another process"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    start = time.monotonic()
    with locked(tmp_path, wait_s=5):
        assert time.monotonic() - start < 1
    assert json.dumps(sorted(os.listdir(tmp_path))) == '[".lock"]'
