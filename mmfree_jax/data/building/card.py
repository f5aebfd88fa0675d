"""The data card: where the text comes from, under which licence, and what was removed."""

from collections.abc import Mapping, Sequence
from typing import Any


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    lines = [head, ["---:" if row and isinstance(row, int) else "---" for row in (rows[0] if rows else head)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source_row(name: str, version: str, licence: str, documents: int, steps: Mapping[str, int]) -> dict[str, Any]:
    """One source of the card. steps: what was left after each step, in bytes of UTF-8, in order."""
    return {"source": name, "version": version, "licence": licence, "documents": documents, "bytes_after": dict(steps)}


def totals(sources: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes left after each step over all sources."""
    steps = list(sources[0]["bytes_after"]) if sources else []
    return {step: sum(source["bytes_after"][step] for source in sources) for step in steps}


def _flaws(card: Mapping[str, Any]) -> str:
    """A section on input that is missing or changed in the set; empty if there is none."""
    counts = [("bad_records", "records left out that could not be read")]
    counts += [("replaced_characters", "characters replaced by U+FFFD or dropped, because they were not UTF-8")]
    lines = [f"- {card[name]:,} {words}" for name, words in counts if card.get(name)]
    lines += [f"  - {example}" for example in card.get("bad_record_examples", ())]
    lines += [f"- {line}" for line in card.get("left_out", ())]
    return "\n".join(["\n## Not in the set", "", *lines, ""]) if lines else ""


def readable(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    sources = card.get("sources", [])
    steps = list(sources[0]["bytes_after"]) if sources else []
    rows = [
        [s["source"], s["version"], s["licence"], s["documents"], *(s["bytes_after"][step] for step in steps)]
        for s in sources
    ]
    summed = totals(sources)
    rows.append(["total", "", "", sum(s["documents"] for s in sources), *summed.values()])
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
