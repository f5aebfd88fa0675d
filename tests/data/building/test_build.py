import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import launch
from mmfree_jax.data.building import inputs
from mmfree_jax.data.building.build import Recipe, build, split_by_lot, train_tokenizer
from mmfree_jax.data.building.inputs import Reading, plan
from mmfree_jax.data.building.workers import WorkerError
from mmfree_jax.data.cli import main
from mmfree_jax.data.reading.token_set import TokenSet
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer, load
from mmfree_jax.files import LockedError, locked
from tests.data.made_up import ROOT, passage

CARD = {"name": "test", "description": "Made up.", "sources": []}
DOCUMENTS = 250


def write_input(path: Path, documents: int = DOCUMENTS) -> list[str]:
    rng = random.Random(0)
    texts = [passage(rng, 4).replace("\n    ", "\n") for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def contents(token_set: TokenSet) -> dict[str, list[str]]:
    tokenizer = token_set.tokenizer()
    result = {}
    for name, split in token_set.splits.items():
        pieces = np.split(split[:], split.document_starts()[1:]) if len(split) else []
        result[name] = [tokenizer.decode(piece) for piece in pieces]
    return result


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 20_000)


def test_any_number_of_processes_builds_the_same_set_with_every_document(tmp_path: Path) -> None:
    texts = write_input(tmp_path / "a.jsonl")
    units = plan([str(tmp_path / "a.jsonl")])
    recipe = Recipe(held_out=0.1)
    tokenizer = train_tokenizer(units, recipe, 400)
    built = [
        build(tmp_path / f"set{n}", units, tokenizer, recipe, CARD, processes=n, progress=lambda _: None)
        for n in (1, 3)
    ]
    for one in built:
        one.verify()
    assert built[0].fingerprint == built[1].fingerprint
    assert len(units) > 3
    assert len(built[0].split("train").shards) == len(units)
    found = contents(built[0])
    assert found["train"] == [text for text in texts if split_by_lot(text, 0.1) == "train"]
    assert found["valid"] == [text for text in texts if split_by_lot(text, 0.1) == "valid"]
    assert 0.05 < len(found["valid"]) / len(texts) < 0.15
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_cleaning_and_filters_are_applied_as_asked(tmp_path: Path) -> None:
    english = "This is what the function does with the array that is given to it."
    documents = [
        english + "\r\n",
        "",
        "short",
        "Das ist kein englischer Satz, sondern ein deutscher.",
        "\x00" + english,
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    units = plan([str(tmp_path / "a.jsonl")])
    quiet = {"progress": lambda _: None, "processes": 1}
    recipe = Recipe(english=True, shortest=20, held_out=0)
    filtered = build(tmp_path / "filtered", units, byte_tokenizer(), recipe, CARD, **quiet)
    assert contents(filtered)["train"] == [english, english]
    raw = build(tmp_path / "raw", units, byte_tokenizer(), Recipe(clean=False, held_out=0), CARD, **quiet)
    assert contents(raw)["train"] == [text for text in documents if text]


def test_bad_records_stop_the_build_or_are_counted_on_the_card(tmp_path: Path) -> None:
    write_input(tmp_path / "a.jsonl", 50)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "cut\n')
    units = plan([str(tmp_path / "a.jsonl")])
    with pytest.raises((WorkerError, inputs.InputError), match=r"a\.jsonl, line 51: Unterminated string"):
        build(tmp_path / "set", units, byte_tokenizer(), Recipe(), CARD, processes=2, progress=lambda _: None)
    assert not (tmp_path / "set").exists()
    recipe = Recipe(Reading(skip_bad=True))
    built = build(tmp_path / "set", units, byte_tokenizer(), recipe, CARD, processes=2, progress=lambda _: None)
    assert built.card["bad_records"] == 1
    assert "line 51" in built.card["bad_record_examples"][0]


@pytest.mark.parametrize("more", [[], ["--dedup"]])
def test_the_card_tells_what_of_the_input_is_not_in_the_set(tmp_path: Path, capsys, more: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_input(folder / "a.jsonl", 50)
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "cut\n{"text": "caf\xe9 ' + b"and so on " * 200 + b'"}\n')
    (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    command = ["build", str(folder), "--tokenizer", "bytes", "--out", str(tmp_path / "set"), "--held-out", "0", *more]
    assert main([*command, "--skip-bad", "--processes", "1"]) == 0
    card = TokenSet.open(tmp_path / "set").card
    assert (card["bad_records"], card["replaced_characters"]) == (1, 1)
    assert card["left_out"] == [f"{folder}: left out 1 files: hidden (1)"]
    said = capsys.readouterr().err
    assert "left out 1 files: hidden" in said
    assert "1 replaced characters" in said
    readable = (tmp_path / "set" / "data_card.md").read_text()
    assert "## Not in the set" in readable
    assert "a.jsonl, line 51: Unterminated string" in readable


SLOW = """if True:
    import sys
    from pathlib import Path
    from mmfree_jax.data.building import inputs
    from mmfree_jax.data.building.build import Recipe, build
    from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
    inputs.UNIT_BYTES = 10_000
    units = inputs.plan([sys.argv[1]])
    card = {"name": "test", "description": "Made up.", "sources": []}
    say = lambda line: print(line, flush=True)
    build(Path(sys.argv[2]), units, byte_tokenizer(), Recipe(held_out=0.1), card, processes=1, progress=say)
"""


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 10_000)  # as in the other process
    write_input(tmp_path / "a.jsonl", 200)
    arguments = [sys.executable, "-c", SLOW, str(tmp_path / "a.jsonl"), str(tmp_path / "set")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tokenised 3 of"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "set").exists()
    records = sorted((tmp_path / ".set.building" / "set").glob("unit-*.json"))
    times = {record.name: record.stat().st_mtime_ns for record in records}
    assert len(times) >= 3
    time.sleep(0.5)  # a worker without a parent ends itself
    output = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    assert "going on with an interrupted build" in output
    assert f"tokenised {len(times) + 1} of" in output
    units = plan([str(tmp_path / "a.jsonl")])
    whole = build(tmp_path / "whole", units, byte_tokenizer(), Recipe(held_out=0.1), CARD, progress=lambda _: None)
    assert TokenSet.open(tmp_path / "set").fingerprint == whole.fingerprint


def test_changed_input_is_not_mixed_with_an_interrupted_build(tmp_path: Path) -> None:
    write_input(tmp_path / "a.jsonl", 50)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("bad\n")
    for _ in range(2):
        units = plan([str(tmp_path / "a.jsonl")])
        with pytest.raises((WorkerError, inputs.InputError), match="line 51"):
            build(tmp_path / "set", units, byte_tokenizer(), Recipe(), CARD, processes=2, progress=lambda _: None)
    texts = write_input(tmp_path / "a.jsonl", 30)
    said: list[str] = []
    units = plan([str(tmp_path / "a.jsonl")])
    built = build(tmp_path / "set", units, byte_tokenizer(), Recipe(held_out=0), CARD, progress=said.append)
    assert contents(built)["train"] == texts
    assert not any("going on" in line for line in said)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # maps of its files may still be open


def test_a_full_disk_is_named_leaves_no_set_and_the_build_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 100_000)
    write_input(tmp_path / "a.jsonl", 2000)  # 700 kB, twice that as tokens
    command = ["corpus", "build", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--processes", "1"]
    for _ in range(2):
        assert launch.main([*command, "--out", str(small_disk / "set")]) == 1
        says = capsys.readouterr().err.splitlines()
        assert re.search(r"No space left on device: '.*/disk/\.set\.building/set'", says[-1])
        assert not (small_disk / "set").exists()
    assert "going on with an interrupted build" in says
    done = len(list(small_disk.glob(".set.building/set/unit-*.json")))
    assert done >= 2
    subprocess.run(["mount", "-o", "remount,size=6m", str(small_disk)], check=True)
    assert launch.main([*command, "--out", str(small_disk / "set")]) == 0
    assert f"tokenised {done + 1} of" in capsys.readouterr().err
    TokenSet.open(small_disk / "set").verify()
    assert launch.main([*command, "--out", str(tmp_path / "elsewhere")]) == 0
    assert TokenSet.open(small_disk / "set").fingerprint == TokenSet.open(tmp_path / "elsewhere").fingerprint
    assert sorted(file.name for file in (small_disk / "set").iterdir()) == sorted(
        file.name for file in (tmp_path / "elsewhere").iterdir()
    )


def test_one_large_text_is_read_in_parts_within_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 4_000_000)
    rng = random.Random(0)
    page = "\n".join(passage(rng, 20) for _ in range(50)) + "\n\nnaïve 数学"
    text = "\n\n".join(f"{page} {i}" for i in range(180))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sets = [
        build(
            tmp_path / name[0], plan([str(tmp_path / name)]), byte_tokenizer(), Recipe(held_out=0.1), CARD, progress=len
        )
        for name in ("b.txt.gz", "a.txt")
    ]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    for built in sets:
        assert 150 < sum(split.documents for split in built.splits.values()) < 250
        assert 0.02 < built.text_bytes("valid") / len(text) < 0.3
        assert sum(built.text_bytes(split) for split in built.splits) > 0.99 * len(text.encode())
        words = [word for some in contents(built).values() for document in some[::9] for word in document.split()]
        assert set(words) <= set(text.split())


def test_only_one_process_builds_a_set(tmp_path: Path) -> None:
    write_input(tmp_path / "a.jsonl", 10)
    with locked(tmp_path / ".set.building"), pytest.raises(LockedError, match="another process"):
        build(tmp_path / "set", plan([str(tmp_path / "a.jsonl")]), byte_tokenizer(), Recipe(), CARD)


def test_the_command_builds_shows_checks_and_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(tmp_path / "a.jsonl")
    made = str(tmp_path / "set")
    assert main(["build", str(tmp_path / "a.jsonl"), "--out", made, "--vocab", "400", "--held-out", "0.1"]) == 0
    assert "train: " in capsys.readouterr().out
    assert main(["info", made]) == 0
    assert "| train |" in capsys.readouterr().out
    assert main(["verify", made]) == 0
    assert main(["pack", made, "--sequence", "64", "--out", str(tmp_path / "packed")]) == 0
    again = ["build", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b"), "--tokenizer", made]
    assert main(again) == 0
    assert TokenSet.open(tmp_path / "b").vocab_hash == load(tmp_path / "set").vocab_hash


def test_the_command_removes_repetitions(tmp_path: Path) -> None:
    texts = write_input(tmp_path / "a.jsonl", 200)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("".join(json.dumps({"text": text.upper()}) + "\n" for text in texts))
    command = ["build", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "set"), "--tokenizer", "bytes", "--dedup"]
    assert main([*command, "--held-out", "0.1"]) == 0
    built = TokenSet.open(tmp_path / "set")
    assert sum(split.documents for split in built.splits.values()) == 200
    assert built.card["sources"][0]["bytes_after"]["read"] > 1.9 * built.card["sources"][0]["bytes_after"]["exact"]


def test_a_build_without_repetitions_goes_on_where_it_was_and_leaves_only_the_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_input(tmp_path / "a.jsonl", 50)
    command = ["build", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "set"), "--tokenizer", "bytes", "--dedup"]

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmfree_jax.data.building.build._publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main([*command, "--held-out", "0.1"])
    time.sleep(0.01)  # files written anew would have another time
    assert main([*command, "--held-out", "0.1"]) == 0
    assert "going on with an interrupted build" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "set"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", ".", "--out", "x", "--raw", "--dedup"], "--raw and --dedup exclude each other"),
        (["build", "nothing.txt", "--out", "x"], "nothing.txt does not exist"),
        (["build", "nothing.txt"], "--out is required"),
        (["build", "nothing.txt", "--out", "x", "--held-out", "3"], "held out 3.0: a share of the documents"),
        (["build", "s", "--english", "--key", "x"], "--key, --english: for input of your own"),
        (["build", "embedded", "--tokenizer", "bytes"], "--tokenizer needs --out"),
        (["build", "x.txt", "--out", "x", "--tokenizer", "bytes", "--vocab", "300"], "not allowed with argument"),
        (["info", "."], "is not a token set"),
        (["build"], "required"),
        (["dance"], "invalid choice"),
    ],
)
def test_errors_are_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["corpus", *arguments]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
