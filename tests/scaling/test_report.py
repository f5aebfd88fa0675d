"""The written report: contract, determinism, self-containment."""

import json
import re

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs
from scaling.report.chart import Chart, Points
from scaling.report.figures import look
from scaling.report.plot import drawn
from scaling.report.sections import parameter_table
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
    rows = parameter_table(found).rows
    for family, fitted in found.fits.items():
        p = {name: float(best) for f, name, _, best, _ in rows if f == family}
        loss = p["E"] + p["A"] / 1e6 ** p["alpha"] + p["B"] / 2e7 ** p["beta"]
        assert fitted.predict(1e6, 2e7)[0] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["fit.json", "report.md", "report.html", "runs.csv", "difference.png", "loss.png"])
def test_equal_input_gives_equal_bytes(written, name):
    one, two = ((folder / name).read_bytes() for folder in written[1])
    assert one == two


def test_page_opens_offline_is_small_and_reads_in_order(written):
    """Loss against compute, matched cells, frontiers, then the rest; 3 MB with plotly.js, which travels compressed."""
    html = (written[1][0] / "report.html").read_text()
    assert len(html) < 3e6
    shell = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert len(html) - len(re.search(r'id="library">(.*?)</script>', html, flags=re.S)[1]) < 1.5e6
    assert not re.search(r"""(src|href)=["']https?:""", shell)
    assert "A &lt;title&gt;" in shell
    places = [
        shell.index(x) for x in ("Not decided", "figure-loss", "figure-cells", "figure-difference", "Fitted laws")
    ]
    assert places == sorted(places)


def test_each_failure_is_said_once(written):
    report = written[0][0]
    said = " ".join(report.verdict)
    for gate in report.found.failed:
        assert said.count(gate.name) == 1
    assert f"{len(report.found.failed)} checks fail" in said


def test_axes_on_which_nothing_differs_are_named_and_not_drawn(written):
    """Joules and seconds are proportional to FLOP in that table; ternary operations cost another energy."""
    text = (written[1][0] / "report.md").read_text()
    assert "Proportional to FLOP in these runs" in text
    assert "J measured, accelerator-seconds" in text
    assert "](difference-energy.png)" in text
    assert "](difference-joules.png)" not in text


def test_several_pairs_have_a_headline_each_and_the_rest_in_their_sections(tmp_path, brief_reports):
    """What is undecided along every path is said once for all of them."""
    rows = ladder_rows(sizes=tuple(np.geomspace(1e6, 2.5e8, 6)), ratios=(5, 20, 80), noise=0.003)
    rows += [row | {"family": "third", "run_id": f"3-{k}"} for k, row in enumerate(rows[:18])]
    report = write_report(Runs.from_rows(rows), tmp_path, draws=50)
    assert len([line for line in report.verdict if " against transformer++: " in line]) == 2
    assert not any("one decade beyond the runs" in line for line in report.verdict)
    text = (tmp_path / "report.md").read_text()
    assert text.count("one decade beyond the runs, the frontier of") == 2
    assert text.count("do not say which of transformer++ and third leads.") == 2  # in the verdict and in its section
    assert "\nNor at " in text


def test_no_two_of_eighty_families_look_alike():
    assert len({look(k) for k in range(80)}) == 80
    assert len({look(k)[0] for k in range(8)}) == 8


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path, brief_reports):
    runs = Runs.from_rows(ladder_rows(noise=0.003)).family("matmul-free")
    (tmp_path / "report.md").write_text("![what was compared](difference.png)\n\nsee [a page](other.png) too\n")
    for name in ("difference.png", "other.png"):
        (tmp_path / name).write_bytes(b"old")
    write_report(runs, tmp_path, draws=20)
    assert not (tmp_path / "difference.png").exists()
    assert (tmp_path / "other.png").exists()


