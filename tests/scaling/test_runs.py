"""Reading and refusing tables."""

import json
import re

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
    kept = Runs.read(path, where="note=good")
    assert kept["run_id"].tolist() == ["a"]
    assert any(re.fullmatch(r"1 of \d rows kept: note=good", note) for note in kept.notes)
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


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"N": "params*1e6"}, {"N": 2.5e6}),
        ({"loss": "1-acc"}, {"loss": 0.75}),
        ({"D": "steps*batch"}, {"D": 1.28e8}),
        ({"loss": "log(`ppl on c4`)"}, {"loss": np.log(20.0)}),
        ({"N": "size"}, {"N": 2.8e9}),
        ({"D": "tokens seen"}, {"D": 1_300_000_000.0}),
    ],
)
def test_columns_may_be_arithmetic_in_other_names_and_units(tmp_path, columns, expected):
    row = {"params": 2.5, "acc": 0.25, "steps": 1000, "batch": 128000, "ppl on c4": 20, "size": "2.8B"}
    row |= {"run_id": "r", "family": "f", "N": 1e6, "D": 1e8, "loss": 3.0, "tokens seen": "1,300,000,000"}
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    runs = Runs.read(path, columns)
    for name, value in expected.items():
        assert runs[name][0] == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params*", "neither a column nor arithmetic"),
        ("parms*1e6", "no column 'parms'; did you mean 'params'"),
        ("__import__('os')", "may hold numbers"),
        ("params.real", "may hold numbers"),
        ("note*2", "'note' holds text in row 1"),
    ],
)
def test_arithmetic_that_means_nothing_is_refused(tmp_path, text, said):
    path = tmp_path / "runs.jsonl"
    row = {"run_id": "r", "family": "f", "N": 1e6, "D": 1e8, "loss": 3.0, "params": 1.0, "note": "good"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ScalingError, match=re.escape(said)):
        Runs.read(path, {"N": text})


def test_a_mapped_column_may_be_named_by_either_name_and_blanks_be_asked_for(tmp_path):
    rows = [{"run_id": str(k), "family": "f", "params": 1e6 * (k + 1), "D": 1e8, "loss": 3.0} for k in range(3)]
    rows[1]["lr"] = 0.1
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = lambda where: Runs.read(path, {"N": "params"}, where)["run_id"].tolist()
    assert read(["N>=2e6"]) == read(["params>=2e6"]) == ["1", "2"]
    assert read(["run_id==1"]) == ["1"]
    assert read(["lr="]) == ["0", "2"]
    assert read(["lr!="]) == ["1"]


def test_families_may_number_their_runs_alike_and_checkpoints_without_names_are_one_trunk():
    rows = [{"run_id": k % 4, "family": "ab"[k // 4], "N": 1e6, "D": 1e7 * (1 + k % 4), "loss": 3.0} for k in range(8)]
    assert len(Runs.from_rows(rows)) == 8
    nameless = [{k: v for k, v in row.items() if k != "run_id"} for row in rows]
    assert len(set(Runs.from_rows(nameless)["cluster"])) == 2
    assert any("count as one trunk" in note for note in Runs.from_rows(nameless).notes)


def test_units_are_checked_and_never_made_up(small_ladder):
    assert small_ladder.loss_unit == "units of loss"
    rows = [row | {"loss_unit": "banana"} for row in ladder_rows()]
    with pytest.raises(ScalingError, match="loss_unit 'banana' is unknown"):
        Runs.from_rows(rows)
    nats = Runs.from_rows([row | {"loss_unit": "nats"} for row in ladder_rows()])
    assert nats.loss_label == "nats per token"


def test_a_table_is_a_frame_and_back(small_ladder):
    frame = small_ladder.to_frame()
    assert repr(small_ladder) == "<Runs: 24 of transformer++, matmul-free, from memory>"
    assert Runs.any(frame)["loss"].tolist() == small_ladder["loss"].tolist()
