"""Reading and refusing tables."""

import json

import numpy as np
import pytest
from conftest import ladder_rows, write_csv

from scaling import Runs, ScalingError


def test_csv_and_jsonl_read_alike(tmp_path):
    rows = ladder_rows(noise=0.01)
    csv_runs = Runs.read(write_csv(tmp_path / "runs.csv", rows))
    (tmp_path / "runs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    json_runs = Runs.read(tmp_path / "runs.jsonl")
    for name in csv_runs.columns:
        assert csv_runs[name].tolist() == json_runs[name].tolist()


def test_sweep_directory_of_results(tmp_path):
    for row in ladder_rows():
        folder = tmp_path / "runs" / row["run_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(row))
    runs = Runs.read(tmp_path)
    assert len(runs) == 24
    assert set(runs.families) == {"transformer++", "matmul-free"}


def test_flops_are_derived_and_flagged():
    runs = Runs.of(N=[1e6, 2e6], D=[1e7, 4e7], loss=[4.0, 3.5])
    assert runs["flops"].tolist() == [6e13, 4.8e14]
    assert any("6*N*D" in note for note in runs.notes)


def test_cluster_defaults_to_the_run():
    runs = Runs.of(N=[1e6, 2e6], D=[1e7, 4e7], loss=[4.0, 3.5])
    assert runs["cluster"].tolist() == runs["run_id"].tolist()


@pytest.mark.parametrize("word", ["", "NA", "nan", None, float("nan")])
def test_a_cluster_that_is_missing_in_any_word_is_the_run(word):
    rows = [row | {"cluster": word} for row in ladder_rows()]
    assert len(np.unique(Runs.from_rows(rows)["cluster"])) == len(rows)


def test_columns_where_and_constants(tmp_path):
    text = "name,params,tok,c4,kind\na,1e6,1e7,4.0,x\nb,2e6,2e7,3.5,x\nc,2e6,2e7,3.4,y\n"
    (tmp_path / "t.csv").write_text(text)
    columns = {"run_id": "name", "N": "params", "D": "tok", "loss": "c4"}
    runs = Runs.read(tmp_path / "t.csv", columns, ["kind=x"], {"family": "f"})
    assert runs["run_id"].tolist() == ["a", "b"]
    assert Runs.read(tmp_path / "t.csv", columns, ["N>=2e6"], {"family": "f"})["run_id"].tolist() == ["b", "c"]


def test_written_table_reads_back_exactly(tmp_path):
    runs = Runs.from_rows(ladder_rows(noise=0.01))
    runs.write_csv(tmp_path / "out.csv")
    again = Runs.read(tmp_path / "out.csv")
    for name in ("N", "D", "loss", "flops"):
        assert again[name].tolist() == runs[name].tolist()


def test_excluded_rows_are_set_aside_with_their_reason():
    rows = ladder_rows()
    rows[3] |= {"excluded": "true", "reason": "diverged"}
    runs = Runs.from_rows(rows)
    assert len(runs) == 23
    assert runs.set_aside == ({"run_id": rows[3]["run_id"], "reason": "diverged"},)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": "nan"}, "loss"),
        ({"loss": -1.0}, "must be positive"),
        ({"D": 0}, "'D' must be positive"),
        ({"N": "big"}, "holds text in row 1: 'big'"),
        ({"loss": "inf"}, "below 1e60"),
        ({"ended": "perhaps"}, "neither true nor false"),
        ({"family": ""}, "blank"),
    ],
)
def test_impossible_values_are_refused_by_name(change, said):
    rows = ladder_rows()
    rows[0] |= change
    with pytest.raises(ScalingError, match=said):
        Runs.from_rows(rows)


def test_missing_column_names_the_nearest():
    rows = [{("losss" if k == "loss" else k): v for k, v in row.items()} for row in ladder_rows()]
    with pytest.raises(ScalingError, match="did you mean 'losss'"):
        Runs.from_rows(rows)


def test_empty_table_and_points_inside_runs_are_refused(tmp_path):
    (tmp_path / "empty.csv").write_text("run_id,family,N,D,loss\n")
    with pytest.raises(ScalingError, match="no rows"):
        Runs.read(tmp_path / "empty.csv")
    rows = ladder_rows()
    rows[1]["run_id"] = rows[0]["run_id"]
    with pytest.raises(ScalingError, match="appears 2 times"):
        Runs.from_rows(rows)
    accepted = Runs.from_rows(rows, allow_midrun=True)
    assert len(accepted) == 24
    assert any("inside a schedule accepted" in note for note in accepted.notes)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(ScalingError, match="not UTF-8"):
        Runs.read(tmp_path / "x.csv")


def test_where_takes_a_key_that_some_rows_leave_out(tmp_path):
    rows = [{"run_id": "a", "family": "f", "N": 1e6, "D": 1e7, "loss": 3.0, "note": "good"}]
    rows += [{"run_id": "b", "family": "f", "N": 1e7, "D": 1e8, "loss": 2.5}]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Runs.read(path, where="note=good")["run_id"].tolist() == ["a"]
    assert Runs.read(path, where="note!=good")["run_id"].tolist() == ["b"]
    with pytest.raises(ScalingError, match="no column 'nota'; did you mean 'note'"):
        Runs.read(path, where="nota=good")


def test_where_holds_no_blank_for_a_number(tmp_path):
    rows = [
        {"run_id": str(k), "family": "f", "N": 1e6, "D": 1e7, "loss": 3.0} | extra
        for k, extra in enumerate([{"lr": 0.1}, {}])
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Runs.read(path, where="lr<1")["run_id"].tolist() == ["0"]
