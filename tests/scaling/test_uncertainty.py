"""Bootstrap by cluster."""

import numpy as np
import pytest
from conftest import ladder_rows

from scaling import Runs, ScalingError, fit
from scaling.uncertainty.bootstrap import bootstrap, cluster_labels, pair_weights, parametric_noise, sampled_clusters


def test_epoch_intervals(epoch_runs):
    """Pair bootstrap; sd A 124.5, alpha .015, beta .021, E .026, and the 95 % intervals."""
    raw = bootstrap(fit(epoch_runs), 4000, seed=0).raw()
    for name, published in {"A": 124.5, "E": 0.026, "alpha": 0.015, "beta": 0.021}.items():
        assert raw[name].std() == pytest.approx(published, rel=0.08)
    for name, (low, high) in {"E": (1.769, 1.871), "alpha": (0.317, 0.373), "beta": (0.331, 0.415)}.items():
        assert np.quantile(raw[name], [0.025, 0.975]) == pytest.approx((low, high), rel=0.01)


def test_decays_of_a_trunk_are_drawn_together(small_ladder):
    labels, _ = cluster_labels(small_ladder, ("transformer++", "matmul-free"))
    weight = pair_weights(labels, small_ladder["family"], False, 50, np.random.default_rng(0))
    for cluster in np.unique(small_ladder["cluster"]):
        rows = small_ladder["cluster"] == cluster
        assert (weight[:, rows] == weight[:, rows][:, :1]).all()
    assert (weight.sum(axis=1) == 24).all()
    assert len(np.unique(weight)) > 2


def test_trunk_noise_widens_intervals_that_end_points_would_hide():
    """With noise common to a trunk, treating decays as independent runs is too sure of itself."""
    sizes = tuple(np.geomspace(1e6, 1e9, 14))
    rows = ladder_rows(sizes=sizes, ratios=(5, 10, 20, 40, 80), trunk=0.01, seed=5)
    by_trunk = Runs.from_rows(rows).family("matmul-free")
    by_point = Runs.from_rows([row | {"cluster": ""} for row in rows]).family("matmul-free")
    spread = [np.log(bootstrap(fit(r), 400).predict(1e10, 2e11)).std() for r in (by_trunk, by_point)]
    assert spread[0] > 1.3 * spread[1]


@pytest.mark.parametrize("method", ["auto", "wild"])
def test_few_trunks_keep_the_design_and_every_draw_keeps_every_size(small_ladder, method):
    draws = bootstrap(fit(small_ladder.family("matmul-free")), 300, method=method)
    assert draws.method == {"auto": "parametric", "wild": "wild"}[method]
    assert draws.clusters == (4,)
    loss = draws.predict(6e5, 1.2e7)[:, 0]
    observed = small_ladder.family("matmul-free")["loss"]
    assert observed.min() < loss.min() < loss.max() < observed.max()


def test_matching_designs_share_draws_and_cancel_common_noise():
    """Noise common to both families' cells leaves the difference better known than either level."""
    sizes = tuple(np.geomspace(1e6, 1e9, 14))
    rows = ladder_rows(sizes=sizes, noise=0.001, common=0.01, seed=2)
    runs = Runs.from_rows([row | {"cluster": ""} for row in rows])
    draws = bootstrap(fit(runs, share=("E",)), 400)
    assert draws.paired
    a, b = (draws.predict(3e8, 6e9, family)[:, 0] for family in ("transformer++", "matmul-free"))
    assert (a - b).std() < 0.5 * a.std()


def test_unequal_designs_are_not_paired(wide_ladder):
    fewer = wide_ladder.select(np.arange(len(wide_ladder) - 1))
    assert not cluster_labels(fewer, ("transformer++", "matmul-free"))[1]


def test_noise_model_finds_the_size_and_the_place_of_the_noise():
    """Draws of the noise have the standard deviation that the ladder was made with, and its trunks move together."""
    sizes = tuple(np.geomspace(1e6, 1e9, 9))
    rows = ladder_rows(sizes=sizes, ratios=(5, 10, 20, 40, 80), noise=0.001, trunk=0.004, seed=11)
    fitted = fit(Runs.from_rows(rows), share=("E",), objective="log-ls")
    labels, paired = cluster_labels(fitted.runs, fitted.families)
    noise = parametric_noise(fitted, labels, paired, 4000, np.random.default_rng(0))
    assert noise.std() == pytest.approx(0.0041, rel=0.35)
    same, other = np.corrcoef(noise[:, 0], noise[:, 4])[0, 1], np.corrcoef(noise[:, 0], noise[:, 5])[0, 1]
    assert same > 0.7
    assert abs(other) < 0.1


