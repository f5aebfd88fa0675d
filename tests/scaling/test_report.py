"""The written report: contract, determinism, self-containment."""

import json
import re

import pytest
from conftest import ladder_rows

from scaling import Runs
from scaling.report.artefact import read_draws
from scaling.report.summary import parameter_table
from scaling.report.write import write_report
from scaling.tables.curves import sweep_curves


def test_fit_json_keeps_its_contract(written):
    data = json.loads((written[1][0] / "fit.json").read_text())
    assert set(data["families"]) == {"transformer++", "matmul-free"}
    for entry in data["families"].values():
        assert entry["law"] == "chinchilla"
        assert set(entry["parameters"]) == set(entry["intervals"]) == {"E", "A", "B", "alpha", "beta"}
        assert {"gradient", "agreeing", "starts", "bounds_hit", "second_solver_gap"} <= set(entry["certificate"])
        assert entry["objective"]["name"] == "huber"


def test_stored_parameters_predict_to_full_precision(written):
    """The numbers in fit.json give the fit's own predictions."""
    (report, _), (folder, _) = written
    for family, entry in json.loads((folder / "fit.json").read_text())["families"].items():
        p = entry["parameters"]
        loss = p["E"] + p["A"] / 1e6 ** p["alpha"] + p["B"] / 2e7 ** p["beta"]
        assert report.found.fits[family].predict(1e6, 2e7)[0] == pytest.approx(loss, rel=1e-12)


def test_printed_parameters_predict_within_a_hundredth_of_a_percent(written):
    found = written[0][0].found
    _, rows = parameter_table(found.fits, found.draws)
    for column, fitted in enumerate(found.fits.values(), 1):
        p = {row[0]: float(row[column].split(" ")[0]) for row in rows}
        loss = p["E"] + p["A"] / 1e6 ** p["alpha"] + p["B"] / 2e7 ** p["beta"]
        assert fitted.predict(1e6, 2e7)[0] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["fit.json", "report.md", "report.html", "runs.csv", "difference.png", "draws.npz"])
def test_equal_input_gives_equal_bytes(written, name):
    one, two = ((folder / name).read_bytes() for folder in written[1])
    assert one == two


def test_page_opens_offline_and_is_small(written):
    html = (written[1][0] / "report.html").read_text()
    assert len(html) < 6e6
    shell = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""(src|href)=["']https?:""", shell)
    assert "A &lt;title&gt;" in shell
    assert (
        shell.index("The crossing is not determined")
        < shell.index("figure-difference-0-flops")
        < shell.index("figure-loss")
    )


def test_unrecorded_provenance_is_listed_as_missing(written):
    (report, _), (folder, _) = written
    assert report.found.provenance["tuning"] == "three rates a family"
    assert report.found.provenance["hardware"] is None
    assert "| hardware | missing |" in (folder / "report.md").read_text()


@pytest.mark.parametrize("width", [60, 100])
def test_terminal_summary_has_runs_parameters_and_verdict(written, width):
    text = written[0][0].terminal_summary(width)
    assert max(map(len, text.splitlines())) <= width
    assert "The crossing is not determined" in text
    assert re.search(r"\nalpha\s+(\S+ +)?0\.\d+ \[[\d.]+, [\d.]+\]", text)  # in its row, or below it
    assert sum(line.startswith(("160k", "300k", "600k", "1.1M")) for line in text.splitlines()) == 12


def test_lone_family_gets_a_report(tmp_path, wide_ladder):
    report = write_report(wide_ladder.family("matmul-free"), tmp_path, draws=50)
    assert not report.found.pairs
    assert "no second family" in report.verdict[0]
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_branch_is_drawn_with_the_trunk_that_it_grew_from(tmp_path):
    for name, branch, steps in (("trunk", None, (1, 2, 3, 4)), ("decay", {"run": "trunk", "step": 2}, (3, 4))):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"branch": branch}))
        rows = [{"tokens": 10 * s, "flops": 1e6 * s, "loss": 5.0 - s - (name == "decay")} for s in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"tokens": 5')
    curves = sweep_curves(tmp_path)
    assert curves["trunk"]["loss"].tolist() == [4, 3, 2, 1]
    assert curves["decay"]["loss"].tolist() == [4, 3, 1, 0]
    assert curves["decay"]["tokens"].tolist() == [10, 20, 30, 40]


def test_names_of_families_need_not_be_names_of_files(tmp_path, coarse_profiles):
    """A slash, an argument of NumPy's own, and two names that would be one file."""
    truth = {"file": (1.8, 180.0, 420.0, 0.34, 0.37), "a/b": (1.8, 320.0, 420.0, 0.36, 0.37)}
    truth["a_b"] = (1.8, 250.0, 420.0, 0.35, 0.37)
    rows = ladder_rows(noise=0.003, truth=truth)
    write_report(Runs.from_rows(rows), tmp_path, draws=10)
    assert set(read_draws(tmp_path)) == set(truth)
    assert all(len(theta) == 10 for theta in read_draws(tmp_path).values())
    names = sorted(path.name for path in tmp_path.glob("difference-*.png"))
    assert names == ["difference-a_b-1.png", "difference-a_b-2.png"]
    page = (tmp_path / "report.md").read_text()
    assert all(f"({name})" in page for name in names)


def test_findings_keep_their_rows(tmp_path, brief_reports):
    rows = ladder_rows(noise=0.003)
    report = write_report(Runs.from_rows([*rows, rows[0] | {"run_id": "copied"}]), tmp_path, draws=10)
    assert "copied" in (tmp_path / "report.md").read_text().partition("## Checks")[2]
    assert "duplicates [transformer++]" in [g.name for g in report.gates if not g.passed]
    assert "transformer++-0-10, copied" in (tmp_path / "report.html").read_text()
