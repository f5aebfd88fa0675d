"""The second of two steps from compute to a task: the error of a task as a sigmoid of a loss."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logit

from scaling.laws.base import Law, Prior
from scaling.tables.runs import Runs

CEILING_SD = 0.6  # of the ceiling's log odds about those of the largest error
FLOOR_MEDIAN, FLOOR_SD = 0.12, 1.2  # of the floor over the ceiling, and of its log odds
RISE, RISE_SD = 4.0, 0.7  # median of k times the range of the ladder's losses, and sd of its logarithm
PLACE_SD = 1.0  # of the midpoint about the mean loss, in ranges of the ladder's losses


class Sigmoid(Law):
    """error = floor + (ceiling - floor) / (1 + exp(-k (L - L0))), L a loss (Bhagia et al. 2024, arXiv 2412.04403, there
    of accuracy). Near the ceiling it is ceiling - c exp(-k L), as Gadre et al. 2024, arXiv 2403.08540, have it.
    Centred (logit ceiling, logit(floor / ceiling), L0, k).

    Values are `angle(error)`, not logarithms: the sampling of a task's items moves all angles alike.
    """

    name = "sigmoid"
    names = ("ceiling", "floor", "L0", "k")
    exponents = ("k",)
    inputs = ("L",)

    def features(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        """(1, n) losses of a table's rows, from their mean `centre` (1,)."""
        return runs["loss"][None] - centre[0]

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(K, n) angles of the error at losses (1, n), or (1, K, n) for points of each vector's own."""
        ceiling, floor, middle, k = (theta[:, [p]] for p in range(4))
        share = expit(floor)
        return angle(expit(ceiling) * (share + (1 - share) * expit(k * (features[0] - middle))))

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ceiling, floor, middle, k = (theta[:, [p]] for p in range(4))
        top, share, apart = expit(ceiling), expit(floor), features[0] - middle
        rise = expit(k * apart)
        error = top * (share + (1 - share) * rise)
        turn = top * (1 - share) * rise * (1 - rise)  # d error / d (k apart)
        columns = [error * (1 - top), top * share * (1 - share) * (1 - rise), -k * turn, apart * turn]
        slope = 0.5 / np.sqrt(error * (1 - error))  # of the angle
        return angle(error), slope[:, None] * np.stack(columns, axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        top = expit(theta[:, 0])
        return np.column_stack([top, top * expit(theta[:, 1]), theta[:, 2] + centre[0], theta[:, 3]])

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the first argument, here angles, nothing is needed."""
        width, middle = np.ptp(features[0]), (features[0].min() + features[0].max()) / 2
        low, high = [-4.0, -8.0, middle - 3 * width, 0.05 / width], [10.0, 8.0, middle + 3 * width, 200 / width]
        return np.array(low), np.array(high)

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        prior = self.prior(log_loss, features)
        theta = prior.mean + prior.sd * rng.normal(size=(count, 4))
        theta[:, 3] = np.exp(theta[:, 3])
        return theta.clip(*self.bounds(log_loss, features))

    def prior(self, log_loss: np.ndarray, features: np.ndarray) -> Prior:
        """The ceiling is near the largest error (the angles are the first argument); midpoint and slope are in units
        of the range of the losses."""
        width, worst = np.ptp(features[0]), np.clip(of_angle(log_loss.max()), 0.02, 0.98)
        mean = np.array([logit(worst), logit(FLOOR_MEDIAN), 0.0, np.log(RISE / width)])
        sd = np.array([CEILING_SD, FLOOR_SD, PLACE_SD * width, RISE_SD])
        return Prior(mean, sd, 0.4 * sd)


def angle(error: np.ndarray) -> np.ndarray:
    """arcsin of the root of an error: over n items its standard deviation is 1 / (2 sqrt n) whatever the error, which
    that of the error's logarithm is not (Anscombe 1948)."""
    return np.arcsin(np.sqrt(error))


def of_angle(value: np.ndarray) -> np.ndarray:
    """The error of an angle; beyond 0 and a right angle, 0 and 1."""
    return np.sin(np.clip(value, 0, np.pi / 2)) ** 2
