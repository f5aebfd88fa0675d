"""Tiers S, M and L: large corpora of English text from distribution packages. Building them is resumable."""

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.data.building import card as cards
from mmfree_jax.data.building.build import Recipe, build, train_tokenizer
from mmfree_jax.data.building.distributions import TIERS, Source, fetch, members, version_of
from mmfree_jax.data.building.extraction import from_sword, paragraphs_of
from mmfree_jax.data.building.inputs import Unit
from mmfree_jax.data.building.prepare import STEPS, Document, prepare
from mmfree_jax.data.building.spill import spill
from mmfree_jax.data.building.workers import available_cores, run_parts
from mmfree_jax.data.reading.token_set import TokenSet
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.files import locked, naming, read_json, write_atomically
from mmfree_jax.output import Say

HELD_OUT = 0.01  # of the bytes
DOCUMENT_BYTES = 65_536  # a longer file (a dictionary, an entire book) becomes several documents
_SKIPPED = re.compile(
    r"/(_static|_images|images?|fonts?|css|js|locale|LC_MESSAGES|_sources|testdata|testsuite/gcc.target)/"
    r"|/(changelog|copyright|NEWS)\.?(Debian)?(\.gz)?$|/(search|genindex|py-modindex)[^/]*\.html"
    r"|[/.](ar|bg|ca|cs|da|de|el|es|et|eu|fa|fi|fr|gl|he|hr|hu|id|it|ja|ko|lt|nb|nl|nn|pl|pt|pt[-_]BR|ro|ru|sk|sl|sr|sv|th|tr"
    r"|uk|vi|zh|zh[-_]CN|zh[-_]TW)(/|\.html)"
)
_DESCRIPTION = (
    "English from distribution packages (tier {tier}), paragraph by paragraph; the text belongs to its authors."
)
_STEPS = STEPS | {"read": "paragraphs of running English"}
_SCRATCH = ".fetching-"  # prefix of the folders that packages are fetched into


@dataclass(frozen=True)
class Task:
    """One package to turn into documents, in a worker."""

    source: Source
    folder: str  # where the result goes
    archive: str | None = None  # an archive that is there already, instead of a download


def _file_name(source: Source) -> str:
    return re.sub(r"[^\w.+-]", "_", f"{source.client}-{source.package}")


def _parts(name: str, paragraphs: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Documents of at most about DOCUMENT_BYTES."""
    # Held-out text is chosen by document: one that is a large share of the corpus could not be held out at all.
    part: list[str] = []
    size = number = 0
    for i, paragraph in enumerate(paragraphs, 1):
        part.append(paragraph)
        size += len(paragraph)
        if size >= DOCUMENT_BYTES or i == len(paragraphs):
            yield f"{name}#{number}", part
            part, size, number = [], 0, number + 1


def read_archive(source: Source, archive: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, paragraphs) of the documents in a package."""
    if source.sword:
        for name, paragraphs in from_sword(dict(members(archive))):
            yield from _parts(name, paragraphs)
        return
    # A slash in front lets an expression name the beginning of a path.
    wanted = re.compile(source.only)
    for name, data in members(archive):
        if wanted.search(f"/{name}") and not _SKIPPED.search(f"/{name}"):
            paragraphs = paragraphs_of(f"/{name}", data, comments=source.comments, pdf=source.pdf)
            yield from _parts(name, paragraphs)


def collect(task: Task) -> dict[str, Any]:
    """Download one package and write its documents. The file appears only when it is complete."""
    began = time.monotonic()
    path = Path(task.folder) / f"{_file_name(task.source)}.jsonl"
    # Archives are read as streams and removed; only the text stays on the disk.
    with naming(path.parent), tempfile.TemporaryDirectory(dir=task.folder, prefix=_SCRATCH) as scratch:
        archive = Path(task.archive) if task.archive else fetch(task.source, Path(scratch))
        head = {"source": asdict(task.source), "version": version_of(archive)}
        documents = [json.dumps(document) for document in read_archive(task.source, archive)]
        if not documents:
            raise RuntimeError(f"{archive.name} holds no prose that can be read: it has changed, leave it out")
        write_atomically(path, "\n".join([json.dumps(head), *documents]) + "\n")
    return {"bytes": path.stat().st_size, "documents": len(documents), "seconds": time.monotonic() - began}


def _need_programs(sources: Sequence[Source]) -> None:
    """Raise RuntimeError naming the programs to install, before the first download instead of an hour later."""
    clients = {"apt": "apt-get", "pip": sys.executable, "npm": "npm"}
    needed = {clients[source.client] for source in sources} | {"dpkg-deb" for s in sources if s.client == "apt"}
    needed |= {"pdftotext" for source in sources if source.pdf}
    missing = sorted(program for program in needed if not shutil.which(program))
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)} (pdftotext is in poppler-utils)")