def test_noise_that_few_runs_show_is_drawn_as_wide_as_student_has_it():
    """Ten single runs less five parameters: a variance is RSS / chi-square(5), on average RSS / (5 - 2)."""
    rows = [row | {"cluster": ""} for row in ladder_rows(sizes=(1e6, 3e6, 1e7, 3e7, 1e8), ratios=(5, 80), noise=0.003)]
    fitted = fit(Runs.from_rows(rows).family("matmul-free"), objective="log-ls")
    labels, paired = cluster_labels(fitted.runs, fitted.families)
    noise = parametric_noise(fitted, labels, paired, 20_000, np.random.default_rng(0))
    squares = (fitted.residuals() ** 2).sum()
    assert (noise**2).mean() == pytest.approx(squares / (5 - 2), rel=0.1)


def test_same_seed_same_draws(small_ladder):
    fitted = fit(small_ladder.family("matmul-free"))
    one, two, three = (bootstrap(fitted, 100, seed).theta for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_unknown_method_is_refused(small_ladder):
    with pytest.raises(ScalingError, match="choose from"):
        bootstrap(fit(small_ladder.family("matmul-free")), 10, method="jackknife")


def test_few_single_runs_of_one_family_have_run_noise_only():
    """No trunks, no partner: the noise model has one member, and its draws the residuals' spread."""
    sizes = tuple(np.geomspace(1e6, 1e9, 5))
    rows = [row | {"cluster": ""} for row in ladder_rows(sizes=sizes, ratios=(5, 80), noise=0.003, seed=4)]
    draws = bootstrap(fit(Runs.from_rows(rows).family("matmul-free")), 200)
    assert draws.method == "parametric"
    spread = np.log(draws.predict(1e8, 2e9)).std()
    assert 0.0005 < spread < 0.02


def test_large_tables_have_small_errors():
    """The m-out-of-n draws of 20,000 rows are about as wide as the least-squares theory says."""
    rng = np.random.default_rng(0)
    n = 10 ** rng.uniform(6, 10, 20_000)
    d = n * 10 ** rng.uniform(0.5, 2.3, 20_000)
    loss = (1.8 + 180 / n**0.34 + 420 / d**0.37) * np.exp(0.01 * rng.normal(size=20_000))
    fitted = fit(Runs.of(N=n, D=d, loss=loss), objective="log-ls", starts=8)
    drawn = bootstrap(fitted, 100)
    _, jacobian = fitted.model.value_jacobian(fitted.theta[None])
    expected = 0.01 * np.sqrt(np.diag(np.linalg.inv(jacobian[0] @ jacobian[0].T)))
    np.testing.assert_allclose(drawn.theta.std(axis=0), expected, rtol=0.35)


def test_a_large_tables_draws_hold_every_family():
    """One family's 4200 rows would fill the subset of 4000 by themselves, in clusters of any size."""
    rng = np.random.default_rng(0)
    parts = []
    for family, count, cluster in (("a", 4200, ""), ("b", 300, "one")):
        n = 10 ** rng.uniform(6, 9, count)
        d = n * 10 ** rng.uniform(0.5, 2.3, count)
        loss = (1.8 + 180 / n**0.34 + 420 / d**0.37) * np.exp(0.01 * rng.normal(size=count))
        parts += list(Runs.of(family, N=n, D=d, loss=loss, cluster=cluster).records())
    fitted = fit(Runs.from_rows(parts), starts=8, share=("E",))
    rows = {f: sampled_clusters(fitted, f, np.random.default_rng(1)) for f in fitted.families}
    assert {f: len(r) for f, r in rows.items()} == {"a": 3733, "b": 266}
    for family, own in rows.items():
        assert set(fitted.runs["family"][own]) == {family}
        assert len(set(own.tolist())) == len(own)
    drawn = bootstrap(fitted, 20)
    assert np.isfinite(drawn.predict(1e8, 2e9, "b")).all()
    assert drawn.predict(1e8, 2e9, "b").std() > 0