def test_the_pages_size_does_not_grow_with_the_table(tmp_path):
    rng = np.random.default_rng(0)
    n = 10 ** rng.uniform(6, 9, 2000)
    d = n * 10 ** rng.uniform(0.5, 2.3, 2000)
    loss = (1.8 + 180 / n**0.34 + 420 / d**0.37) * np.exp(0.01 * rng.normal(size=2000))
    write_report(Runs.of(N=n, D=d, loss=loss), tmp_path, draws=50)
    assert (tmp_path / "report.html").stat().st_size < 3e6
    assert "300 of 2000 runs; runs.csv holds all" in (tmp_path / "report.html").read_text()


def test_unrecorded_provenance_is_listed_as_missing(written):
    _, (folder, _) = written
    block = json.loads((folder / "fit.json").read_text())["provenance"]
    assert block["tuning"] == "three rates a family"
    assert block["hardware"] is None
    assert re.search(r"^\| missing \| .*\bhardware\b", (folder / "report.md").read_text(), re.M)


@pytest.mark.parametrize("width", [60, 100])
def test_terminal_summary_has_runs_parameters_and_verdict(written, width):
    text = written[0][0].terminal_summary(width)
    assert max(map(len, text.splitlines())) <= width
    assert "Not decided" in text
    assert re.search(r"alpha\s+0\.\d+ \(0\.\d+\s+to\s+0\.\d+\)", text)
    assert sum(line.startswith(("transformer++-", "matmul-free-")) for line in text.splitlines()) == 24


def test_lone_family_gets_a_report(tmp_path, wide_ladder):
    report = write_report(wide_ladder.family("matmul-free"), tmp_path, draws=50)
    assert not report.found.pairs
    assert "the best loss at" in report.verdict[0]
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


HOSTILE = {"a/b": 0.34, "<script>alert(1)</script>": 0.36, "$x^2$ | [b](c)": 0.35}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A slash, HTML, mathematics and Markdown as names of families."""
    folder = tmp_path_factory.mktemp("hostile")
    truth = {name: (1.8, 250.0, 420.0, alpha, 0.37) for name, alpha in HOSTILE.items()}
    write_report(Runs.from_rows(ladder_rows(noise=0.003, truth=truth)), folder, draws=20)
    return folder


def test_names_of_families_need_not_be_names_of_files(hostile):
    names = sorted(path.name for path in hostile.glob("difference-[0-9].png"))
    assert names == ["difference-1.png", "difference-2.png"]
    page = (hostile / "report.md").read_text()
    assert all(f"({name})" in page for name in names)
    assert set(json.loads((hostile / "fit.json").read_text())["families"]) == set(HOSTILE)


def test_names_are_data_in_every_language_that_they_are_put_into(hostile):
    html, page = ((hostile / name).read_text() for name in ("report.html", "report.md"))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', html, flags=re.S)[1])
    texts = json.dumps(
        [c["layout"].get("title", "") for c in charts.values()]
        + [t.get("name", "") for c in charts.values() for t in c["data"]]
    )
    assert "<script>" not in texts
    assert "$x^2$" not in texts
    assert "<script>" not in page
    assert "\\[b\\](c)" in page


def test_pictures_show_names_as_they_are_and_powers_of_ten_as_such():
    points = Points(np.array([1e18, 1e20]), np.array([3.0, 2.5]), "#000000", name="$x^2$")
    figure = drawn(Chart("c", "A caption.", "compute", "$y$", (points,)))
    axes = figure.axes[0]
    assert figure.legends[0].get_texts()[0].get_text() == r"\$x^2\$"
    assert axes.get_ylabel() == r"\$y\$"
    figure.draw_without_rendering()
    tick = next(t for t in axes.get_xticklabels() if "10^{18}" in t.get_text())
    assert tick.get_parse_math()


def test_findings_keep_their_rows(tmp_path, brief_reports):
    rows = ladder_rows(noise=0.003)
    report = write_report(Runs.from_rows([*rows, rows[0] | {"run_id": "copied"}]), tmp_path, draws=10)
    assert "copied" in (tmp_path / "report.md").read_text().partition("## Checks")[2]
    assert "duplicates [transformer++]" in [g.name for g in report.found.failed]
    assert "transformer++-0-10, copied" in (tmp_path / "report.html").read_text()
