"""The embedded corpus, which needs no download: docstrings of Python packages that this project depends on anyway.

Every file of a package is one document: the docstrings of its module, classes and functions in source order, dedented
and cleaned. The result depends only on the installed versions, not on cores, file order or hash seeds.
"""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmfree_jax.data.building import card as cards
from mmfree_jax.data.building.prepare import Document, prepare
from mmfree_jax.data.building.text import looks_english, normalise
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.building.workers import available_cores, run_parts
from mmfree_jax.data.reading.token_set import TokenSet
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer, train_bpe
from mmfree_jax.output import Say, quiet

EMBEDDED = "embedded"
BUILDER = 2  # increase it when the same packages would give another corpus
HELD_OUT = 0.042  # share of the bytes: about 240 thousand tokens at vocabulary 2048
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


_STEPS = {
    "found": "all documentation strings",
    "long": f"those of more than {SHORTEST} characters",
    "read": "those that read as English",
    "exact": "without exact copies of passages and of long paragraphs",
    "near": "without passages of Jaccard similarity 0.7 or more to an earlier one",
    "protected": "without training passages that share a quarter of their 8-word runs with held-out text",
}
_DESCRIPTION = (
    "Documentation strings of installed Python packages: technical English with code in it. A document is one source "
    "file; training and held-out text are divided by document. The text belongs to the packages' authors and stays on "
    "this machine."
)


@dataclass(frozen=True)
class Package:
    """The source files of one package."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, str], ...]  # (name inside the package, path on this machine), sorted by name


def _installed(name: str) -> Package:
    distribution = importlib.metadata.distribution(name)
    if distribution.files is None:
        raise ValueError(f"{name} was installed without a list of its files; reinstall it with pip")
    # What pip has recorded, not what lies in the folder: caches and generated files differ between machines.
    sources = [file for file in distribution.files if file.suffix == ".py" and not file.is_absolute()]
    files = sorted((file.as_posix(), str(file.locate())) for file in sources if ".." not in file.parts)
    kept = tuple(file for file in files if not _SKIPPED_FOLDERS & set(file[0].split("/")[:-1]))
    # Packages state their licence in one of three fields, of which the last may hold the entire text.
    fields = distribution.metadata.json
    classifiers = [c.rsplit(" :: ", 1)[-1] for c in fields.get("classifier", []) if c.startswith("License ::")]
    first_line = str(fields.get("license", "")).strip().split("\n")[0][:80]
    licence = fields.get("license_expression") or ", ".join(classifiers) or first_line or "not stated"
    return Package(name, distribution.version, str(licence), kept)


def _standard_library() -> Package:
    root = sysconfig.get_paths()["stdlib"]
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        names += [os.path.relpath(os.path.join(folder, file), root) for file in files if file.endswith(".py")]
    listed = tuple((f"python/{Path(name).as_posix()}", os.path.join(root, name)) for name in sorted(names))
    return Package(STANDARD_LIBRARY, platform.python_version(), "PSF-2.0", listed)


def installed_versions() -> dict[str, str]:
    """Return the version of each package in the embedded corpus, sorted by name, the standard library last.

    Raises ModuleNotFoundError naming a package of REQUIRED that is not installed.
    """
    found = {}
    for name in sorted(REQUIRED + PRESENT):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        what = f"the embedded corpus is made of the documentation of {', '.join(missing)}, not installed here"
        raise ModuleNotFoundError(f"{what}: pip install {' '.join(missing)}")
    return found | {STANDARD_LIBRARY: platform.python_version()}


def installed_packages() -> list[Package]:
    """Return the packages of `installed_versions` in its order, with their licences and files."""
    return [_installed(name) if name != STANDARD_LIBRARY else _standard_library() for name in installed_versions()]


def _documented(body: Sequence[ast.stmt]) -> Iterator[ast.Constant]:
    """Docstrings of a body and of everything defined in it, in source order."""
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield first.value
    for statement in body:
        for inner in ast.walk(statement) if isinstance(statement, ast.If | ast.Try | ast.With) else [statement]:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _documented(inner.body)


def docstrings(source: bytes) -> list[str]:
    """Return the cleaned documentation strings of Python source, in source order, of any length.

    Raises SyntaxError, or ValueError for null bytes, when `source` is not Python 3.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        tree = ast.parse(source)
    # `ast.walk` visits a definition in an `if` inside another twice; places in the source are unique.
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
    """Return the documentation strings of a source file that are long and English, and what was left out."""
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
    """Call `extract` for files, in a worker."""
    gc.disable()  # syntax trees are many objects without cycles: looking for some would take a fifth of the time
    try:
        return [extract(Path(path).read_bytes()) for path in paths]
    finally:
        gc.enable()


