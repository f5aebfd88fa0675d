"""The data card: where the text comes from, under which licence, and what was removed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmfree_jax.data.building.prepare import Prepared


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    # Numbers are right-aligned; the first row tells which columns hold numbers.
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    lines = [head, ["---:" if row and isinstance(row, int) else "---" for row in (rows[0] if rows else head)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source_rows(
    sources: Iterable[tuple[str, str, str]], steps: Iterable[str], prepared: Prepared
) -> list[dict[str, Any]]:
    """Return a row of the card for each source (name, version, licence).

    It has the source's documents in the set, and its bytes of UTF-8 left after each step of `prepared`, in order.
    """
    # A source of which nothing is left is listed all the same, with zeros.
    counts = Counter(document.source for document in prepared.train + prepared.valid)
    rows: list[dict[str, Any]] = []
    for name, version, licence in sources:
        left = {step: prepared.left[step].get(name, 0) for step in steps}
        row = {"source": name, "version": version, "licence": licence, "documents": counts[name], "bytes_after": left}
        rows.append(row)
    return rows


def _flaws(card: Mapping[str, Any]) -> str:
    """A section on input that is missing or changed in the set; empty if there is none."""
    # What was left out belongs to the description of a corpus as much as what is in it.
    counts = [("bad_records", "records left out that could not be read")]
    counts += [("replaced_characters", "characters replaced by U+FFFD or dropped, because they were not UTF-8")]
    lines = [f"- {card[name]:,} {words}" for name, words in counts if card.get(name)]
    lines += [f"  - {example}" for example in card.get("bad_record_examples", ())]
    lines += [f"- {line}" for line in card.get("left_out", ())]
    return "\n".join(["\n## Not in the set", "", *lines, ""]) if lines else ""


def readable(card: Mapping[str, Any]) -> str:
    """Return the card as Markdown."""
    sources = card.get("sources", [])
    steps = list(sources[0]["bytes_after"]) if sources else []
    rows = [
        [s["source"], s["version"], s["licence"], s["documents"], *(s["bytes_after"][step] for step in steps)]
        for s in sources
    ]
    summed = [sum(s["bytes_after"][step] for s in sources) for step in steps]
    rows.append(["total", "", "", sum(s["documents"] for s in sources), *summed])
    splits = [[name, s["tokens"], s["documents"], s["text_bytes"]] for name, s in card["splits"].items()]
    return f"""# {card["name"]}

{card["description"]}

{_table(["split", "tokens", "documents", "bytes of text"], splits)}

Tokenizer: {card["tokenizer"]} ({card["vocab_size"]:,} tokens, vocabulary {card["vocab_hash"][:16]}).
Content: {card["fingerprint"]}.
{_flaws(card)}
## Sources

Bytes of UTF-8 left after each step{"".join(f"; {step}: {why}" for step, why in card.get("steps", {}).items())}.

{_table(["source", "version", "licence", "documents", *steps], rows)}
"""
