"""The algebra of the ensemble against closed forms and brute force."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs
from scaling.ensemble.discrepancy import CELL, RUN, TAU, TRUNK, Nearness, Points
from scaling.ensemble.posterior import HUBER_KINK, density_gain, posterior, systematic
from scaling.ensemble.rows import MOST_ROWS, gathered, rows_of
from scaling.laws.base import centre_of
from scaling.laws.forms import LAWS, law_named

SIZES = tuple(np.geomspace(1e6, 1e9, 6))
KNOWN = np.array([[0.002, 0.001, 0.0, 0.004, 0.8, 0.3, 0.0]])


def rows_for(law="chinchilla", families=("transformer++", "matmul-free"), **settings):
    runs = Runs.from_rows(ladder_rows(sizes=SIZES, ratios=(5, 20, 80), **{"noise": 0.002} | settings))
    chosen = runs.select(np.isin(runs["family"].astype(str), families))
    return rows_of(chosen, families, law_named(law), centre_of(chosen)), law_named(law)


def test_evidence_is_that_of_the_marginal_normal():
    """Log N(y; law at the prior's mean, J S J' + K), for the model made linear, one family."""
    rows, law = rows_for(families=("matmul-free",))
    p = posterior(rows, law, ((),), "log-ls", known=KNOWN)
    phi = p.phi[0, 0]
    value, jacobian = (x[0] for x in p.law_of(phi[None]))
    whole = jacobian @ np.diag(p.sd[0] ** 2) @ jacobian.T + p.covariance(KNOWN, p.scale[0])[0]
    residual = rows.y - (value + jacobian @ (p.mean - phi))
    expected = -0.5 * (residual @ np.linalg.solve(whole, residual) + np.linalg.slogdet(whole)[1])
    assert p.scored(KNOWN)[0, 0, 0] == pytest.approx(expected, abs=1e-6)


def test_jacobian_is_the_derivative_in_the_coordinates_of_the_ensemble():
    for name in ("chinchilla", "kaplan", "gamma"):
        rows, law = rows_for(name)
        p = posterior(rows, law, ((),), "log-ls", known=KNOWN)
        phi = p.phi[0, 0]
        step = 1e-6 * np.eye(len(phi))
        slope = (p.law_of(phi + step)[0] - p.law_of(phi - step)[0]).T / 2e-6
        np.testing.assert_allclose(p.law_of(phi[None])[1][0], slope, atol=1e-6)


def test_misfit_of_the_draws_is_the_conditional_process():
    """Given the parameters, mean K* C^-1 r and covariance K** - K* C^-1 K*' at points away from the rows."""
    rows, law = rows_for(noise=0.004)
    p = posterior(rows, law, ((),), "log-ls", known=np.repeat(KNOWN, 150, axis=0))
    count = 3000
    phi = np.repeat(p.phi[0, :1], count, axis=0)
    residual = rows.y - p.law_of(phi)[0]
    hyper = np.repeat(np.arange(150), count // 150)
    draws = p.with_misfit(phi, residual, hyper, 0 * hyper, 0 * hyper, np.random.default_rng(0))
    points = Points(np.array([[0.2, 0.1], [1.8, 1.2], [-0.4, 0.9]]), np.array([0, 1, 1]))
    found = draws.misfit(points)
    across = Nearness.between(points, rows.points).covariance(KNOWN)[0]
    own = Nearness.between(points, points).covariance(KNOWN)[0]
    inside = p.covariance(KNOWN, p.scale[0])[0]
    mean = across @ np.linalg.solve(inside, residual[0])
    cov = own - across @ np.linalg.solve(inside, across.T)
    np.testing.assert_allclose(found.mean(axis=0), mean, atol=4e-4)
    np.testing.assert_allclose(found.std(axis=0), np.sqrt(np.diag(cov)), rtol=0.15)


def test_noise_of_runs_trunks_and_matched_cells_is_placed():
    rows, law = rows_for()
    h = KNOWN.copy()
    h[0, [RUN, TRUNK, CELL, TAU]] = 1.0, 2.0, 3.0, 0.0
    p = posterior(rows, law, ((),), "log-ls", known=KNOWN)
    covariance = p.covariance(h, np.ones(len(rows.y)))[0]
    half = len(rows.y) // 2
    assert covariance[0, 0] == pytest.approx(1 + 4 + 9)
    assert covariance[0, 1] == pytest.approx(4)  # another decay of the trunk
    assert covariance[0, half] == pytest.approx(9)  # the same cell of the other family
    assert covariance[0, half + 1] == pytest.approx(0)


def test_hubers_noise_is_a_density_and_takes_the_weight_where_there_are_outliers():
    """Its gain over normal noise is that of its exponent and its normaliser."""
    x = np.linspace(-60, 60, 400_001)
    scale = np.sqrt(np.maximum(np.abs(x) / HUBER_KINK, 1.0))
    log_density = -0.5 * (x / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    gain = np.array([density_gain("huber", scale[[k]]) for k in range(0, len(x), 100)])
    assert np.trapezoid(np.exp(log_density[::100] + gain), x[::100]) == pytest.approx(1, abs=1e-3)
    clean, law = rows_for(families=("matmul-free",))
    spoilt = clean.y.copy()
    spoilt[[2, 9]] += 0.06
    weights = []
    for y in (clean.y, spoilt):
        p = posterior(
            type(clean)(y, *[getattr(clean, f) for f in ("family", "trunk", "cell", "x", "features", "count")]),
            law,
            ((),),
        )
        weights.append(np.exp(p.score - p.score.max()).sum(axis=(0, 1)))
    assert weights[1][1] / weights[1][0] > 10 * weights[0][1] / weights[0][0]


def test_one_spoilt_run_hardly_moves_the_forecast():
    rows, law = rows_for(families=("matmul-free",))
    levels = []
    for lift in (0.0, 0.08):
        y = rows.y.copy()
        y[4] += lift
        p = posterior(type(rows)(y, rows.family, rows.trunk, rows.cell, rows.x, rows.features, rows.count), law, ((),))
        draws = p.draws(400, np.random.default_rng(0))
        levels.append(np.median(law.value(draws.theta[:, 0], rows.features[:, -1:])))
    assert abs(levels[1] - levels[0]) < 0.003


@pytest.mark.parametrize("name", sorted(LAWS))
def test_every_law_has_a_prior_and_ties_that_make_sense(name):
    table, law = ladder_rows(sizes=SIZES, ratios=(5, 20, 80), noise=0.002), law_named(name)
    beside = {"precision": ("bf16", "int4", "ternary"), "sparsity": (0.0, 0.5, 0.9), "annealing": (0.0, 0.4, 1.0)}
    for k, row in enumerate(table):
        row |= {column: values[k % 3] for column, values in beside.items()} | {"U": row["D"] / (1 + k % 3)}
    runs = Runs.from_rows(table)
    rows = rows_of(runs, runs.families, law, centre_of(runs))
    prior = law.prior(rows.y, rows.features)
    assert all(np.isfinite(x).all() and (x > 0).all() for x in (prior.sd, prior.apart))
    ties = law.ties()
    assert set(ties[0]) <= set(law.names[5:] if law.beside else ())
    assert len(set(ties)) == len(ties)
    for tie in ties:
        law.checked_share(tie)
    p = posterior(rows, law, ties, "log-ls", samples=16)
    assert np.isfinite(p.score).all()
    fitted = p.law_of(p.phi.reshape(-1, p.phi.shape[-1]))[0]
    assert np.abs(fitted - rows.y).max() < (0.3 if name == "power" else 0.2)  # which has no floor


def test_draws_of_a_tie_share_what_it_says():
    rows, law = rows_for()
    p = posterior(rows, law, (("E", "B", "beta"),), "log-ls", samples=16)
    theta = p.draws(200, np.random.default_rng(0)).theta
    same = [law.names.index(n) for n in ("E", "B", "beta")]
    np.testing.assert_allclose(theta[:, 0, same], theta[:, 1, same], rtol=2e-3, atol=2e-3)
    assert np.abs(theta[:, 0, 3] - theta[:, 1, 3]).mean() > 0.005


def test_many_rows_are_taken_together_where_they_lie_close():
    rng = np.random.default_rng(0)
    n = 10 ** rng.uniform(6, 10, 5000)
    runs = Runs.of(N=n, D=n * 10 ** rng.uniform(0.5, 2.3, 5000), loss=np.exp(0.01 * rng.normal(size=5000)) * 3)
    whole = rows_of(runs, ("all",), law_named("chinchilla"), centre_of(runs))
    assert len(whole.y) <= MOST_ROWS
    assert whole.count.sum() == 5000
    assert (whole.count * whole.y).sum() == pytest.approx(np.log(runs["loss"]).sum())
    assert gathered(whole).count.sum() == len(whole.y)


def test_systematic_resampling_keeps_the_weights():
    found = systematic(np.array([0.5, 0.3, 0.2]), 1000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(found) / 1000, [0.5, 0.3, 0.2], atol=2e-3)