def extract_packages(packages: Sequence[Package], processes: int | None = None) -> list[list[Extracted]]:
    """Extract every file of every package, in the order of the packages and their files."""
    paths = [path for package in packages for _, path in package.files]
    # Dealt out in turn, so that every process gets files of every package: large files lie together.
    count = max(1, min(processes or available_cores(), 8, len(paths)))
    parts = run_parts(__name__, "extract_files", [paths[i::count] for i in range(count)], count)
    flat = [parts[i % count][i // count] for i in range(len(paths))]
    results = iter(flat)
    return [list(itertools.islice(results, len(package.files))) for package in packages]


def embedded_name(vocab_size: int) -> str:
    """Folder name of the embedded corpus: it changes with the installed packages and with how the corpus is built."""
    identity = json.dumps([BUILDER, HELD_OUT, list(installed_versions().items())])
    return f"{EMBEDDED}-{vocab_size}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def collect(
    packages: Sequence[Package], processes: int | None = None
) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """Return the documents of the packages, and bytes left per source after the steps `found` and `long`."""
    documents = []
    left: dict[str, dict[str, int]] = {"found": {}, "long": {}}
    for package, files in zip(packages, extract_packages(packages, processes), strict=True):
        left["found"][package.name] = sum(file.found_bytes for file in files)
        left["long"][package.name] = sum(file.found_bytes - file.short_bytes for file in files)
        for (name, _), file in zip(package.files, files, strict=True):
            if file.passages:
                documents.append(Document(package.name, name, file.passages))
    return documents, left


def build_embedded(
    path: Path,
    vocab_size: int,
    *,
    packages: Sequence[Package] | None = None,
    tokenizer: Tokenizer | None = None,
    processes: int | None = None,
    progress: Say = quiet,
) -> TokenSet:
    """Build the corpus of `packages` (the installed ones) at `path`, which must not exist.

    tokenizer: instead of one of `vocab_size` tokens trained on the text.
    """
    began = time.monotonic()
    say = lambda message: progress(f"{message} [{time.monotonic() - began:.0f} s]")
    packages = installed_packages() if packages is None else packages
    say(f"reading the documentation of {len(packages)} packages")
    documents, left = collect(packages, processes)
    say(f"removing repetitions from {len(documents)} documents")
    prepared = prepare(documents, held_out=HELD_OUT, shortest=SHORTEST, keep_boilerplate=True)
    train, valid = ([document.text for document in some] for some in (prepared.train, prepared.valid))
    if tokenizer is None:
        say(f"training a tokenizer of {vocab_size} tokens")
        tokenizer = train_bpe(train, vocab_size)
    say("writing tokens")
    sources = [(package.name, package.version, package.licence) for package in packages]
    rows = cards.source_rows(sources, _STEPS, replace(prepared, left=left | prepared.left))
    card = {"name": EMBEDDED, "builder": BUILDER, "description": _DESCRIPTION, "steps": _STEPS, "sources": rows}
    result = write_token_set(path, {"train": train, "valid": valid}, tokenizer, card)
    say(f"{len(result.split('train')):,} training and {len(result.split('valid')):,} held-out tokens at {path}")
    return result
