"""Points inside runs, as the law `annealed` uses them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from scaling import Runs, ScalingError, fit
from scaling.__main__ import main
from scaling.tables.curves import MOMENTUM, annealed, effort

STEPS, PEAK = 20_000, 3e-3
TRUTH = (1.8, 180.0, 420.0, 0.34, 0.37, 0.15)  # E, A, B, alpha, beta, G


# 48 rows of each of three schedules from the folders csv_25, csv_100 and csv_400 of Luo et al. 2025, arXiv 2503.12811:
# github.com/thu-yao-01-luo/MultiPowerLaw (MIT, (c) 2025 Kairong Luo). A step is taken as half a million tokens.
PUBLIC = Path(__file__).with_name("annealing_curves.csv")
STEP_TOKENS = 2.0**19


def schedule(kind, steps=STEPS):
    s = np.arange(steps + 1)
    warm = np.minimum(s / 400, 1.0)
    left = 1 - s / steps
    fall = {"cosine": 0.5 + 0.5 * np.cos(np.pi * s / steps), "wsd": np.minimum(left / 0.2, 1.0), "constant": 1 + 0 * s}
    return PEAK * warm * fall[kind]


def direct(lr):
    """S1 (in steps at the peak) and S2, by the sums of the paper, over the steps from the peak on."""
    rate, peak = lr / lr.max(), int(np.argmax(lr))
    fall = np.where(np.arange(len(lr)) > peak, np.append(0.0, -np.diff(rate)), 0.0)
    momentum, out = 0.0, []
    for x in fall:
        momentum = MOMENTUM * momentum + x
        out.append(momentum)
    return np.cumsum(rate), np.cumsum(out)


def curve(n, kind, logged=50, noise=0.0, rng=None):
    """A run of n parameters, logged every so many steps, whose loss is the law at every point."""
    lr, step = schedule(kind), np.arange(logged, STEPS + 1, logged)
    per_step = 20 * n / STEPS
    s1, s2 = direct(lr)
    e, a, b, alpha, beta, g = TRUTH
    s1, s2 = s1[step], s2[step]
    loss = e + a / n**alpha + b / (s1 * per_step) ** beta - g * (1 - MOMENTUM) * s2
    loss = loss * np.exp(noise * (rng or np.random.default_rng(0)).normal(size=len(step)))
    tokens = step * per_step
    return {"step": step, "lr": lr[step], "tokens": tokens, "flops": 6 * n * tokens, "loss": loss}


def table(kinds, sizes=(1e7, 3e7, 1e8, 3e8), **settings):
    curves = {f"{kind}-{n:.0e}": curve(n, kind, **settings) for kind in kinds for n in sizes}
    rows = [
        {"run_id": name, "family": "f", "N": float(name.split("-", 1)[1]), "D": c["tokens"][-1], "loss": c["loss"][-1]}
        for name, c in curves.items()
    ]
    return Runs.from_rows(rows), curves


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_effort_is_that_of_the_papers_sums(kind):
    lr, step = schedule(kind), np.arange(50, STEPS + 1, 50)
    tokens, share = effort(step, 1000.0 * step, lr[step])
    s1, s2 = direct(lr)
    np.testing.assert_allclose(share, (1 - MOMENTUM) * s2[step], atol=2e-3)
    np.testing.assert_allclose(tokens[20:], 1000 * s1[step][20:], rtol=0.01)


def test_curves_of_one_schedule_foretell_the_end_of_another():
    """Fitted inside cosine runs, the law knows where a warm-up-stable-decay run ends, and where a constant one is;
    Chinchilla's law on the same points takes them for ends and does not."""
    runs, curves = table(["cosine"], noise=0.002, rng=np.random.default_rng(1))
    points = annealed(runs, curves)
    assert len(points) > 10 * len(runs)
    found = fit(points, "annealed", "log-ls")
    other, others = table(["wsd", "constant"])
    ends = annealed(other, others)
    ends = ends.select(
        np.array(
            [
                str(name).endswith(f"@{len(others[str(c)]['step']) - 1}")
                for name, c in zip(ends["run_id"], ends["cluster"], strict=True)
            ]
        )
    )
    assert len(ends) == len(other)
    error = found.predict_rows(found.theta[None], ends, "f")[0] / ends["loss"] - 1
    assert np.abs(error).max() < 0.01
    plain = fit(points, "chinchilla", "log-ls")
    assert np.abs(plain.predict(ends["N"], ends["D"]) / ends["loss"] - 1).max() > 0.02


def test_public_curves_of_two_schedules_foretell_a_third():
    """GPTs of 25M, 100M and 400M parameters, 24,000 steps: fitted inside constant and cosine runs, the law knows where
    warm-up-stable-decay runs end within 1 % (Chinchilla's errs by 2 to 4 %), and its annealing helps as published."""
    rows = list(csv.DictReader(PUBLIC.open()))
    curves: dict = {}
    for row in rows:
        curves.setdefault((float(row["size"]), row["schedule"]), []).append(
            [float(row[k]) for k in ("step", "lr", "loss")]
        )
    ends, found = [], {}
    for (n, kind), points in curves.items():
        step, lr, loss = np.array(points).T
        name = f"{n:g}-{kind}"
        ends.append({"run_id": name, "family": kind, "N": n, "D": step[-1] * STEP_TOKENS, "loss": loss[-1]})
        tokens = step * STEP_TOKENS
        found[name] = {"step": step, "lr": lr, "loss": loss, "tokens": tokens, "flops": 6 * n * tokens}
    points = annealed(Runs.from_rows(ends), found)
    fitted = points.select(points["family"] != "wsd")
    fitted.columns["family"][:] = "gpt"
    law, plain = fit(fitted, "annealed"), fit(fitted, "chinchilla")
    last = points.select(np.array([np.flatnonzero(points["cluster"] == f"{n:g}-wsd")[-1] for n in (25e6, 1e8, 4e8)]))
    error = law.predict_rows(law.theta[None], last, "gpt")[0] / last["loss"] - 1
    assert np.abs(error).max() < 0.01
    assert np.abs(plain.predict(last["N"], last["D"]) / last["loss"] - 1).min() > 0.015
    assert 0.1 < law.params["G"] < 0.2  # nats that a complete annealing is worth


def test_what_decays_have_of_one_trunk_counts_once():
    runs, curves = table(["cosine"], sizes=(1e7,))
    twice = Runs.from_rows(
        [row | {"run_id": name, "cluster": "trunk"} for row in runs.records() for name in ("a", "b")]
    )
    curves = dict.fromkeys("ab", curves["cosine-1e+07"])
    points = annealed(twice, curves)
    assert len(points) == len(np.unique(points["D"]))
    assert set(points["cluster"]) == {"trunk"}


def test_curves_without_a_schedule_are_refused():
    runs, curves = table(["cosine"], sizes=(1e7,))
    del curves["cosine-1e+07"]["lr"]
    with pytest.raises(ScalingError, match="steps and learning rates"):
        annealed(runs, curves)


def test_a_sweep_folder_is_fitted_by_its_curves(tmp_path, capsys):
    runs, curves = table(["cosine", "wsd"])
    for name, c in curves.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        lines = [json.dumps(dict(zip(c, map(float, row), strict=True))) for row in zip(*c.values(), strict=True)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    runs.write_csv(tmp_path / "runs.csv")
    assert main(["fit", str(tmp_path), "--curves", "--law", "annealed", "--objective", "log-ls", "--json"]) in (0, 2)
    found = json.loads(capsys.readouterr().out)
    assert "G" in json.dumps(found)
