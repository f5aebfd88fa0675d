"""Hostile input for every reader: `python -m experiments.reliability_fuzz [--seconds S] [--out FILE]`.

Each reader gets valid input with mutations: bits, bytes and blocks of any file, values and keys of JSON. Whatever it
raises must be an error that a command reports in one line (`mmfree_jax.errors.is_explained`; over HTTP a refusal); a
crash, another error, more than HANG_SECONDS or MOST_BYTES is a finding. Executions are counted in FILE (JSON), which
later calls add to; inputs that were findings once are kept in tests/fuzz/ and tried first. Each reader works in a
process of its own.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mmfree_jax.errors import is_explained

HANG_SECONDS = 20  # for one input, on a machine that is shared
MOST_BYTES = 1 << 30  # of memory beyond what the process has when it begins
FINDINGS = Path(__file__).parents[1] / "tests" / "fuzz"
LONGEST = 1 << 16  # bytes of a mutated file
SECONDS = 60.0  # for all readers together

Files = dict[str, bytes]  # of one input, by name


class Reader(NamedTuple):
    """How one kind of input is made and read."""

    name: str
    seeds: Callable[[], list[Files]]  # valid inputs
    read: Callable[[Path], object]  # from a folder with the files
    mutated: tuple[str, ...] = ()  # which files are changed; all by default
    refusals: tuple[str, ...] = ()  # names of further exception types that are clean


# ---- mutations ----

WORDS: tuple[bytes, ...] = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"\x00",
    b"\xff\xfe",
    b"../",
    b"/etc/passwd",
)
WORDS += (
    b"9" * 400,
    b"18446744073709551616",
    b"__class__",
    b"${x}",
    b"\xf0\x9f\x92\xa9",
    b"\r\n",
    b",",
    b'"',
    b"\xe2\x80\xa8",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    1.5,
    1e308,
    "",
    "x" * 300,
    "../../x",
    "\x00",
    "é",
    "\ud800",
)
VALUES += ([], {}, [[]], [None], {"a": 1}, [0] * 50, "/etc/passwd", "-", "1", "nan")


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """A few changes of bits, bytes, numbers and blocks."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(out) + 1)
        kind = chance.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = chance.randrange(256)
        elif kind == 2:
            del out[at : at + chance.choice((1, 2, 8, 64, 1000))]
        elif kind == 3:
            out[at:at] = chance.choice(WORDS)
        elif kind == 4:
            stop = at + chance.choice((1, 4, 16, 200))
            out[at:at] = bytes(out[at:stop]) * chance.choice((1, 2, 20))
        elif kind == 5:
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice((0, 1, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            out[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, chance.choice(("little", "big")))
        elif kind == 6:
            del out[at:]
        else:
            out[at : at + chance.choice((1, 8))] = chance.choice(WORDS)
    return bytes(out[:LONGEST])


def mutated_json(chance: random.Random, data: bytes) -> bytes:
    """Other values, missing keys, new keys, other types, deep nesting."""
    tree = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            break
        where, key = chance.choice(places)
        kind = chance.randrange(8)
        if kind == 0:
            del where[key]
        elif kind == 1 and isinstance(where, dict):
            where[chance.choice(("x", "", "__proto__", str(key) + "s", "é" * 9))] = where[key]
        elif kind == 2:
            _, other = chance.choice(places), chance.choice(places)
            where[key] = copy.deepcopy(other[0][other[1]])
        elif kind == 3 and isinstance(where[key], str):
            where[key] = mutated_bytes(chance, where[key].encode("utf-8", "replace")).decode("utf-8", "replace")
        elif kind == 4 and type(where[key]) in (int, float):
            where[key] = chance.choice(
                (-where[key], where[key] + 1, where[key] * 1000, 1 / 3, 2 ** chance.randrange(70))
            )
        else:
            where[key] = copy.deepcopy(chance.choice(VALUES))
        if len(json.dumps(tree)) > LONGEST:
            break
    text = json.dumps(tree)
    if chance.random() < 0.002:
        text = "[" * 100_000 + text
    return text.encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def mutated(chance: random.Random, data: bytes) -> bytes:
    """JSON is mostly changed as a tree, JSON lines line by line, everything else as bytes."""
    if chance.random() < 0.7:
        if data[:1] == b"{" and data.rstrip()[-1:] == b"}" and data[1:2] in b'"\n' and b"\n{" not in data:
            return mutated_json(chance, data)
        if data[:2] == b'{"':
            lines = data.splitlines()
            number = chance.randrange(len(lines))
            lines[number] = mutated_json(chance, lines[number])
            return b"\n".join(lines) + b"\n"
        if data[1:8] != b"PK\x03\x04" and data[8:9] == b"{":  # safetensors: a length, a JSON header, tensors
            size = int.from_bytes(data[:8], "little")
            header = mutated_json(chance, data[8 : 8 + size])
            return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return mutated_bytes(chance, data)


# ---- readers ----


def files_of(folder: Path) -> Files:
    """The files of a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made(make: Callable[[Path], object]) -> Files:
    """The files that a function leaves in a new folder."""
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        return files_of(Path(name))


def a_run() -> Any:
    from mmfree_jax.presets import run_preset

    return run_preset("matmul-free-tiny")


def config_seeds() -> list[Files]:
    from mmfree_jax.config import to_json
    from mmfree_jax.presets import PRESETS, run_preset

    return [{"config.json": to_json(run_preset(name)).encode()} for name in PRESETS if name.endswith(("tiny", "370m"))]


def read_config(folder: Path) -> None:
    from mmfree_jax.run_folder import read_run

    read_run(folder / "config.json").fingerprint()


@cache
def token_set() -> Files:
    from mmfree_jax.data.building.token_writer import write_token_set
    from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer

    texts = {"train": ["some words of text " * n for n in range(1, 9)], "valid": ["held out text"]}
    card = {"name": "x", "description": "x", "sources": []}
    return made(lambda out: write_token_set(out / "set", texts, byte_tokenizer(), card))


def read_tokens(folder: Path) -> None:
    from mmfree_jax.data import TokenSet

    found = TokenSet.open(folder / "set")
    for split in found.splits.values():
        split[:100].sum()
        split.document_starts()
    found.verify()


def megatron_seeds() -> list[Files]:
    sizes, data = [3, 2, 4], bytes(range(1, 19))
    pointers = [0, 6, 10]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 3)
    index += struct.pack("<3i", *sizes) + struct.pack("<3q", *pointers) + struct.pack("<3q", 0, 1, 3)
    llmc = struct.pack("<3i", 20240520, 1, 9).ljust(1024, b"\x00") + data
    return [{"x.bin": data, "x.idx": index}, {"x.bin": data}, {"x.bin": llmc}]


def read_foreign(folder: Path) -> None:
    from mmfree_jax.data.building.foreign import convert
    from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer

    convert({"train": folder / "x.bin"}, byte_tokenizer(), folder / "converted")


def tokenizer_seeds() -> list[Files]:
    from mmfree_jax.data.tokenizers.tokenizer import train_bpe

    trained = made(lambda out: train_bpe(["some words of text, many words"] * 9, 262).save(out / "tokenizer.json"))
    return [{"tokenizer.json": trained["tokenizer.json"]}]


def read_tokenizer(folder: Path) -> None:
    from mmfree_jax.data.tokenizers import tokenizer

    tokenizer.load(folder / "tokenizer.json").decode([0, 1, 2])


def sentencepiece_seeds() -> list[Files]:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))

    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3), piece("▁a", -1, 1), piece("▁", -2, 1)]
    pieces += [piece("a", -3, 1), piece("b", -4, 1), piece("ab", -5, 1)]
    return [{"x.model": b"".join(pieces) + field(2, bytes([3 << 3, kind]))} for kind in (1, 2)]


def read_sentencepiece(folder: Path) -> None:
    from mmfree_jax.data.tokenizers import tokenizer

    tokenizer.load(folder / "x.model").encode("ab a")


def text_seeds() -> list[Files]:
    import zstandard

    lines = "".join(json.dumps({"text": f"line {n} é\n more", "n": n}) + "\n" for n in range(6)).encode()
    plain = "Some text.\n\nMore of it, naïve.\n".encode() * 4
    seeds = [{"x.jsonl": lines}, {"x.jsonl.gz": gzip.compress(lines)}, {"x.jsonl.zst": zstandard.compress(lines)}]
    return [*seeds, {"x.txt": plain}, {"x.txt": plain.decode().encode("utf-16")}, {"x.json": lines}]


def read_text(folder: Path) -> None:
    from mmfree_jax.data.building.inputs import Documents, Reading, plan

    for unit in plan([str(next(folder.iterdir()))]):
        for skip in (False, True):
            for _ in Documents(unit, Reading(skip_bad=skip)):
                pass


def parquet_seeds() -> list[Files]:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"text": ["one", "two", "three"], "n": [1, 2, 3]})

    def data(**how: Any) -> bytes:
        sink = io.BytesIO()
        pyarrow.parquet.write_table(rows, sink, **how)
        return sink.getvalue()

    return [{"x.parquet": data()}, {"x.parquet": data(compression="none", use_dictionary=False)}]


def table_seeds() -> list[Files]:
    rows = [
        {"run_id": f"r{n}", "family": "ab"[n % 2], "N": 1e6 * 2**n, "D": 1e8, "loss": 4 - n / 10, "flops": 6e14 * 2**n}
        for n in range(6)
    ]
    head = ",".join(rows[0])
    csv = (head + "\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)).encode()
    return [
        {"x.csv": csv},
        {"x.tsv": csv.replace(b",", b"\t")},
        {"x.csv": csv.replace(b",", b";")},
        {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()},
        {"x.json": json.dumps({"runs": rows}).encode()},
        {"x.csv.gz": gzip.compress(csv)},
    ]


def read_table(folder: Path) -> None:
    from scaling import Runs

    Runs.read(next(folder.iterdir()))


def results_seeds() -> list[Files]:
    row = {"run_id": "r", "family": "a", "N": 1e6, "D": 1e8, "loss": 3.5, "flops": 6e14, "tokenizer": "t", "vocab": 9}
    line = {"step": 2, "tokens": 100, "flops": 1e9, "loss": 4.0, "lr": 1e-3, "seconds": 1.0}
    curve = "".join(json.dumps(line | {"step": n}) + "\n" for n in range(4)).encode()
    summary, config = json.dumps(row | {"_step": 3}).encode(), b"N:\n  value: 1000000\nfamily:\n  value: a\n"
    return [
        {
            "runs/r/result.json": json.dumps(row).encode(),
            "runs/r/metrics.jsonl": curve,
            "runs/r/config.json": b'{"branch": null}',
        },
        {"run-1/files/wandb-summary.json": summary, "run-1/files/config.yaml": config},
    ]


def read_results(folder: Path) -> None:
    from scaling import Runs
    from scaling.tables.curves import sweep_curves

    sweep_curves(folder)
    Runs.read(folder)


def board_seeds() -> list[Files]:
    from tensorboardX import SummaryWriter

    def write(out: Path) -> None:
        with SummaryWriter(str(out / "run")) as board:
            for step in range(3):
                board.add_scalar("loss", 4.0 - step, step)
                board.add_scalar("tokens", 100.0 * step, step)

    return [{"run/events.out.tfevents.1": next(iter(made(write).values()))}]


def formula_seeds() -> list[Files]:
    texts = ("params * 1e6", "`log ppl` / log(2) + 1", "sqrt(N) ** 2 - exp(D)", "-steps * batch")
    return [{"x": text.encode()} for text in texts]


def read_formula(folder: Path) -> None:
    from scaling.tables.arithmetic import evaluated, formula

    tree, names = formula((folder / "x").read_text(encoding="utf-8", errors="replace"))
    evaluated(tree, dict.fromkeys(names, 1.5))


@cache
def tiny_model(family: str) -> Any:
    import dataclasses

    from flax import nnx

    from mmfree_jax.config import ModelConfig
    from mmfree_jax.models.language_model import LanguageModel
    from mmfree_jax.presets import run_preset

    model = run_preset(f"{family}-tiny").model
    sizes: dict[str, Any] = {
        "vocab": 40,
        "width": 16,
        "depth": 2,
        "glu_width": 32,
        **({"heads": 2} if model.mixer == "attention" else {}),
    }
    return LanguageModel(
        dataclasses.replace(ModelConfig(mixer=model.mixer, linear=model.linear), **sizes), rngs=nnx.Rngs(0)
    )


def huggingface_seeds() -> list[Files]:
    from mmfree_jax.interop.huggingface import save_huggingface

    save = lambda family, shard: made(lambda out: save_huggingface(tiny_model(family), out / "m", shard_bytes=shard))
    return [save(family, shard) for family, shard in (("transformer++", 4000), ("matmul-free", 10**9))]


def read_huggingface(folder: Path) -> None:
    import jax
    from flax import nnx

    from mmfree_jax.interop import huggingface
    from mmfree_jax.models.language_model import LanguageModel

    # Everything up to the model: sizes that do not fit the files are refused before anything of these sizes is made.
    config = huggingface.read_config(folder / "m")
    huggingface.read_origin(folder / "m")
    huggingface._checked(folder / "m", config)
    shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))[1]
    jax.block_until_ready(huggingface.read_parameters(folder / "m", shapes))


def packed_seeds() -> list[Files]:
    from mmfree_jax.inference.packed import save_packed

    return [made(lambda out: save_packed(tiny_model("matmul-free"), out / "m"))]


def read_packed(folder: Path) -> None:
    from mmfree_jax.inference import packed

    _, tensors = packed.read_packed(folder / "m")
    for tensor in tensors.values():
        tensor.sum()
    packed.verify_packed(folder / "m")


def checksum_seeds() -> list[Files]:
    from mmfree_jax.checksums import write_checksums

    def write(out: Path) -> None:
        (out / "d").mkdir()
        (out / "d" / "array").write_bytes(bytes(range(100)))
        write_checksums(out)

    return [made(write)]


def read_checksums(folder: Path) -> None:
    from mmfree_jax.checksums import first_damage

    assert isinstance(first_damage(folder), str)


def sweep_seeds() -> list[Files]:
    row = json.dumps({"step": 2, "loss": 3.0, "tokens_per_s": 5.0}).encode() + b"\n"
    beat = json.dumps({"host": "elsewhere", "pid": 3, "job": ""}).encode()
    corpus = json.dumps({"sets": [{"name": "x", "path": "/x", "fingerprint": "f"}], "vocab_size": 9}).encode()
    return [{"metrics.jsonl": row * 3, "heartbeat.json": beat, "corpus.json": corpus, "error.txt": b"why\n"}]


def read_sweep(folder: Path) -> None:
    from mmfree_jax.run_folder import corpus_places
    from mmfree_jax.sweep.status import status
    from mmfree_jax.sweep.view import describe

    describe(status(folder, a_run()))
    corpus_places(folder)


def body_seeds() -> list[Files]:
    chat = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": [{"type": "text", "text": "a"}]}]
    }
    common = {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "seed": 3,
        "stream": True,
    }
    common |= {"stream_options": {"include_usage": True}, "n": 2, "user": "u", "logit_bias": {}}
    return [
        {"completion": json.dumps({"prompt": ["a", [1, 2]], "logprobs": 2, "echo": True, **common}).encode()},
        {"chat": json.dumps({**chat, "logprobs": True, "top_logprobs": 2, **common}).encode()},
    ]


def read_body(folder: Path) -> None:
    from mmfree_jax.inference.serving.bodies import Limits, parse_call, parse_json

    file = next(folder.iterdir())
    parse_call(parse_json(file.read_bytes()), file.name, Limits())  # type: ignore[arg-type]


@cache
def bytes_tokenizer() -> Any:
    from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer

    return byte_tokenizer()


def template_seeds() -> list[Files]:
    text = "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n"
    text += "{% if loop.last %}{{ m.name or '-' }}{% endif %}"
    text += "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}{{ raise_exception('x') if false }}"
    return [
        {"x": text.encode()},
        {"x": b"{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = a.n + 1 %}{% endfor %}{{ a.n }}"},
    ]


def read_template(folder: Path) -> None:
    from mmfree_jax.inference.serving.chat import ChatTemplate

    template = ChatTemplate((folder / "x").read_text(encoding="utf-8", errors="replace"), bytes_tokenizer())
    template.prompt([{"role": "user", "content": "hi"}])


def hosts_seeds() -> list[Files]:
    return [{"x": text.encode()} for text in ("rack[1-2]node[03-04,7]-ib,login", "gpu[007-009,012],cpu1", "a,b")]


def read_hosts(folder: Path) -> None:
    from mmfree_jax.distributed import first_host

    first_host((folder / "x").read_text(encoding="utf-8", errors="replace"))


READERS = (
    Reader("config", config_seeds, read_config),
    Reader("token-set", lambda: [token_set()], read_tokens),
    Reader("token-index", lambda: [token_set()], read_tokens, ("set/index.json",)),
    Reader("foreign-tokens", megatron_seeds, read_foreign),
    Reader("tokenizer", tokenizer_seeds, read_tokenizer),
    Reader("sentencepiece", sentencepiece_seeds, read_sentencepiece),
    Reader("text", text_seeds, read_text),
    Reader("parquet", parquet_seeds, read_text),
    Reader("table", table_seeds, read_table),
    Reader("parquet-table", parquet_seeds, read_table),
    Reader("results", results_seeds, read_results),
    Reader("tensorboard", board_seeds, read_results),
    Reader("formula", formula_seeds, read_formula),
    Reader("huggingface", huggingface_seeds, read_huggingface),
    Reader("packed", packed_seeds, read_packed),
    Reader("checksums", checksum_seeds, read_checksums),
    Reader("run-folder", sweep_seeds, read_sweep),
    Reader("http-body", body_seeds, read_body, refusals=("Refused",)),
    Reader("chat-template", template_seeds, read_template, refusals=("Refused",)),
    Reader("host-list", hosts_seeds, read_hosts),
)


# ---- running ----


def fault(reader: Reader, files: Files, scratch: Path) -> str:
    """Read one input. Returns what is wrong with how it was read; empty if it was read, or refused cleanly."""
    folder = scratch / "input"
    try:
        for name, data in files.items():
            path = folder / name
            if len(path.parent.parts) > len(folder.parts) or not folder.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        reader.read(folder)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        clean = isinstance(error, Exception) and (is_explained(error) or type(error).__name__ in reader.refusals)
        if not clean:
            return "".join(traceback.format_exception(error))[-2500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder, ignore_errors=True)
    return ""


def inputs(reader: Reader, seed: int) -> Iterator[Files]:
    """Mutated inputs without end."""
    chance, seeds = random.Random(seed), reader.seeds()
    while True:
        files = dict(chance.choice(seeds))
        names = [name for name in files if not reader.mutated or name in reader.mutated]
        for name in chance.sample(names, min(len(names), chance.choice((1, 1, 1, 2)))):
            files[name] = mutated(chance, files[name])
        yield files


def all_inputs(reader: Reader, seed: int) -> Iterator[Files]:
    """Those that are kept, then mutated ones."""
    yield from map(restored, kept(reader))
    yield from inputs(reader, seed)


def kept(reader: Reader) -> list[Path]:
    """Inputs that were findings once: folders of files, or JSON of them."""
    return sorted((FINDINGS / "corpus").glob(f"{reader.name}-*.json"))


def stored(files: Files) -> str:
    """Files as text."""
    return json.dumps({name: data.decode("latin-1") for name, data in files.items()}) + "\n"


def restored(path: Path) -> Files:
    """What `stored` wrote."""
    return {name: text.encode("latin-1") for name, text in json.loads(path.read_text(encoding="utf-8")).items()}


def work(reader: Reader, seconds: float, most: int, seed: int, last: Path) -> dict[str, Any]:
    """Try inputs for so long, or so many. The number of the one under way is in the file `last`, also after a crash."""
    warnings.simplefilter("ignore")
    hung = lambda *_: (_ for _ in ()).throw(TimeoutError("hung"))
    signal.signal(signal.SIGALRM, hung)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    found: dict[str, tuple[str, Files]] = {}
    done = 0
    try:
        seeds = reader.seeds()
        for files in seeds:
            assert not (why := fault(reader, files, scratch)), f"{reader.name}: a valid input is not read: {why}"
        with open("/proc/self/statm", encoding="utf-8") as memory:
            now = int(memory.read().split()[0]) * resource.getpagesize()
        # Threads of libraries reserve address space that they do not use: only a runaway is stopped by the limit.
        resource.setrlimit(resource.RLIMIT_AS, (now + 16 * MOST_BYTES, resource.RLIM_INFINITY))
        most_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MOST_BYTES
        tried, began, number = all_inputs(reader, seed), time.monotonic(), os.open(last, os.O_CREAT | os.O_WRONLY)
        while time.monotonic() - began < seconds and done < most:
            files = next(tried)
            os.pwrite(number, struct.pack("<Q", done), 0)
            why = fault(reader, files, scratch)
            if 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most_bytes:
                why, most_bytes = f"took more than {MOST_BYTES} bytes", 2 * most_bytes
            if why:
                # One input for each line of ours that an error comes from.
                ours = [
                    line for line in why.splitlines() if line.startswith("  File") and "reliability_fuzz" not in line
                ]
                own = [line for line in ours if "/mmfree_jax/" in line or "/scaling/" in line]
                found.setdefault(f"{own[-1:]} {why.splitlines()[-1].partition(':')[0]}", (why, files))
            done += 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    listed = [{"why": why, "files": stored(files)} for why, files in found.values()]
    return {"executions": done, "seconds": time.monotonic() - began, "findings": listed}


def in_process(reader: Reader, seconds: float, most: int, seed: int) -> dict[str, Any]:
    """`work` in a process of its own, so that a crash of a library is a finding too."""
    with tempfile.TemporaryDirectory() as name:
        last, out = Path(name) / "last", Path(name) / "out"
        command = [
            sys.executable,
            "-m",
            "experiments.reliability_fuzz",
            "--one",
            reader.name,
            "--seconds",
            str(seconds),
        ]
        command += ["--most", str(most), "--seed", str(seed), "--out", str(out), "--last", str(last)]
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8"))
        number = struct.unpack("<Q", last.read_bytes())[0] if last.exists() else 0
        files = stored(next(itertools.islice(all_inputs(reader, seed), number, None)))
        why = f"ended with status {done.returncode}: {done.stderr[:1500]}"
        return {"executions": 0, "seconds": 0.0, "findings": [{"why": why, "files": files}]}


def main() -> None:
    """Share the time among the readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all readers together")
    parser.add_argument("--most", type=int, default=10**9, help="inputs for each reader in this call")
    parser.add_argument("--readers", nargs="*", default=[reader.name for reader in READERS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", default="")
    parser.add_argument("--last", type=Path)
    options = parser.parse_args()
    by_name = {reader.name: reader for reader in READERS}
    if options.one:
        result = work(by_name[options.one], options.seconds, options.most, options.seed, options.last)
        options.out.write_text(json.dumps(result), encoding="utf-8")
        return
    totals = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    bad = 0
    for name in options.readers:
        # Another seed every time, so that calls add to each other.
        seed = options.seed or totals.get(name, {}).get("executions", 0) + 1
        result = in_process(by_name[name], options.seconds / len(options.readers), options.most, seed)
        before = totals.setdefault(name, {"executions": 0, "seconds": 0.0})
        before["executions"] += result["executions"]
        before["seconds"] = round(before["seconds"] + result["seconds"], 1)
        counts = f"{result['executions']:>8} now {before['executions']:>9} in all"
        print(f"{name:<16} {counts}  {len(result['findings'])} findings", flush=True)
        for finding in result["findings"]:
            bad += 1
            digest = hashlib.sha256(finding["files"].encode()).hexdigest()[:12]
            place = FINDINGS / "corpus" / f"{name}-{digest}.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(finding["files"], encoding="utf-8")
            print(f"--- {place.name}\n{finding['why']}\n", flush=True)
        if options.out:
            options.out.write_text(json.dumps(totals, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(one['executions'] for one in totals.values()):,} executions in all")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
