"""Runs from the places that other tools leave them in."""

import gzip
import json
import struct

import numpy as np
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
    with pytest.raises(ScalingError, match=r"no runs\.csv"):
        Runs.read(tmp_path)


GOOD = [{"run_id": f"r{k}", "family": "f", "N": 1e6 * k, "D": 1e8, "loss": 3.5 - 0.1 * k} for k in range(1, 6)]


def as_csv(rows, mark=",", end=""):
    return (
        "\n".join([mark.join(rows[0]) + end, *(mark.join(str(v) for v in row.values()) + end for row in rows)]) + "\n"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("runs.csv", as_csv(GOOD, end=",")),
        ("RUNS.CSV", as_csv(GOOD)),
        ("runs.tsv", as_csv(GOOD, "\t")),
        ("runs.csv", as_csv(GOOD, ";").replace(".", ",")),
        ("runs.json", json.dumps(GOOD)),
        ("runs.json", json.dumps({"runs": GOOD})),
        ("runs.jsonl", "\n".join(json.dumps(row | {"note": "a\u2028b"}, ensure_ascii=False) for row in GOOD)),
        ("runs.csv", as_csv([row | {"note": "x" * 200_000} for row in GOOD])),
        ("runs.csv", as_csv(GOOD).replace("run_id,family,N", " run_id, family ,N ")),
    ],
)
def test_every_usual_way_to_write_a_table_is_read(tmp_path, name, text):
    for path, data in ((tmp_path / name, text.encode()), (tmp_path / f"{name}.gz", gzip.compress(text.encode()))):
        path.write_bytes(data)
        runs = Runs.read(path)
        assert runs["N"].tolist() == [row["N"] for row in GOOD]
        np.testing.assert_allclose(runs["loss"], [row["loss"] for row in GOOD])


def test_a_quote_that_never_closes_swallows_no_rows(tmp_path):
    path = tmp_path / "runs.csv"
    lines = as_csv([row | {"note": "ok"} for row in GOOD]).splitlines()
    lines[3] = lines[3].replace("ok", '"rerun after crash')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ScalingError, match="a quote that never closes"):
        Runs.read(path)


def test_a_folder_of_histories_is_one_run_a_file(tmp_path):
    for row in GOOD:
        history = [row | {"D": row["D"] / 2, "loss": row["loss"] + 1}, row]
        (tmp_path / f"{row['run_id']}.csv").write_text(
            as_csv([{k: v for k, v in r.items() if k != "run_id"} for r in history])
        )
    runs = Runs.read(tmp_path)
    assert runs["run_id"].tolist() == [row["run_id"] for row in GOOD]
    assert runs["loss"].tolist() == [row["loss"] for row in GOOD]


def test_nested_summaries_and_settings_are_named_with_dots(tmp_path):
    files = tmp_path / "run-1" / "files"
    files.mkdir(parents=True)
    (files / "wandb-summary.json").write_text('{"val/loss": {"min": 3.2}, "N": 1000000, "D": 20000000, "_step": 10}')
    (files / "config.yaml").write_text(
        'lr:\n    value: 0.001\nmodel:\n    value:\n        width: 128\nname:\n    desc: null\n    value: "a: b # c"\n'
    )
    runs = Runs.read(tmp_path, {"loss": "val/loss.min", "family": "config.name"})
    assert runs["loss"].tolist() == [3.2]
    assert runs["family"].tolist() == ["a: b # c"]
    assert runs["config.model.width"].tolist() == [128]


def test_scalars_written_as_tensors_are_read(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.proto.tensor_pb2 import TensorProto

    tensor = TensorProto(dtype=1, tensor_content=np.float32(3.25).tobytes())
    record = Event(step=7, summary=Summary(value=[Summary.Value(tag="loss", tensor=tensor)])).SerializeToString()
    (tmp_path / "run1").mkdir()
    data = struct.pack("<Q", len(record)) + b"0000" + record + b"0000"
    (tmp_path / "run1" / "events.out.tfevents.1.host.1.0.v2").write_bytes(data)
    runs = Runs.read(tmp_path, {"D": "step*1e6"}, constants={"family": "f", "N": "1e6"})
    assert runs["loss"].tolist() == [3.25]
    assert runs["D"].tolist() == [7e6]
