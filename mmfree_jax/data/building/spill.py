"""Writes documents that were prepared in memory to disk, as units that `build` tokenises in parallel."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmfree_jax.data.building.inputs import Documents, Reading, Unit
from mmfree_jax.data.building.prepare import Document, Prepared
from mmfree_jax.data.building.text import looks_english, normalise, paragraphs

SPILLED_BYTES = 16_000_000  # bytes of text in a unit: small, so that many cores have work


def documents_of(
    units: Sequence[Unit], reading: Reading, *, english: bool, shortest: int
) -> tuple[list[Document], list[Documents]]:
    """Read and clean all documents of the units, with their paragraphs as passages, for `prepare`.

    Also returns the readers, which know what they could not read.
    """
    # Names are places in the input: the same on every machine, and stable while files are added behind.
    result, every = [], [Documents(unit, reading) for unit in units]
    for unit, documents in zip(units, every, strict=True):
        source = Path(unit.files[0]).name
        for number, raw in enumerate(documents):
            text = normalise(raw)
            if len(text) >= shortest and (not english or looks_english(text)):
                result.append(Document(source, f"{unit.start}:{number}", tuple(paragraphs(text))))
    return result, every


def spill(prepared: Prepared, folder: Path) -> list[Unit]:
    """Write the documents as JSON lines into `folder`; returns units that name their split.

    Files of an earlier call with the same documents are left as they are, all others go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units: list[Unit] = []
    for split, documents in (("train", prepared.train), ("valid", prepared.valid)):
        texts: list[str] = []
        size = 0
        for i, document in enumerate(documents, 1):
            texts.append(document.text)
            size += len(texts[-1])
            if size >= SPILLED_BYTES or i == len(documents):
                path = folder / f"{split}-{len(units):05d}.jsonl"
                data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
                # An unchanged file keeps its time of writing, by which an interrupted build recognises its input.
                if not path.is_file() or path.read_bytes() != data:
                    path.write_bytes(data)
                units.append(Unit("jsonl", (str(path),), 0, len(data), split))
                texts, size = [], 0
    for file in set(folder.iterdir()) - {Path(unit.files[0]) for unit in units}:
        file.unlink()
    return units
