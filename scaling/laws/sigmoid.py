"""The second of two steps from compute to a task: the error of a task as a sigmoid of a loss."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, log_expit

from scaling.laws.base import Law, Prior
from scaling.tables.runs import Runs

FLOOR_MEDIAN = 0.1  # error of a model that can do the task: wrong labels, and a format that costs some items
LEVEL_SDS = (1.0, 0.25)  # of the logarithms of the floor and of the height above it, which the worst runs show
RISE = 4.0  # slopes k that take an error from a fifth to four fifths of its height within 2.8 / RISE of the ladder
PLACE_SD, SLOPE_SD = 1.0, 0.7  # of the midpoint, in ranges of the ladder's losses; of log k


class Sigmoid(Law):
    """error = floor + (ceiling - floor) / (1 + exp(-k (L - L0))), L a loss (Bhagia et al. 2024, arXiv 2412.04403,
    eq. 3, there of accuracy). Far below L0 it is the exponential of Gadre et al. 2024, arXiv 2403.08540, eq. 5, turned
    about. Values are logarithms of the error. Centred (log floor, log(ceiling - floor), L0, k)."""

    name = "sigmoid"
    names = ("floor", "ceiling", "L0", "k")
    exponents = ("k",)
    inputs = ("L",)

    def features(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        """(1, n) losses of a table's rows, from their mean `centre` (1,)."""
        return runs["loss"][None] - centre[0]

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(K, n) log error at losses (1, n), or (1, K, n) for points of each vector's own."""
        floor, height, middle, k = (theta[:, [p]] for p in range(4))
        return np.logaddexp(floor, height + log_expit(k * (features[0] - middle)))

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        floor, height, middle, k = (theta[:, [p]] for p in range(4))
        apart = features[0] - middle
        above = height + log_expit(k * apart)
        total = np.logaddexp(floor, above)
        rest = np.exp(above - total)  # the share of the error that is not floor
        turn = rest * expit(-k * apart)
        return total, np.stack([np.exp(floor - total), rest, -k * turn, apart * turn], axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        floor = np.exp(theta[:, 0])
        return np.column_stack([floor, floor + np.exp(theta[:, 1]), theta[:, 2] + centre[0], theta[:, 3]])

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        width = np.ptp(features[0])
        low = [np.log(1e-3), log_loss.max() - 2, features[0].min() - 2 * width, 0.05 / width]
        return np.array(low), np.array([log_loss.min(), 0.7, features[0].max() + 2 * width, 200 / width])

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        prior = self.prior(log_loss, features)
        theta = prior.mean + prior.sd * rng.normal(size=(count, 4))
        theta[:, 3] = np.exp(theta[:, 3])
        return theta.clip(*self.bounds(log_loss, features))

    def prior(self, log_loss: np.ndarray, features: np.ndarray) -> Prior:
        """The ceiling is near the largest error; midpoint and slope are in units of the range of the losses."""
        width = np.ptp(features[0])
        mean = np.array([np.log(FLOOR_MEDIAN), log_loss.max(), 0.0, np.log(RISE / width)])
        sd = np.array([*LEVEL_SDS, PLACE_SD * width, SLOPE_SD])
        return Prior(mean, sd, 0.4 * sd)
