"""A small made-up package tree, and helpers that the data tests share."""

import random
import subprocess
import sys
from pathlib import Path

from mmfree_jax.data.building.embedded import Package

ROOT = Path(__file__).parents[2]
WORDS = (
    "the of and to in is that for it as with are this by not value array function returns given shape axis number "
    "matrix solve linear system error when each element input output window sample random model layer weight update "
    "gradient step size default optional integer float string list file path name read write open close buffer memory"
).split()

FILES = 40  # in each made-up package


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(8, 14))).capitalize() + "."


def passage(rng: random.Random, sentences: int = 8) -> str:
    return "\n    ".join(sentence(rng) for _ in range(sentences))


def source_file(rng: random.Random, functions: int = 4) -> str:
    parts = [f'"""{passage(rng)}"""\n']
    parts += [f'def f{i}(x):\n    """{passage(rng)}"""\n    return x\n' for i in range(functions)]
    return "\n".join(parts)


def write_package(folder: Path, name: str, files: dict[str, bytes]) -> Package:
    for file, content in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_bytes(content)
    listed = tuple((f"{name}/{file}", str(folder / name / file)) for file in sorted(files))
    return Package(name, "1.0", "MIT", listed)


def made_up_packages(folder: Path) -> list[Package]:
    """Two packages of FILES files each, the same every time."""
    rng = random.Random(7)
    return [
        write_package(folder, name, {f"m{i:02d}.py": source_file(rng).encode() for i in range(FILES)})
        for name in ("alpha", "beta")
    ]


def run_python(code: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a new process that can import the project and these helpers."""
    paths = f"{ROOT}:{Path(__file__).parent}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=check,
    )
