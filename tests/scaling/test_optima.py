"""Optima of a sweep, drawn from the Step Law's published constants."""

import json

import numpy as np
import pytest
from conftest import write_csv

from scaling import Runs, ScalingError
from scaling.__main__ import main
from scaling.fitting.optima import optima

# Li et al. 2025, arXiv 2503.04715, eq. 1: best rate 1.79 N^-0.713 D^0.307, best batch 0.58 D^0.571 tokens.
RATE, BATCH = (1.79, -0.713, 0.307), (0.58, 0.571)


def sweep(noise=0.001, wide=6, batches=5, seed=0):
    """Six sizes at three budgets each; powers of two about the optimum, off its middle by up to half a step."""
    rng, rows = np.random.default_rng(seed), []
    for n in np.geomspace(6e7, 1e9, 6):
        for ratio in (10, 40, 150):
            d = n * ratio
            lr, batch = RATE[0] * n ** RATE[1] * d ** RATE[2], BATCH[0] * d ** BATCH[1]
            middle = rng.uniform(-0.5, 0.5, 2)
            for i in np.arange(wide) - (wide - 1) / 2 + middle[0]:
                for j in np.arange(batches) - (batches - 1) / 2 + middle[1]:
                    x, y = i * np.log(2), j * np.log(2)
                    bend = 0.010 * x * x + 0.006 * y * y - 0.004 * x * y
                    loss = (1.8 + 180 / n**0.34 + 420 / d**0.37) * np.exp(bend + noise * rng.normal())
                    rows.append(
                        {"family": "f", "N": n, "D": d, "lr": lr * 2**i, "batch_tokens": batch * 2**j, "loss": loss}
                    )
    return [{"run_id": f"r{k}"} | row for k, row in enumerate(rows)]


def test_published_exponents_are_recovered():
    found = optima(Runs.from_rows(sweep(seed=1)))
    truth = {("lr", "N"): RATE[1], ("lr", "D"): RATE[2], ("batch_tokens", "D"): BATCH[1]}
    for (setting, name), value in truth.items():
        middle, low, high = found[setting].exponents[name]
        assert low < value < high
        assert abs(middle - value) < 0.05
        assert high - low < 0.25
    assert "N" not in found["batch_tokens"].exponents
    for setting, best in (("lr", 1.79 * 7e9**-0.713 * 1e12**0.307), ("batch_tokens", 0.58 * 1e12**0.571)):
        value, low, high = found[setting].at(7e9, 1e12)
        assert low < best < high
        assert value == pytest.approx(best, rel=0.3)


def test_intervals_hold_what_they_promise():
    """At 95 %, 24 or fewer of 30 would be a chance of 3 in 1,000."""
    inside = []
    for seed in range(30):
        _, low, high = optima(Runs.from_rows(sweep(0.002, 4, 3, seed)))["lr"].exponents["N"]
        inside.append(low < RATE[1] < high)
    assert sum(inside) >= 25


def test_rates_alone_and_what_is_refused():
    rows = [row | {"batch_tokens": ""} for row in sweep(batches=1)]
    rates = [{k: v for k, v in row.items() if k != "batch_tokens"} for row in rows]
    assert list(optima(Runs.from_rows(rates))) == ["lr"]
    with pytest.raises(ScalingError, match="no column 'lr'"):
        optima(Runs.from_rows([{k: v for k, v in row.items() if k != "lr"} for row in rates]))
    low = [row for row in sweep() if row["lr"] < 0.3 * RATE[0] * row["N"] ** RATE[1] * row["D"] ** RATE[2]]
    with pytest.raises(ScalingError, match=r"no cell|too few|sweep further"):
        optima(Runs.from_rows(low))


def test_the_verb_says_it(tmp_path, capsys):
    path = write_csv(tmp_path / "runs.csv", sweep())
    assert main(["optima", str(path), "--N", "1e9", "--D", "2e10", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["f"]["lr"]
    assert said["low"] < 1.79 * 1e9**-0.713 * 2e10**0.307 < said["high"]
    assert main(["optima", str(path)]) == 0
    assert "best learning rate" in capsys.readouterr().out
