"""Runs from the places that other tools leave them in."""

import json

import pytest
from conftest import ladder_rows

from scaling import Runs, ScalingError

COLUMNS = {"N": "config.params", "D": "tokens", "loss": "eval/loss"}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = ladder_rows(noise=0.01)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "runs.parquet")
    runs = Runs.read(tmp_path / "runs.parquet")
    assert runs["loss"].tolist() == [row["loss"] for row in rows]
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ScalingError, match="not a Parquet file"):
        Runs.read(tmp_path / "bad.parquet")


def test_wandb_folder(tmp_path):
    for k, (params, loss) in enumerate([(1000000, 4.5), (2000000, 4.0)]):
        files = tmp_path / f"run-2026-{k}" / "files"
        files.mkdir(parents=True)
        summary = {"eval/loss": loss, "tokens": 1e7, "_runtime": 5, "hist": {"bins": []}}
        (files / "wandb-summary.json").write_text(json.dumps(summary))
        (files / "config.yaml").write_text(f"wandb_version: 1\n\nparams:\n    desc: null\n    value: {params}\n")
    runs = Runs.read(tmp_path, COLUMNS, constants={"family": "a"})
    assert runs["N"].tolist() == [1e6, 2e6]
    assert runs["loss"].tolist() == [4.5, 4.0]
    assert runs["run_id"].tolist() == ["run-2026-0", "run-2026-1"]


def test_wandb_table_export_refuses_unfinished_runs(tmp_path):
    text = "Name,State,params,tokens,val\na,finished,1e6,1e7,4.5\nb,crashed,2e6,1e7,4.9\n"
    (tmp_path / "export.csv").write_text(text)
    columns = {"N": "params", "D": "tokens", "loss": "val"}
    with pytest.raises(ScalingError, match="ended=false, first 'b'"):
        Runs.read(tmp_path / "export.csv", columns, constants={"family": "a"})
    kept = Runs.read(tmp_path / "export.csv", columns, ["state=finished"], {"family": "a"})
    assert kept["run_id"].tolist() == ["a"]


def test_tensorboard_folder(tmp_path):
    writers = pytest.importorskip("tensorboardX")
    for name, end in (("small", 4.5), ("big", 4.0)):
        with writers.SummaryWriter(str(tmp_path / name)) as writer:
            for step in range(5):
                writer.add_scalar("eval/loss", end + 4 - step, step)
            writer.add_scalar("tokens", 1e7, 4)
            writer.add_scalar("config.params", 1e6 if name == "small" else 2e6, 0)
    runs = Runs.read(tmp_path, COLUMNS, constants={"family": "a"})
    assert runs["run_id"].tolist() == ["big", "small"]
    assert runs["loss"].tolist() == [4.0, 4.5]
    assert runs["N"].tolist() == [2e6, 1e6]


def test_pickles_are_refused_unopened(tmp_path):
    (tmp_path / "runs.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ScalingError, match="export it as CSV"):
        Runs.read(tmp_path / "runs.pkl")


def test_folder_without_runs_says_what_it_looked_for(tmp_path):
    with pytest.raises(ScalingError, match=r"none of runs\.csv"):
        Runs.read(tmp_path)
