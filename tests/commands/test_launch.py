"""The command line as a user meets it: exit statuses, one-line errors, help."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import main
from mmfree_jax.files import read_json
from tests.in_process import called

ROOT = Path(__file__).parents[2]


def launch(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("arguments", [("--help",), ("study", "--help"), ("train", "--help"), ("fit", "--help")])
def test_help_explains_itself(arguments):
    done = called(main, *arguments)
    assert done.returncode == 0
    assert "usage" in done.stdout.lower()
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("studdy",), "no verb 'studdy'"),
        (("study", "experiments/quickstart.py"), "--out is required"),
        (("train", "matmul-free-tiny", "--optim.lrr", "1"), "--out is required (and these are unknown: --optim.lrr 1)"),
        (("study", "experiments/none.py", "--out", "x"), "no such experiment file"),
        (("study", "experiments/quickstart.py", "--out", "x", "--slotss", "3"), "did you mean --slots?"),
        (
            ("sweep", "experiments/quickstart.py", "--out", "x", "--status", "--collect"),
            "--status and --collect are asked for together",
        ),
        (
            ("sweep", "experiments/quickstart.py", "--out", "x", "--executor", "slurm", "--slots", "2"),
            "--slots is for workers of this machine",
        ),
        (
            ("sweep", "experiments/quickstart.py", "--out", "x", "--slurm.partition", "gpu"),
            "--slurm.… would do nothing: it needs --executor slurm",
        ),
        (
            ("study", "experiments/quickstart.py", "--out", "x", "--cloud.storage", "s3://b/r"),
            "--cloud.… would do nothing: it needs --render",
        ),
        (("train", "matmul-free-tinny", "--out", "x"), "matmul-free-tiny"),
        (("train", "matmul-free-tiny", "--out", "x", "--optim.lrr", "1"), "did you mean --optim.lr?"),
        (("train", "matmul-free-tiny", "--out", "x", "--optim.learning-rate", "1"), "did you mean --optim.lr?"),
        (("train", "matmul-free-tiny", "--out", "x", "--data.batch-size", "1"), "did you mean --data.batch?"),
        (("train", "matmul-free-tiny", "--out", "x", "--batch-size=1"), "did you mean --data.batch?"),
        (
            ("train", "matmul-free-tiny", "--out", "x", "--model.zzz", "1"),
            "zzz 1 (see launch.py train matmul-free-tiny",
        ),
        (
            ("train", "matmul-free-tiny", "--out", "x", "--optim.lr", "fast"),
            "could not convert string to float: 'fast'",
        ),
        (("train", "transformer++-tiny", "--out", "x", "--model.heads", "3"), "model.heads=3 does not divide"),
        (("train", "matmul-free-tiny", "--out", "x", "--data.weights", "3", "1"), "each of data.mixture, or none (see"),
        (("train", "matmul-free-tiny", "--out", "x", "--mesh.data", "3"), "data.batch=16 is not divisible"),
        (("train", "matmul-free-tiny", "--out", "x", "--data.corpus", "nowhere"), "no corpus 'nowhere'"),
        (("train", "matmul-free-tiny", "--out", "x", "--mesh.data", "8"), "needs 8 devices, only"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_status_1(arguments, says):
    done = called(main, *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (ROOT / "x").exists()


def test_a_process_says_no_more_than_that_line():
    """JAX has looked for devices by then."""
    done = launch("train", "matmul-free-tiny", "--out", "x", "--mesh.data", "8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("launch.py train: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("JAX_PLATFORMS", "cuda", "JAX finds no device for JAX_PLATFORMS=cuda: "),
        ("JAX_PLATFORMS", "bogus", "JAX finds no device for JAX_PLATFORMS=bogus: "),
        ("JAX_NUM_PROCESSES", "two", "JAX_NUM_PROCESSES='two' in the environment: must be a number"),
        ("SLURM_STEP_NUM_TASKS", "2", "SLURM says that this is one of several processes, but not on which nodes"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_one_clear_line(name, value, says, tmp_path):
    done = launch("train", "matmul-free-tiny", "--out", tmp_path / "x", **{"SLURM_PROCID": "0", name: value})
    assert done.returncode == 1
    assert done.stderr.startswith(f"launch.py train: {says}")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback():
    done = launch("study", "experiments/none.py", "--out", "x", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = launch("study", "experiments/quickstart.py", "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "matmul-free-w144-1.05M: steps 819..1024" in done.stdout
    assert "40 runs" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_interrupted_verb_says_so(monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfree_jax.commands.sweep.study", stopped)
    assert main(["study"]) == 130
    assert capsys.readouterr().err == "launch.py study: interrupted\n"


def test_an_error_that_nobody_foresaw_says_its_type_and_where_its_traceback_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("mmfree_jax.commands.sweep.study", lambda _: {}["optimizer"])
    assert main(["study"]) == 1
    said = capsys.readouterr().err
    (trace,) = tmp_path.iterdir()
    assert said == f"launch.py study: KeyError: 'optimizer' (traceback: {trace}; --debug shows it)\n"
    assert trace.read_text().startswith("Traceback")
    with pytest.raises(KeyError):
        main(["study", "--debug"])
    trace.unlink()
    monkeypatch.setattr("scaling.__main__.main", lambda _: {}["optimizer"])
    assert main(["fit", "x"]) == 1
    assert capsys.readouterr().err.startswith("launch.py fit: KeyError: 'optimizer' (traceback: ")


def test_errors_that_are_written_for_users_are_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, says in (("no.json", "No such file or directory"), ("bad.json", "bad.json is not JSON")):
        (tmp_path / "bad.json").write_text("{")
        monkeypatch.setattr("mmfree_jax.commands.sweep.study", lambda _, name=name: read_json(tmp_path / name))
        assert main(["study"]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert "Error" not in said
        assert len(said.splitlines()) == len(list(tmp_path.iterdir())) == 1


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def lost(_):
        raise BrokenPipeError("the coordinator is gone")

    monkeypatch.setattr("mmfree_jax.commands.sweep.study", lost)
    assert main(["study"]) == 1
    assert capsys.readouterr().err.startswith("launch.py study: BrokenPipeError: the coordinator is gone (traceback: ")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("study", "--help"), ("train", "matmul-free-tiny", "--help"), ("fit", "--help")]
)
def test_help_needs_no_encoding_that_has_all_its_characters(arguments):
    plain = {"LC_ALL": "C", "PYTHONUTF8": 0, "PYTHONCOERCECLOCALE": 0}
    for env in (plain, {"PYTHONIOENCODING": "ascii"}):
        done = launch(*arguments, **env)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage" in done.stdout.lower()
        assert done.stdout.isascii()


@pytest.mark.parametrize(
    "arguments",
    ["--help", "study --help", "train matmul-free-tiny --help", "study experiments/quickstart.py --out x --dry-run"],
)
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    piped = f"{sys.executable} -u launch.py {arguments} | sed -u q"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", piped], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_neither_markup_nor_characters_in_names_nor_a_reader_that_leaves_decide_how_a_run_ends(token_set, tmp_path):
    """The folder's name is printed in the end as it is, and the run goes on when nobody reads any more."""
    out = tmp_path / "x[lr=3e-3][/b]:x:é"
    settings = (
        f"--steps 2 --data.sequence 32 --data.batch 4 --model.vocab 257 --model.depth 1 --data.corpus {token_set.path}"
    )
    settings += " --log-every 1 --optim.warmup-steps 0 --optim.decay-steps 0 --diagnose-every 0"
    train = ("train", "matmul-free-tiny", "--out", out, *settings.split())
    done = launch(*train, PYTHONUTF8=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f" · {out}")
    assert launch(*train, PYTHONIOENCODING="ascii").stdout.rstrip().endswith(r"[lr=3e-3][/b]:x:\xe9")
    (out / "result.json").unlink()
    piped = shlex.join([sys.executable, "-u", "launch.py", *map(str, train)])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{piped} | true"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "result.json").exists()
