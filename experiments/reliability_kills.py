"""SIGKILLs at random instants of seven kinds of moment: `python -m experiments.reliability_kills [--out FILE]`.

A round takes a family and one or two processes through `experiments.reliability_pipeline`, killed once in each of the
moments, and compares what is there at the end with an undisturbed run: parameters, every row of metrics, result.json,
runs.csv and the exported files, to the last bit (all but times). Outcomes are appended to FILE (JSON lines); the same
command goes on where it was. `--table` only prints the table of what is there.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.reliability_pipeline import FAMILIES

ROUNDS = 30  # for each family four of one process and two of two processes: 210 kills
GROUPS = (1, 2, 1)  # processes, in turn
LIMIT_SECONDS = 300  # of one start
PEER_SECONDS = 6  # after the death of one process: then the other is killed, as a scheduler would do it
TIMED = {"tokens_per_s", "mfu", "data_wait_s", "seconds", "joules", "attempts", "peak_memory_bytes", "code"}
PROGRAM = "experiments.reliability_pipeline"


class Moment(NamedTuple):
    """A kind of moment: functions to choose from, which of their calls, and seconds after its beginning."""

    name: str
    places: tuple[str, ...]
    calls: int
    seconds: float


# In the order in which a run comes to them. Checkpoints are written by a thread after `save` has returned.
LOOP = "mmfree_jax.training.loop:"
MOMENTS = (
    Moment("preparation of data", ("mmfree_jax.data.cli:_build_input",), 1, 0.3),
    Moment("sweep's bookkeeping", ("mmfree_jax.sweep.study:prepare", f"{LOOP}claim", f"{LOOP}note_corpus"), 1, 0.05),
    Moment("step", ("mmfree_jax.training.metrics:Interval.add",), 5, 0.02),
    Moment("checkpoint write", ("mmfree_jax.checkpoint:Checkpoints.save",), 2, 0.4),
    Moment("evaluation", (f"{LOOP}evaluate",), 2, 0.2),
    Moment("result write", (f"{LOOP}write_json",), 1, 0.003),
    Moment("export", ("mmfree_jax.api:export",), 1, 0.2),
)


class Start(NamedTuple):
    """What came of one start of the pipeline."""

    codes: list[int]
    said: str
    began: float
    ended: float  # when the first process had ended
    peer_ended: bool  # the others ended by themselves


def write_text(folder: Path) -> None:
    """Made-up documents with some structure to learn, the same every time."""
    words = "the loss of a model falls with compute while data and parameters grow together in time".split()
    chance = random.Random(0)
    lines = (" ".join(chance.choices(words, k=chance.randint(20, 80))) + "." for _ in range(200))
    folder.mkdir(parents=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")


def start(folder: Path, family: str, processes: int, cache: Path, kill: str = "", victim: int = 0) -> Start:
    """Start the pipeline once, and wait until all of its processes have ended. The last of its parts needs only one."""
    if processes > 1 and not (folder / "sweep" / "runs" / "run" / "result.json").exists():
        trained = start_processes(folder, family, processes, processes, cache, kill, victim)
        if set(trained.codes) != {0}:
            return trained
    return start_processes(folder, family, processes, 1, cache, kill, 0)


def start_processes(
    folder: Path, family: str, processes: int, count: int, cache: Path, kill: str, victim: int
) -> Start:
    """Start `count` processes of the pipeline, and wait until all of them have ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MMFREE_JAX_CACHE": str(cache)}
    environment |= {"XLA_FLAGS": "", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    began = time.time()
    running = []
    for index in range(count):
        own = {"TIMES": str(folder / "steps.txt")} if index == 0 else {}
        own |= {"KILL": kill} if kill and index == victim else {}
        group = [str(processes), *([str(index), address] if count > 1 else [])]
        command = [sys.executable, "-m", PROGRAM, str(folder), family, *group]
        log = (folder / f"said-{index}.txt").open("wb")
        running.append(subprocess.Popen(command, env=environment | own, stdout=log, stderr=subprocess.STDOUT))
    first = wait_for_any(running, began + LIMIT_SECONDS)
    ended = time.time()
    peer_ended = wait_for_all(running, ended + (PEER_SECONDS if first else LIMIT_SECONDS))
    for process in running:
        process.kill()
    codes = [process.wait() for process in running]
    return Start(codes, (folder / "said-0.txt").read_text(encoding="utf-8"), began, ended, peer_ended)


def wait_for_any(running: list[subprocess.Popen], deadline: float) -> bool:
    """Wait for the first end; returns whether it was a bad one."""
    while time.time() < deadline:
        if any(process.poll() is not None for process in running):
            return any(process.poll() not in (None, 0) for process in running)
        time.sleep(0.01)
    return True


def wait_for_all(running: list[subprocess.Popen], deadline: float) -> bool:
    """Wait for all ends; returns whether they came in time."""
    while time.time() < deadline and any(process.poll() is None for process in running):
        time.sleep(0.01)
    return all(process.poll() is not None for process in running)


def outcome(folder: Path, said: str) -> dict[str, Any]:
    """What a run has left, without times."""
    run = folder / "sweep" / "runs" / "run"
    timeless = lambda row: {name: value for name, value in row.items() if name not in TIMED}
    rows = [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "sweep" / "runs.csv").open(encoding="utf-8") as file:
        table = [timeless(row) for row in csv.DictReader(file)]
    files = sorted(path for path in (folder / "exported").rglob("*") if path.is_file())
    result = timeless(json.loads((run / "result.json").read_text(encoding="utf-8")))
    here = lambda value: json.loads(json.dumps(value).replace(str(folder), "FOLDER"))
    return {
        "parameters": json.loads(said.strip().splitlines()[-1])["parameters"],
        "corpus": json.loads((folder / "corpus" / "index.json").read_text(encoding="utf-8"))["fingerprint"],
        "rows": here(rows),
        "result": here(result),
        "table": here(table),
        "exported": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def reference(cache: Path, family: str, processes: int) -> dict[str, Any]:
    """The outcome of an undisturbed run, and the seconds from its start to its first step (all programs compiled)."""
    note = cache / f"reference-{family}-{processes}.json"
    if not note.exists():
        for _ in range(2):  # the first one compiles
            folder = cache / "undisturbed"
            shutil.rmtree(folder, ignore_errors=True)
            write_text(folder)
            began = time.time()
            done = start(folder, family, processes, cache)
            assert set(done.codes) == {0}, done
        cold = float((folder / "steps.txt").read_text(encoding="utf-8").split()[0]) - began
        note.write_text(json.dumps({"cold_s": cold, **outcome(folder, done.said)}), encoding="utf-8")
    return json.loads(note.read_text(encoding="utf-8"))


def steps_of(folder: Path) -> list[tuple[float, int]]:
    """Times and numbers of all steps so far."""
    path = folder / "steps.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(float(line.split()[0]), int(line.split()[1])) for line in lines]


def one_round(
    number: int, family: str, processes: int, cache: Path, moments: Sequence[Moment] = MOMENTS
) -> list[dict[str, Any]]:
    """Kill a run once in each moment. Returns an object for each kill."""
    chance = random.Random(number)
    expected = reference(cache, family, processes)
    folder = Path(tempfile.mkdtemp(prefix="kills-")) / "run"
    write_text(folder)
    kills: list[dict[str, Any]] = []
    waiting: dict[str, Any] | None = None  # the last kill, whose next new step has not come yet
    last: Start | None = None
    for moment in (*moments, None):
        reached, kill, victim = max((step for _, step in steps_of(folder)), default=0), "", 0
        if moment is not None:
            # Only the first process prepares data, writes results and exports.
            everywhere = moment.name in ("step", "checkpoint write", "evaluation")
            victim = chance.randrange(processes) if everywhere else 0
            call, seconds = chance.randint(1, moment.calls), chance.uniform(0, moment.seconds)
            kill = f"{chance.choice(moment.places)}:{call}:{seconds:.5f}"
        last = start(folder, family, processes, cache, kill, victim)
        if waiting is not None:
            new = [at for at, step in steps_of(folder) if step > waiting["reached"] and at > waiting["at"]]
            waiting["seconds_to_new_step"] = new[0] - waiting["at"] if new else None
            waiting = None
        if moment is None:
            break
        if -9 not in last.codes:  # it never came to this moment, or was through before
            continue
        reached = max((step for _, step in steps_of(folder)), default=0)
        kills.append(
            {"moment": moment.name, "kill": kill, "victim": victim, "peer_ended": last.peer_ended, "at": last.ended}
            | {"reached": reached}
        )
        waiting = kills[-1]
    assert last is not None
    found: dict[str, Any] = {}
    if set(last.codes) == {0}:
        found = outcome(folder, last.said)
    wrong = [name for name in expected if name != "cold_s" and found.get(name) != expected[name]]
    shared = {"round": number, "family": family, "processes": processes, "cold_s": expected["cold_s"], "wrong": wrong}
    if wrong:
        print(f"round {number}: {wrong} differ, kept in {folder}: {last.said[-500:]}", flush=True)
    else:
        shutil.rmtree(folder.parent)
    return [{**shared, **kill} for kill in kills]


def table(rows: list[dict[str, Any]]) -> str:
    """Kills by family, processes and moment, and how long it took to go on."""
    lines = ["| moment | " + " | ".join(f"{family}, {n}" for family in FAMILIES for n in (1, 2)) + " |"]
    lines += ["|---|" + "---:|" * 2 * len(FAMILIES)]
    count = collections.Counter((row["moment"], row["family"], row["processes"]) for row in rows)
    for moment in MOMENTS:
        cells = (str(count[moment.name, family, n]) for family in FAMILIES for n in (1, 2))
        lines.append(f"| {moment.name} | " + " | ".join(cells) + " |")
    bad = sum(bool(row["wrong"]) for row in rows)
    lines += [
        "",
        f"{len(rows)} kills, {len(rows) - bad} of them in runs that ended bit-identical to an undisturbed one.",
    ]
    for processes in (1, 2):
        some = [row for row in rows if row["processes"] == processes and row.get("seconds_to_new_step")]
        if some:
            after = statistics.median(row["seconds_to_new_step"] for row in some)
            ratio = statistics.median(row["seconds_to_new_step"] / row["cold_s"] for row in some)
            cold = statistics.median(row["cold_s"] for row in some)
            lines += [
                f"{processes} process{'es' * (processes > 1)}: median {after:.1f} s from the kill to the next new step "
                f"({len(some)} kills), {ratio:.2f} times a cold start ({cold:.1f} s)."
            ]
    pairs = [row for row in rows if row["processes"] == 2]
    if pairs:
        ended = sum(row["peer_ended"] for row in pairs)
        lines += [
            f"In {ended} of {len(pairs)} kills of one of two processes the other ended by itself in {PEER_SECONDS} s."
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Go on with the rounds that the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no round after so long [no limit]")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "reliability-kills")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/reliability_kills.jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    options.cache.mkdir(parents=True, exist_ok=True)
    read = lambda: [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
    rows = read() if options.out.exists() else []
    for number, (_, processes, family) in enumerate(itertools.product(range(options.rounds), GROUPS, FAMILIES)):
        late = options.minutes and time.monotonic() - began > 60 * options.minutes
        if options.table or late or number >= options.rounds:
            break
        if any(row["round"] == number for row in rows):
            continue
        new = one_round(number, family, processes, options.cache)
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        rows += new
        print(
            f"round {number}: {family} x {processes}: {len(new)} kills, wrong: {new[0]['wrong'] if new else '-'}",
            flush=True,
        )
    print(table(rows))
    if any(row["wrong"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
