"""Documents that were prepared in memory, written out as units that `build` tokenises in parallel."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmfree_jax.data.inputs import Documents, Reading, Unit
from mmfree_jax.data.prepare import Document, Prepared
from mmfree_jax.data.text import looks_english, normalise, paragraphs

SPILLED_BYTES = 16_000_000  # of text in a unit: what fits in memory should keep many cores busy


def documents_of(units: Sequence[Unit], reading: Reading, *, english: bool, shortest: int) -> list[Document]:
    """All documents of the units in memory, cleaned, with their paragraphs as passages, for `prepare`."""
    result = []
    for unit in units:
        source = Path(unit.files[0]).name
        for number, raw in enumerate(Documents(unit, reading)):
            text = normalise(raw)
            if len(text) >= shortest and (not english or looks_english(text)):
                result.append(Document(source, f"{unit.start}:{number}", tuple(paragraphs(text))))
    return result


def _write_unit(path: Path, texts: Iterable[str], split: str) -> Unit:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    return Unit("jsonl", (str(path),), 0, path.stat().st_size, split)


def spill(prepared: Prepared, folder: Path) -> list[Unit]:
    """Write the documents as JSON lines into `folder`, which is emptied first; returns units that name their split."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    units: list[Unit] = []
    for split, documents in (("train", prepared.train), ("valid", prepared.valid)):
        texts: list[str] = []
        size = 0
        for i, document in enumerate(documents, 1):
            texts.append(document.text)
            size += len(texts[-1])
            if size >= SPILLED_BYTES or i == len(documents):
                units.append(_write_unit(folder / f"{split}-{len(units):05d}.jsonl", texts, split))
                texts, size = [], 0
    return units
