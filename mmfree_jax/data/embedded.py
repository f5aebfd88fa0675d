"""The corpus that needs no download: the documentation strings of Python packages that this project depends on anyway.

Every file of a package is one document: the docstrings of its module, classes and functions in source order, dedented
and cleaned. What comes out depends on the installed versions only, not on cores, file order or hash seeds.
"""

import ast
import gc
import importlib.metadata
import inspect
import itertools
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.data.text import looks_english, normalise
from mmfree_jax.data.workers import available_cores, run_parts

SHORTEST = 200  # characters; shorter documentation strings are signatures and one-line labels
REQUIRED = ("flax", "grain", "jax", "matplotlib", "numpy", "optax", "orbax-checkpoint", "plotly", "rich", "scipy")
# Dependencies of dependencies: used where present, so that a leaner installation still gets a corpus.
PRESENT = (
    "absl-py", "contourpy", "etils", "filelock", "fonttools", "fsspec", "huggingface-hub", "jaxlib", "narwhals",
    "opt-einsum", "packaging", "pillow", "protobuf", "pyparsing", "python-dateutil", "tensorboardx", "tokenizers",
    "treescope", "tyro",
)  # fmt: skip
STANDARD_LIBRARY = "python"
# Not on every machine (distributions of Python split them off), not prose, or other people's packages.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ dist-packages distutils ensurepip idlelib lib2to3 pydoc_data site-packages test tests tkinter "
    "turtledemo".split()
)


@dataclass(frozen=True)
class Package:
    """Where one package's text comes from."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, str], ...]  # (name inside the package, path on this machine), sorted by name


def _licence(metadata: importlib.metadata.PackageMetadata) -> str:
    fields = metadata.json
    expression = fields.get("license_expression")
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in fields.get("classifier", []) if c.startswith("License ::")]
    first_line = str(fields.get("license", "")).strip().split("\n")[0][:80]
    return str(expression or ", ".join(classifiers) or first_line or "not stated")


def _installed(name: str) -> Package:
    distribution = importlib.metadata.distribution(name)
    if distribution.files is None:
        raise ValueError(f"{name} was installed without a list of its files; reinstall it with pip")
    sources = [file for file in distribution.files if file.suffix == ".py" and not file.is_absolute()]
    files = sorted((file.as_posix(), str(file.locate())) for file in sources if ".." not in file.parts)
    kept = tuple(file for file in files if not _SKIPPED_FOLDERS & set(file[0].split("/")[:-1]))
    return Package(name, distribution.version, _licence(distribution.metadata), kept)


def _standard_library() -> Package:
    root = sysconfig.get_paths()["stdlib"]
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        names += [os.path.relpath(os.path.join(folder, file), root) for file in files if file.endswith(".py")]
    listed = tuple((f"python/{Path(name).as_posix()}", os.path.join(root, name)) for name in sorted(names))
    return Package(STANDARD_LIBRARY, platform.python_version(), "PSF-2.0", listed)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Package -> version of what makes up the embedded corpus, sorted by name, the standard library last.

    Raises ModuleNotFoundError naming a package of REQUIRED that is not installed.
    """
    found = {name: _version(name) for name in sorted(REQUIRED + PRESENT)}
    missing = [name for name in REQUIRED if found[name] is None]
    if missing:
        what = f"the embedded corpus is made of the documentation of {', '.join(missing)}, not installed here"
        raise ModuleNotFoundError(f"{what}: pip install {' '.join(missing)}")
    present = {name: version for name, version in found.items() if version is not None}
    return present | {STANDARD_LIBRARY: platform.python_version()}


def installed_packages() -> list[Package]:
    """The packages of `installed_versions` in its order, with their licences and files."""
    return [_installed(name) if name != STANDARD_LIBRARY else _standard_library() for name in installed_versions()]


def _docstring_node(body: Sequence[ast.stmt]) -> ast.Constant | None:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def _documented(body: Sequence[ast.stmt]) -> Iterator[ast.Constant]:
    """Documentation strings in source order of a body and of everything defined in it."""
    node = _docstring_node(body)
    if node is not None:
        yield node
    for statement in body:
        for inner in ast.walk(statement) if isinstance(statement, ast.If | ast.Try | ast.With) else [statement]:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _documented(inner.body)


def docstrings(source: bytes) -> list[str]:
    """The cleaned documentation strings of Python source, in source order, without regard to their length.

    Raises SyntaxError, or ValueError for null bytes, when `source` is not Python 3.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        tree = ast.parse(source)
    unique = {(node.lineno, node.col_offset): node.value for node in _documented(tree.body)}
    return [normalise(inspect.cleandoc(str(unique[place]))) for place in sorted(unique)]


@dataclass(frozen=True)
class Extracted:
    """What one source file gave; sizes in UTF-8 bytes."""

    passages: tuple[str, ...]
    found_bytes: int
    short_bytes: int
    not_english_bytes: int
    parsed: bool


def extract(source: bytes) -> Extracted:
    """The documentation strings of a source file that are long enough and read as English, and what was left out."""
    if b'"""' not in source and b"'''" not in source:
        return Extracted((), 0, 0, 0, True)
    try:
        found = docstrings(source)
    except (SyntaxError, ValueError):  # templates and Python 2 test data inside packages
        return Extracted((), 0, 0, 0, False)
    size = lambda texts: sum(len(text.encode("utf-8", "replace")) for text in texts)
    long = [text for text in found if len(text) > SHORTEST]
    kept = tuple(text.encode("utf-8", "replace").decode() for text in long if looks_english(text))
    return Extracted(kept, size(found), size(found) - size(long), size(long) - size(kept), True)


def extract_files(paths: Sequence[str]) -> list[Extracted]:
    """`extract` for files; runs in a worker."""
    gc.disable()  # syntax trees are many objects without cycles: looking for some would take a fifth of the time
    try:
        return [extract(Path(path).read_bytes()) for path in paths]
    finally:
        gc.enable()


def extract_packages(packages: Sequence[Package], processes: int | None = None) -> list[list[Extracted]]:
    """What every file of every package gave, in the order of the packages and their files."""
    paths = [path for package in packages for _, path in package.files]
    count = max(1, min(processes or available_cores(), 8, len(paths)))
    parts = run_parts(__name__, "extract_files", [paths[i::count] for i in range(count)], count)
    flat = [parts[i % count][i // count] for i in range(len(paths))]
    results = iter(flat)
    return [list(itertools.islice(results, len(package.files))) for package in packages]