def _collect_all(sources: Sequence[Source], folder: Path, processes: int | None, progress: Say) -> None:
    for scratch in folder.glob(f"{_SCRATCH}*"):  # of a process that was killed
        shutil.rmtree(scratch)
    todo = [source for source in sources if not (folder / f"{_file_name(source)}.jsonl").exists()]
    _need_programs(todo)
    progress(f"{len(sources) - len(todo)} of {len(sources)} packages are here already")

    def done(number: int, result: dict[str, Any]) -> None:
        size, seconds = result["bytes"] / 1e6, result["seconds"]
        progress(f"{todo[number].package}: {result['documents']} documents, {size:.1f} MB, {seconds:.0f} s")

    if todo:
        run_parts(__name__, "collect", [Task(source, str(folder)) for source in todo], processes, done)


def _read(sources: Sequence[Source], folder: Path) -> tuple[list[Document], list[dict[str, Any]]]:
    documents, heads = [], []
    for source in sources:
        with (folder / f"{_file_name(source)}.jsonl").open(encoding="utf-8") as file:
            heads.append(json.loads(file.readline()))
            documents += [Document(source.package, name, tuple(passages)) for name, passages in map(json.loads, file)]
    return documents, heads


def _prepared(tier: str, work: Path, processes: int, progress: Say) -> tuple[list[Unit], dict[str, Any]]:
    """Units and card of a tier. What an earlier call has done is not done again."""
    record = work / "prepared.json"
    if not record.exists():
        _collect_all(TIERS[tier], work, processes, progress)
        documents, heads = _read(TIERS[tier], work)
        progress(f"removing repetitions from {len(documents)} documents")
        prepared = prepare(documents, held_out=HELD_OUT)
        units = spill(prepared, work / "prepared")
        sources = [(head["source"]["package"], head["version"], head["source"]["licence"]) for head in heads]
        card = {
            "name": f"tier {tier.upper()}",
            "description": _DESCRIPTION.format(tier=tier.upper()),
            "steps": _STEPS,
            "sources": cards.source_rows(sources, _STEPS, prepared),
        }
        work_done = {"units": [asdict(unit) for unit in units], "card": card}
        write_atomically(record, json.dumps(work_done))
    known = read_json(record)
    return [Unit(**{**unit, "files": tuple(unit["files"])}) for unit in known["units"]], known["card"]


def build_tier(
    tier: str,
    path: Path,
    vocab_size: int,
    *,
    tokenizer: Tokenizer | None = None,
    processes: int | None = None,
    progress: Say = print,
) -> TokenSet:
    """Build tier "s", "m" or "l" at `path`. Downloads are stored beside it, so that a second call can continue.

    tokenizer: instead of one of `vocab_size` tokens trained on the text.
    Raises RuntimeError naming the package that cannot be fetched or read, or a program that is not installed;
    FileExistsError when `path` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it or choose another folder")
    work = path.with_name(f".{path.name}.packages")
    processes = processes or available_cores()
    with locked(work), naming(work):
        units, card = _prepared(tier, work, processes, progress)
        recipe = Recipe(clean=False)
        if tokenizer is None:
            size = sum(source["bytes_after"]["protected"] for source in card["sources"]) / 1e6
            progress(f"training a tokenizer of {vocab_size} tokens on {size:.0f} MB of text")
            tokenizer = train_tokenizer(units, recipe, vocab_size)
        result = build(path, units, tokenizer, recipe, card, processes=processes, progress=progress)
        shutil.rmtree(work)
    return result
