"""Executes tutorials: `python -m tests.tutorial docs/tutorials/*.md` runs their blocks of sh and Python, in order.

Each tutorial gets a folder of its own that shows docs/ and experiments/ of the checkout; `mmfree` is that of the
checkout.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MMFREE = """#!/bin/sh
exec {python} -c 'import sys; sys.argv[0] = "mmfree"; from mmfree_jax.commands import command; sys.exit(command())' "$@"
"""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the blocks to execute, in order."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S)


def execute(tutorial: Path, folder: Path) -> None:
    """Run a tutorial in a folder. Raises CalledProcessError for the first block that fails."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "mmfree").write_text(MMFREE.format(python=sys.executable))
    (bin_folder / "mmfree").chmod(0o755)
    for name in ("docs", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for language, text in blocks(tutorial.read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        print(f"\n--- {tutorial.name}, {language}\n{text}", flush=True)
        subprocess.run(command, cwd=folder, env=env, check=True)


def main(paths: list[str]) -> None:
    """Run each tutorial in a temporary folder."""
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            execute(Path(path), Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
