"""`mmfree corpus`: build, show, check and pack token sets, and convert those of other programs."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mmfree_jax.config import require
from mmfree_jax.data.building import card as cards
from mmfree_jax.data.building.build import Recipe, build, train_tokenizer, unreadable
from mmfree_jax.data.building.embedded import EMBEDDED, build_embedded
from mmfree_jax.data.building.foreign import convert
from mmfree_jax.data.building.inputs import Reading, Unit, plan
from mmfree_jax.data.building.packing import pack
from mmfree_jax.data.building.prepare import STEPS, prepare
from mmfree_jax.data.building.spill import documents_of, spill
from mmfree_jax.data.building.tiers import build_tier
from mmfree_jax.data.corpora import NAMED, resolve_corpus, tier_folder
from mmfree_jax.data.reading.token_set import READABLE_CARD, TokenSet
from mmfree_jax.data.tokenizers import tokenizer as tokenization
from mmfree_jax.files import url_of
from mmfree_jax.output import program

_OWN_INPUT = ("key", "skip_bad", "raw", "english", "shortest", "dedup", "held_out")  # options of `build`


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage in one line, like every other error."""

    # argparse prints a usage of ten lines and exits with 2, which is the status of a gate here.
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _without_repetitions(
    options: argparse.Namespace, units: Sequence[Unit], reading: Reading, folder: Path
) -> tuple[list[Unit], dict]:
    """Units and card of the input after `prepare`, which needs all of the text in memory. Documents go to `folder`."""
    _say("reading everything to remove repetitions")
    documents, read = documents_of(units, reading, english=options.english, shortest=options.shortest)
    prepared = prepare(documents, held_out=options.held_out)
    spilled = spill(prepared, folder)
    sources = [(name, "", "not stated") for name in dict.fromkeys(document.source for document in documents)]
    rows = cards.source_rows(sources, STEPS, prepared)
    return spilled, {"steps": STEPS, "sources": rows, **unreadable(read)}


def _build_input(options: argparse.Namespace) -> TokenSet:
    if options.dedup and options.raw:
        raise ValueError("--raw and --dedup exclude each other: repetitions are found in cleaned text")
    reading = Reading(options.key, options.skip_bad)
    recipe = Recipe(reading, not options.raw, options.english, options.shortest, options.held_out)
    left_out: list[str] = []
    units = plan(options.what, left_out.append)
    for line in left_out:
        _say(line)
    card = {"name": options.out.name, "description": f"Built from {', '.join(options.what)}.", "sources": []}
    card["left_out"] = left_out
    # In a folder beside the set: an interrupted build finds it there, and only a finished one removes it.
    documents = options.out.with_name(f".{options.out.name}.documents")  # without repetitions, until tokenised
    if options.dedup:
        units, more = _without_repetitions(options, units, reading, documents)
        recipe, card = Recipe(clean=False), card | more
    if options.tokenizer:
        tokenizer = tokenization.named(options.tokenizer)
    else:
        _say(f"training a tokenizer of {options.vocab} tokens")
        tokenizer = train_tokenizer(units, recipe, options.vocab)
    result = build(options.out, units, tokenizer, recipe, card, processes=options.processes, progress=_say)
    for name in ("bad_records", "replaced_characters"):
        if result.card[name]:
            _say(f"{result.card[name]:,} {name.replace('_', ' ')} (see {options.out / READABLE_CARD})")
    if options.dedup:
        shutil.rmtree(documents)
    return result


def _build_named(options: argparse.Namespace) -> TokenSet:
    name, out = options.what[0], options.out
    # A named corpus is the same everywhere because nobody can change how it is made.
    given = [f"--{key.replace('_', '-')}" for key in _OWN_INPUT if getattr(options, key) != options.default(key)]
    if given:
        raise ValueError(f"{', '.join(given)}: for input of your own; how corpus {name!r} is prepared is fixed")
    if options.tokenizer and out is None:
        raise ValueError("--tokenizer needs --out: only sets with a vocabulary trained on them are found by name")
    settings = {
        "tokenizer": tokenization.named(options.tokenizer) if options.tokenizer else None,
        "processes": options.processes,
        "progress": _say,
    }
    if name != EMBEDDED:
        return build_tier(name, out or tier_folder(name, options.vocab), options.vocab, **settings)
    return build_embedded(out, options.vocab, **settings) if out else resolve_corpus(name, options.vocab, progress=_say)


