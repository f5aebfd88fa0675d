"""Ladders with a known truth, and the public tables where they are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scaling import Runs

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".." / "shared" / "data"
TRUTH = {"transformer++": (1.8, 180.0, 420.0, 0.34, 0.37), "matmul-free": (1.8, 320.0, 420.0, 0.36, 0.37)}


def ladder_rows(
    sizes=(1.6e5, 3e5, 6e5, 1.1e6),
    ratios=(10, 20, 40),
    noise=0.0,
    trunk=0.0,
    common=0.0,
    seed=0,
    truth=TRUTH,
    factors=None,
    designs=None,
):
    """Rows of decays off one trunk per size; noise per row, per trunk, and per cell in common to all families.

    factors: family -> its training FLOP over 6 N D, a number or a function of N (1 where absent); designs: family ->
    its own (sizes, ratios), which leaves no cells in common.
    """
    assert not (common and designs)
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(len(sizes), len(ratios))) * common
    rows = []
    for family, (floor, a, b, alpha, beta) in truth.items():
        own_sizes, own_ratios = (designs or {}).get(family, (sizes, ratios))
        factor = (factors or {}).get(family, 1.0)
        for i, n in enumerate(own_sizes):
            lift = rng.normal() * trunk
            for j, ratio in enumerate(own_ratios):
                d = ratio * n
                same = shared[i, j] if common else 0.0
                loss = (floor + a / n**alpha + b / d**beta) * np.exp(lift + same + noise * rng.normal())
                rows.append(
                    {
                        "run_id": f"{family}-{i}-{ratio}",
                        "family": family,
                        "N": n,
                        "D": d,
                        "loss": loss,
                        "flops": 6 * n * d * (factor(n) if callable(factor) else factor),
                        "cluster": f"{family}-{i}",
                        "schedule": "wsd",
                        "tokenizer": "bpe-2k",
                    }
                )
    return rows


def write_csv(path, rows):
    header = list(rows[0])
    lines = [",".join(header), *(",".join(str(row[name]) for name in header) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def small_ladder():
    """Two families, 4 sizes x 3 budgets, 0.3 % noise: what the quickstart yields."""
    return Runs.from_rows(ladder_rows(noise=0.003))


@pytest.fixture
def wide_ladder():
    """Two families, 7 sizes x 4 budgets over 4.8 decades, 0.2 % noise."""
    sizes = tuple(np.geomspace(1e6, 2.5e8, 7))
    return Runs.from_rows(ladder_rows(sizes=sizes, ratios=(5, 10, 20, 80), noise=0.002))


@pytest.fixture(scope="session")
def epoch_runs():
    path = DATA / "epoch_chinchilla" / "svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip("the public Epoch table is not at ../shared/data")
    from scaling.verify import epoch_table

    return epoch_table(path)


def with_costs(rows):
    """Rows with what the cost axes need: operations by class, 80 % of matmul-free's ternary; joules and seconds."""
    out = []
    for row in rows:
        ternary = 0.8 * row["flops"] if row["family"] == "matmul-free" else 0.0
        counts = {"flops_dense": row["flops"] - ternary, "flops_ternary": ternary}
        out.append(row | counts | {"joules": 1e-10 * row["flops"], "seconds": 1e-12 * row["flops"]})
    return out


@pytest.fixture
def brief_reports(monkeypatch):
    """Reports without pictures, which take half of the time."""
    monkeypatch.setattr("scaling.report.write.charts", lambda _: [])


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The same small report written twice: (reports, folders)."""
    from scaling.report.write import write_report

    runs = Runs.from_rows(with_costs(ladder_rows(noise=0.003)))
    steps = np.linspace(1e5, 4e6, 500)
    curves = {"matmul-free-0-20": {"tokens": steps, "flops": 1e6 * steps, "loss": 9 - np.log10(steps)}}
    folders = [tmp_path_factory.mktemp("report") for _ in range(2)]
    known = {"tuning": "three rates a family"}
    reports = [write_report(runs, f, curves=curves, title="A <title>", provenance=known, draws=100) for f in folders]
    return reports, folders
