"""The recipes of CONTRIBUTING.md: each diff applies to the packages as they are, and the lines after it run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = re.findall(
    r"^## Add (an? \w+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```.*?^```python\n(.*?)^```",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.M | re.S,
)


def test_the_recipes_are_those_that_a_newcomer_needs():
    assert [name for name, _, _ in RECIPES] == ["a mixer", "a kernel", "a law", "an executor"]


@pytest.mark.slow
@pytest.mark.parametrize(("diff", "check"), [recipe[1:] for recipe in RECIPES], ids=[recipe[0] for recipe in RECIPES])
def test_a_recipe_applies_and_works(diff, check, tmp_path):
    for package in ("mmfree_jax", "scaling", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # else git takes paths from a checkout around it
    subprocess.run(["git", "apply", "--whitespace=error", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "MMFREE_JAX_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