def _build(options: argparse.Namespace) -> None:
    # A name stands alone: beside files, `s` would be a file of that name.
    named = len(options.what) == 1 and options.what[0] in NAMED
    if options.out is None and not named:
        raise ValueError("--out is required: the folder of the new token set")
    try:
        result = _build_named(options) if named else _build_input(options)
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on from here")
        raise
    for name, split in result.splits.items():
        size = result.text_bytes(name)
        print(f"{name}: {len(split):,} tokens, {split.documents:,} documents, {size:,} bytes of text")
    print(result.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `corpus` with the given arguments. Raises ValueError for wrong usage, and what the verbs raise."""
    options = _parser().parse_args(argv)
    for path in (getattr(options, name, None) for name in ("out", "set")):
        require(path is None or not url_of(path), f"{path and url_of(path)} is a URL: give a path of this machine")
    if options.verb == "build":
        _build(options)
    elif options.verb == "info":
        print((TokenSet.open(options.set).path / READABLE_CARD).read_text(encoding="utf-8"))
    elif options.verb == "verify":
        began = time.monotonic()
        TokenSet.open(options.set).verify()
        print(f"{options.set} is complete and undamaged ({time.monotonic() - began:.1f} s)")
    elif options.verb == "pack":
        loose, sequence, out = TokenSet.open(options.set), options.sequence, options.out
        rows = len(pack(loose, out, sequence).split("train")) // sequence
        padding = 1 - len(loose.split("train")) / (rows * sequence)
        print(f"{rows:,} rows of {sequence} tokens, {padding:.2%} of them padding, at {out}")
        print(f"train on it with --data.corpus {out} --data.sequence {sequence} --data.separate-documents")
    else:
        files = {"train": options.train} | ({"valid": options.valid} if options.valid else {})
        result = convert(files, tokenization.named(options.tokenizer), options.out, options.dtype)
        for name, split in result.splits.items():
            print(f"{name}: {len(split):,} tokens, {split.documents:,} documents")
    return 0


def _add_convert(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("convert", help="make a token set from .bin files of nanoGPT, llm.c or Megatron")
    parser.add_argument(
        "train", type=Path, help="the .bin file to train on (Megatron: with its .idx in the same folder)"
    )
    parser.add_argument("--valid", type=Path, help="the .bin file to evaluate on")
    parser.add_argument(
        "--tokenizer", required=True, help="the tokenizer that made the tokens: mistral, a tokenizer.json or a .model"
    )
    parser.add_argument(
        "--dtype",
        default="uint16",
        choices=["uint16", "uint32", "int32"],
        help="type of the numbers in plain files [uint16]",
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the token set")


def _add_build(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("build", help="make a token set from a named corpus or from files")
    parser.set_defaults(default=parser.get_default)
    parser.add_argument("what", nargs="+", help=f"{', '.join(NAMED)}, or files, folders and hf:NAME[:CONFIG]")
    parser.add_argument(
        "--out",
        type=Path,
        help="new folder for the token set; without it a named corpus goes to the cache, where runs find it by name",
    )
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--vocab", type=int, default=2048, help="size of the BPE vocabulary to train [2048]")
    words.add_argument(
        "--tokenizer",
        help="use this tokenizer instead of training one: bytes, mistral, a tokenizer.json or a SentencePiece .model",
    )
    parser.add_argument("--key", default="text", help="field with the text in JSON lines and Parquet [text]")
    parser.add_argument("--skip-bad", action="store_true", help="leave out records that cannot be read and count them")
    parser.add_argument("--raw", action="store_true", help="do not clean line ends and spaces")
    parser.add_argument("--english", action="store_true", help="leave out documents that are not English")
    parser.add_argument("--shortest", type=int, default=1, help="leave out documents with fewer characters [1]")
    parser.add_argument(
        "--dedup", action="store_true", help="remove boilerplate, exact and near duplicates (needs all text in memory)"
    )
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the documents to evaluate on [0.01]")
    parser.add_argument("--processes", type=int, help="number of worker processes [all cores]")


def _parser() -> _Parser:
    parser = _Parser(prog=f"{program()} corpus", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="build|convert|info|verify|pack")
    _add_build(verbs)
    _add_convert(verbs)
    for name, text in (("info", "show the data card"), ("verify", "read all of it and compare checksums")):
        verbs.add_parser(name, help=text).add_argument("set", type=Path, help="folder of a token set")
    verb = verbs.add_parser("pack", help="arrange training documents so that windows do not cut them")
    verb.add_argument("set", type=Path, help="folder of a token set")
    verb.add_argument("--sequence", type=int, required=True, help="tokens in a window")
    verb.add_argument("--out", type=Path, required=True, help="new folder for the packed set")
    return parser
