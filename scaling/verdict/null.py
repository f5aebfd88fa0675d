"""Noise for tests by simulation: what runs would show if a null hypothesis held."""

from __future__ import annotations

import numpy as np

from scaling.fitting.fit import Fit
from scaling.uncertainty.bootstrap import cluster_labels, parametric_noise, wild_noise

MANY_ROWS = 1000  # above this the noise model's covariance would take longer than all the refits


def null_noise(fitted: Fit, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n) noise on log loss with the trunk and cell structure that the residuals show."""
    labels, paired = cluster_labels(fitted.runs, fitted.families)
    drawn = parametric_noise if len(fitted.runs) <= MANY_ROWS else wild_noise
    return drawn(fitted, labels, paired, draws, rng)[0]
