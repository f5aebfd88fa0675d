"""Tables that no fit should accept, through the command line: one clear line or a gate, never a traceback."""

import re
import warnings

import numpy as np
import pytest
from conftest import ladder_rows, write_csv

from scaling.__main__ import main

ROWS = [row for row in ladder_rows(sizes=tuple(np.geomspace(1e6, 2.5e8, 7)), ratios=(5, 10, 20, 80), noise=0.002)][:28]
ODD = {"run_id": "odd", "family": "transformer++", "N": 1e8, "D": 1e9, "loss": 2.5}
ONE_FAMILY = [{k: row[k] for k in ODD} for row in ROWS]
TABLES = {
    "empty": ([], "has no rows"),
    "one size": ([row | {"N": 1e8} for row in ONE_FAMILY], "single value of N"),
    "NaN loss": ([*ONE_FAMILY, ODD | {"loss": "nan"}], "'loss' must be positive"),
    "negative loss": ([*ONE_FAMILY, ODD | {"loss": -2.0}], "'loss' must be positive"),
    "zero tokens": ([*ONE_FAMILY, ODD | {"D": 0}], "'D' must be positive"),
    "two rows": (ONE_FAMILY[:2], "2 rows; law 'chinchilla' has 5 parameters"),
    "text in a number": ([*ONE_FAMILY, ODD | {"N": "big"}], "'N' holds text in row 29: 'big'"),
    "identical losses": ([row | {"loss": 3.0} for row in ONE_FAMILY], "all losses are identical"),
}
SMALL_LADDER = ["--sizes", "1e7,3e7,1e8", "--ratios", "5,20"]
VERBS = {
    "compare": ["--draws", "20"],
    "crossover": ["--draws", "20"],
    "plan": ["--draws", "5", "--simulations", "2", "--budget", "1e18", "--target", "1e18"],
    "power": ["--draws", "5", "--simulations", "2", "--target", "1e18", *SMALL_LADDER],
    "plot": ["--out", "{out}.png"],
    "fit": ["--draws", "20"],
    "backtest": ["--draws", "20"],
    "allocate": ["--draws", "20", "--C", "1e20"],
    "report": ["--draws", "20", "--out", "{out}"],
    "lint": [],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("table", TABLES)
def test_every_verb_answers_bad_tables_in_one_line(verb, table, tmp_path, capsys):
    rows, said = TABLES[table]
    if verb in ("compare", "crossover", "plan", "power"):  # these need a second family, no better than the first
        rows = [*rows, *(row | {"family": "b", "run_id": f"b-{row['run_id']}"} for row in rows)]
    path = tmp_path / "runs.csv"
    if rows:
        write_csv(path, rows)
    else:
        path.write_text("run_id,family,N,D,loss\n")
    status = main([verb, str(path), *(flag.format(out=tmp_path / "out") for flag in VERBS[verb])])
    out, err = capsys.readouterr()
    if verb == "plot" and status == 0:
        assert (tmp_path / "out.png").stat().st_size > 0
    elif verb == "lint" and status == 0:
        assert "finding(s)" in out  # a table that can be read is described, not refused
    elif verb == "backtest" and status == 2:
        assert "No back-test is possible" in out
    else:
        assert status == 1
        assert said in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no fit.json"),
        ("", "is not a fit.json"),
        ("{", "is not a fit.json"),
        ("[1]", "has no 'families'"),
        ('{"families": {}}', "another version"),
        ("without runs", "no .*runs.csv"),
        ("fit", "no family 'other'"),
    ],
)
def test_predict_answers_bad_artefacts_in_one_line(content, said, tmp_path, capsys, brief_reports):
    if content in ("fit", "without runs"):
        table = str(write_csv(tmp_path / "table.csv", ROWS))
        assert main(["report", table, "--draws", "5", "--out", str(tmp_path)]) == 0
        capsys.readouterr()
        if content == "without runs":
            (tmp_path / "runs.csv").unlink()
    elif content is not None:
        (tmp_path / "fit.json").write_text(content)
    assert main(["predict", str(tmp_path), "--N", "1e8", "--D", "1e9", "--family", "other"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(said, err)
    assert len(err.strip().splitlines()) == 1


def test_a_million_rows_are_fitted(tmp_path, capsys):
    """The reader's and the fit's cost grow linearly: 60,000 rows stand for a million here (12 s of CPU time there)."""
    rng = np.random.default_rng(0)
    n = 10 ** rng.uniform(6, 10, 60_000)
    d = n * 10 ** rng.uniform(0.5, 2.3, len(n))
    loss = (1.8 + 180 / n**0.34 + 420 / d**0.37) * np.exp(0.01 * rng.normal(size=len(n)))
    lines = [f"{k},a,{a:.6g},{b:.6g},{c:.8g}" for k, (a, b, c) in enumerate(zip(n, d, loss, strict=True))]
    (tmp_path / "runs.csv").write_text("run_id,family,N,D,loss\n" + "\n".join(lines))
    assert main(["fit", str(tmp_path / "runs.csv"), "--draws", "50"]) == 0
    assert "60000 rows" in capsys.readouterr().out
    assert main(["lint", str(tmp_path / "runs.csv")]) == 0


@pytest.mark.parametrize("verb", ["lint", "fit", "compare", "backtest"])
def test_no_warning_of_a_library_reaches_the_user(tmp_path, capsys, verb):
    """Three sizes at nearly one budget: parabolas without rank, exponents that the design cannot give."""
    rows = ladder_rows(sizes=(1e6, 1.0001e6, 4e7), ratios=(20, 20.001, 21), noise=0.002)
    path = write_csv(tmp_path / "runs.csv", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main([verb, str(path), *(["--draws", "30"] if verb != "lint" else [])])
    assert "Warning" not in capsys.readouterr().err
