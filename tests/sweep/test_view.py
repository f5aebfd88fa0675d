"""When a sweep will be done: nothing is said before it is known."""

import io
import json

from rich.console import Console

from mmfree_jax.files import locked
from mmfree_jax.sweep.status import run_folder, status
from mmfree_jax.sweep.view import View, describe
from tests.conftest import tiny_run


def row(step: int, rate: float | None = 128.0) -> str:
    return json.dumps({"step": step, "loss": 2.0, "tokens_per_s": rate}) + "\n"


def test_the_time_left_is_that_of_steady_steps_not_of_compilation(token_set, tmp_path):
    """An hour until the first row, then two steps a second."""
    run = tiny_run("matmul-free", token_set.path, steps=100)
    folder = run_folder(tmp_path, run)
    folder.mkdir(parents=True)
    view = View([(run, folder)], Console(file=io.StringIO()))
    begun = view.began
    said = []
    for seconds, step in ((1, 0), (3600, 2), (3601, 4), (3601.5, 4), (3602, 6), (3603, 8)):
        (folder / "metrics.jsonl").write_text("".join(row(n) for n in range(2, step + 1, 2)))
        view.read_at = -1e9
        view.statuses = {run.name: status(folder, run)}
        view.read_at = begun + seconds
        view.measure(begun + seconds)
        said.append(view.eta_seconds())
        assert ("time left not known yet" in view.summary()) == (said[-1] is None)
    assert said[:4] == [None] * 4
    assert said[4:] == [47.0, 46.0]
    view.read_at += 6  # nothing new since
    assert view.eta_seconds() == 40.0


def test_a_run_alone_says_when_it_ends_from_two_rows_with_a_speed_on(tmp_path):
    run = tiny_run("matmul-free", tmp_path, steps=100)
    folder = run_folder(tmp_path, run)
    folder.mkdir(parents=True)
    with locked(folder):
        for rows, left in ((row(2, None) + row(4), False), (row(2), False), (row(2) + row(4), True)):
            (folder / "metrics.jsonl").write_text(rows)
            assert ("left" in describe(status(folder, run))) == left
        assert status(folder, run).eta_seconds == 96
