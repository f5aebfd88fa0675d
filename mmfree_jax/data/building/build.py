"""Builds token sets from input of any size: in parallel, resumable, and the same with any number of processes."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmfree_jax.data.building.inputs import Documents, Reading, Unit
from mmfree_jax.data.building.text import looks_english, normalise
from mmfree_jax.data.building.token_writer import finish, write_texts
from mmfree_jax.data.building.workers import available_cores, run_parts
from mmfree_jax.data.reading.token_set import TOKENIZER, TokenSet
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer, load, train_bpe
from mmfree_jax.files import locked, naming, read_json, write_json
from mmfree_jax.output import Say

TRAINING_SAMPLE = 80_000_000  # largest number of characters that a tokenizer is trained on
SPLITS = ("train", "valid")
PLAN = "plan.json"
RECORD = "unit-{:05d}.json"  # that the shards of a unit are complete


@dataclass(frozen=True)
class Recipe:
    """How every document is processed before it becomes tokens."""

    reading: Reading = field(default_factory=Reading)
    clean: bool = True  # `text.normalise`
    english: bool = False  # leave out what `text.looks_english` refuses
    shortest: int = 1  # characters; shorter documents are left out
    held_out: float = 0.01  # share of the documents; the content decides, so copies go to the same split

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held out {self.held_out}: a share of the documents, from 0 to below 1")


def texts(unit: Unit, recipe: Recipe, documents: Documents) -> Iterator[tuple[str, str]]:
    """Yield split and text of the documents of a unit that the recipe keeps."""
    for raw in documents:
        text = normalise(raw) if recipe.clean else raw
        if len(text) >= recipe.shortest and (not recipe.english or looks_english(text)):
            yield unit.split or split_by_lot(text, recipe.held_out), text


def split_by_lot(text: str, held_out: float) -> str:
    """Return "valid" for about a share `held_out` of all texts, else "train"; only the text decides."""
    # The content decides, not the place: the split does not change when files are added, renamed or read in another
    # order, and copies of a text cannot be in both.
    lot = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "valid" if int.from_bytes(lot, "big") < held_out * 2**64 else "train"


def train_tokenizer(units: Sequence[Unit], recipe: Recipe, vocab_size: int) -> Tokenizer:
    """Train a BPE on the beginning of every unit, an equal share of each, training documents only, 80 MB in total."""
    # From the beginning of every unit, not of the input: files that follow one another are alike.
    share = TRAINING_SAMPLE // max(len(units), 1)

    def sample() -> Iterator[str]:
        for unit in units:
            used = 0
            for split, text in texts(unit, recipe, Documents(unit, recipe.reading)):
                if used >= share:
                    break
                if split == "train":
                    yield text[: share - used]
                    used += len(text)

    return train_bpe(sample(), vocab_size)


@dataclass(frozen=True)
class Job:
    """One unit of input, which becomes shards of its own."""

    folder: str
    number: int
    unit: Unit
    recipe: Recipe


def tokenise(job: Job) -> dict[str, Any]:
    """Write the shards of a unit and then the record that they are complete. Runs in a worker."""
    folder = Path(job.folder)
    documents = Documents(job.unit, job.recipe.reading)
    labelled = texts(job.unit, job.recipe, documents)
    tokenizer = load(folder / TOKENIZER)
    with naming(folder):
        splits = write_texts(folder, labelled, tokenizer, SPLITS, suffix=f"-{job.number:05d}")
        record = {"splits": splits, **unreadable([documents])}
        write_json(folder / RECORD.format(job.number), record)
    return record


def unreadable(read: Sequence[Documents]) -> dict[str, Any]:
    """Describe for the data card which input is missing or changed in the documents."""
    bad = [example for documents in read for example in documents.bad]
    replaced = sum(documents.replaced for documents in read)
    return {"bad_records": len(bad), "bad_record_examples": bad[:5], "replaced_characters": replaced}


def _identity(units: Sequence[Unit], recipe: Recipe, vocab_hash: str) -> dict[str, Any]:
    """What must be equal if a build is to continue another one."""
    # Size and time of change stand for the content of files, which may be terabytes.
    files = sorted({file for unit in units for file in unit.files if Path(file).exists()})
    stats = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    everything = [[asdict(unit) for unit in units], asdict(recipe), stats]
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    return {"input": digest, "vocab_hash": vocab_hash}


def _begin(folder: Path, identity: dict[str, Any], tokenizer: Tokenizer, progress: Say) -> None:
    """Prepare the building folder: an empty one, or that of an interrupted build of the same input."""
    plan = folder / PLAN
    if plan.exists() and read_json(plan) == identity:
        progress("going on with an interrupted build")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(folder / TOKENIZER)
    write_json(plan, identity)


def _tokenise_all(jobs: Sequence[Job], processes: int, progress: Say) -> list[dict[str, Any]]:
    # A unit with a record is complete: an interrupted build goes on with the others, in any number of processes.
    began, size = time.monotonic(), 0
    records = {job.number: Path(job.folder) / RECORD.format(job.number) for job in jobs}
    todo = [job for job in jobs if not records[job.number].exists()]
    finished = len(jobs) - len(todo)

    def done(_: int, record: dict[str, Any]) -> None:
        nonlocal finished, size
        finished += 1
        size += sum(entry["text_bytes"] for entry in record["splits"].values())
        rate = size / 1e6 / max(time.monotonic() - began, 1e-3)
        progress(f"tokenised {finished} of {len(jobs)} units, {size / 1e6:.0f} MB of text at {rate:.1f} MB/s")

    run_parts(__name__, "tokenise", todo, processes, done) if todo else None
    return [read_json(path) for path in records.values()]


def _publish(folder: Path, path: Path, records: Sequence[dict[str, Any]], card: Mapping[str, Any]) -> None:
    """Complete the set in `folder`: write the index, delete the records of the build, rename."""
    splits: dict[str, dict[str, Any]] = {}
    for name in SPLITS:
        entries = [record["splits"][name] for record in records]
        splits[name] = {key: sum(entry[key] for entry in entries) for key in ("tokens", "documents", "text_bytes")}
        splits[name]["shards"] = [shard for entry in entries for shard in entry["shards"]]
    known = [card, *records]  # the card counts what was found before the units were written
    counts = {name: sum(one.get(name, 0) for one in known) for name in ("bad_records", "replaced_characters")}
    examples = [example for one in known for example in one.get("bad_record_examples", ())][:20]
    finish(folder, splits, load(folder / TOKENIZER), {**card, **counts, "bad_record_examples": examples})
    # The records go only now, so that a failure before costs nothing.
    for file in [folder / PLAN, *folder.glob(RECORD.replace("{:05d}", "*"))]:
        file.unlink()
    os.rename(folder, path)


def build(
    path: Path,
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    recipe: Recipe,
    card: Mapping[str, Any],
    *,
    processes: int | None = None,
    progress: Say = print,
) -> TokenSet:
    """Tokenise `units` into a token set at `path`. Called again after an interruption, it does only what is left.

    Raises FileExistsError when `path` exists, WorkerError with the file and place when input is bad, LockedError when
    another process is building the same set, OSError when the disk is full (what is done is kept for the next attempt).
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it or choose another folder")
    if not units:
        raise ValueError("there is nothing to build from")
    work = path.with_name(f".{path.name}.building")
    with locked(work), naming(work):
        folder = work / "set"
        _begin(folder, _identity(units, recipe, tokenizer.vocab_hash), tokenizer, progress)
        jobs = [Job(str(folder), number, unit, recipe) for number, unit in enumerate(units)]
        records = _tokenise_all(jobs, processes or available_cores(), progress)
        if not sum(record["splits"][name]["tokens"] for record in records for name in SPLITS):
            raise ValueError("no document of the input was kept: look at its format and the filters")
        _publish(folder, path, records, {"tokenizer": tokenizer.description, **card})
        shutil.rmtree(work)
    return TokenSet.open(path)
