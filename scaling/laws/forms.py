"""The laws, one small class each, with value and analytic Jacobian in centred coordinates."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from scaling.laws.base import EXPONENT_BOUNDS, FLOOR_DEPTH, Law, Prior, SumOfPowers, Term, middles
from scaling.tables.runs import Runs, ScalingError

TERNARY_BITS = float(np.log2(3))
NAMED_BITS = {"ternary": TERNARY_BITS, "1.58bit": TERNARY_BITS, "binary": 1.0, "bf16": 16.0, "fp16": 16.0, "fp32": 32.0}


class Power(SumOfPowers):
    """L = A / C^alpha, with C in FLOP."""

    name = "power"
    names = ("A", "alpha")
    exponents = ("alpha",)
    inputs = ("C",)
    terms = (Term(0, 1, 0),)


class PowerFloor(SumOfPowers):
    """L = E + A / C^alpha, with C in FLOP."""

    name = "power-floor"
    names = ("E", "A", "alpha")
    exponents = ("alpha",)
    inputs = ("C",)
    terms = (Term(0), Term(1, 2, 0))


class Chinchilla(SumOfPowers):
    """L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, eq. 2); centred parameters (e, u, v, alpha, beta)."""

    name = "chinchilla"
    names = ("E", "A", "B", "alpha", "beta")
    exponents = ("alpha", "beta")
    terms = (Term(0), Term(1, 3, 0), Term(2, 4, 1))


class TiedChinchilla(SumOfPowers):
    """Chinchilla with alpha = beta: L = E + (a M^eta + b M^-eta) C^-eta, M = D/N, eta = alpha/2 (Gadre et al. 2024,
    eq. 4), for tables too small for two exponents."""

    name = "tied"
    names = ("E", "A", "B", "alpha")
    exponents = ("alpha",)
    terms = (Term(0), Term(1, 3, 0), Term(2, 3, 1))


class Kaplan(Law):
    """L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D (Kaplan et al. 2020, eq. 1.5); centred (a, b, alpha_N, alpha_D)
    with a = (alpha_N/alpha_D) log N_c and b = log D_c."""

    name = "kaplan"
    names = ("N_c", "D_c", "alpha_N", "alpha_D")
    exponents = ("alpha_N", "alpha_D")

    def parts(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the two terms inside the bracket."""
        a, b, one, two = (theta[:, [k]] for k in range(4))
        return a - one / two * features[0], b - features[1]

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return theta[:, [3]] * np.logaddexp(*self.parts(theta, features))

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = self.parts(theta, features)
        total = np.logaddexp(first, second)
        one, two = theta[:, [2]], theta[:, [3]]
        p, q, x = np.exp(first - total), np.exp(second - total), features[0]
        return two * total, np.stack([two * p, two * q, -p * x, total + p * one * x / two], axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        a, b, one, two = theta.T
        return np.stack([np.exp(a * two / one + centre[0]), np.exp(b + centre[1]), one, two], axis=1)

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([-40.0, -40.0, 1e-3, 1e-2]), np.array([200.0, 200.0, 3.0, 3.0])

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        exponents = np.exp(rng.uniform(np.log(0.03), np.log(0.8), (count, 2)))
        inner = np.median(log_loss) / exponents[:, 1]
        split = rng.uniform(0.05, 0.95, count)
        return np.column_stack([inner + np.log(split), inner + np.log1p(-split), exponents])


class Gamma(Law):
    """L = E + (A/N^alpha + B/D^beta)^gamma (Beck et al. 2025 for xLSTM); gamma = 1 is Chinchilla."""

    name = "gamma"
    names = ("E", "A", "B", "alpha", "beta", "gamma")
    exponents = ("alpha", "beta")

    def parts(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the two terms inside the bracket."""
        _, u, v, alpha, beta, _ = (theta[:, [k]] for k in range(6))
        return u - alpha * features[0], v - beta * features[1]

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return np.logaddexp(theta[:, [0]], theta[:, [5]] * np.logaddexp(*self.parts(theta, features)))

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = self.parts(theta, features)
        inner, gamma = np.logaddexp(first, second), theta[:, [5]]
        total = np.logaddexp(theta[:, [0]], gamma * inner)
        floor, rest = np.exp(theta[:, [0]] - total), np.exp(gamma * inner - total)
        one, two = rest * gamma * np.exp(first - inner), rest * gamma * np.exp(second - inner)
        return total, np.stack([floor, one, two, -one * features[0], -two * features[1], rest * inner], axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        e, u, v, alpha, beta, gamma = theta.T
        scale = np.stack([np.exp(e), np.exp(u + alpha * centre[0]), np.exp(v + beta * centre[1])], axis=1)
        return np.column_stack([scale, alpha, beta, gamma])

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = log_loss.min() - FLOOR_DEPTH, log_loss.max() + 1.0
        exponent_low, exponent_high = EXPONENT_BOUNDS
        lows = [low, 5 * low - 20, 5 * low - 20, exponent_low, exponent_low, 0.1]
        return np.array(lows), np.array([high, 20.0, 20.0, 2 * exponent_high, 2 * exponent_high, 5.0])

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        theta = np.column_stack([Chinchilla().starts(count, log_loss, features, rng), rng.uniform(0.5, 2.0, count)])
        theta[:, 1:5] /= theta[:, [5]]
        return theta


class EffectiveChinchilla(Law):
    """Chinchilla with an effective amount in place of N or D; a sixth, positive parameter says how much it is worth.

    Subclasses set `name`, `names`, `place` (0: N, 1: D), the ranges of the sixth parameter's bounds and starts, and say
    what the third feature row is and what amount it makes effective.
    """

    exponents = ("alpha", "beta")
    base = Chinchilla()
    place: int
    range: tuple[float, float]
    start_range: tuple[float, float]

    @abstractmethod
    def third(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        """(n,) what the effective amount depends on besides N and D."""

    @abstractmethod
    def third_at(self, log_d: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """The third row (...) of runs to come, from what `given` said; raises ScalingError where it said nothing."""

    @abstractmethod
    def effective(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centred log of the effective amount (K, n), and its derivative with respect to the sixth coordinate."""

    def features(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        return np.concatenate([self.base.features(runs, centre), [self.third(runs, centre)]])

    def features_at(
        self, log_n: np.ndarray, log_d: np.ndarray, centre: np.ndarray, log_c: np.ndarray | None = None
    ) -> np.ndarray:
        two = self.base.features_at(log_n, log_d, centre)
        third = self.third_at(np.asarray(log_d), centre)
        return np.concatenate([two, np.broadcast_to(third, two.shape[1:])[None]])

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return self.value_jacobian(theta, features)[0]

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        amount, change = self.effective(theta, features)
        seen = [features[0], features[1]]
        seen[self.place] = amount
        value, jacobian = self.base.value_jacobian(theta[:, :5], np.stack(np.broadcast_arrays(*seen)))
        # The coefficient's column is its term's share of the loss; the amount enters through it with minus the slope.
        last = -jacobian[:, 1 + self.place] * theta[:, [3 + self.place]] * change
        return value, np.concatenate([jacobian, last[:, None]], axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        return np.column_stack([self.base.raw(theta[:, :5], centre), np.exp(theta[:, 5])])

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.base.bounds(log_loss, features)
        return np.append(low, np.log(self.range[0])), np.append(high, np.log(self.range[1]))

    def prior(self, log_loss: np.ndarray, features: np.ndarray) -> Prior:
        low, high = np.log(self.start_range)
        beside = np.array([(low + high) / 2]), np.array([(high - low) / 2]), np.array([0.3])
        return Prior(*(np.append(a, b) for a, b in zip(self.base.prior(log_loss, features), beside, strict=True)))

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Those of the law without it, each with the sixth parameter shared: it belongs to the data or the format."""
        return tuple((*tie, self.names[-1]) for tie in self.base.ties())

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        theta = self.base.starts(count, log_loss, features, rng)
        low, high = np.log(self.start_range)
        return np.column_stack([theta, rng.uniform(low, high, count)])


class DataConstrained(EffectiveChinchilla):
    """Chinchilla with D' = U (1 + R* (1 - exp(-(D/U - 1)/R*))) in place of D, U the unique tokens (Muennighoff et al.
    2023, eq. 5, its data part; excess parameters are not discounted). R_D = R*: repetitions that are worth much."""

    name = "data-constrained"
    names = ("E", "A", "B", "alpha", "beta", "R_D")
    beside = "U"
    place, range, start_range = 1, (0.1, 1e3), (1.0, 60.0)
    unique: np.ndarray | float | None = None

    def given(self, unique: np.ndarray | float | None, precision: str) -> DataConstrained:
        out = DataConstrained()
        out.unique = self.unique if unique is None else unique
        return out

    def third(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        """Log unique tokens, centred like D."""
        unique = np.minimum(np.where(np.isnan(runs["U"]), runs["D"], runs["U"]), runs["D"])
        return np.log(unique) - centre[1]

    def third_at(self, log_d: np.ndarray, centre: np.ndarray) -> np.ndarray:
        if self.unique is None:
            raise ScalingError(f"law {self.name!r} depends on repetition: give the unique tokens (--U)")
        return np.minimum(log_d, np.log(self.unique)) - centre[1]

    def effective(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        repeats = np.expm1(features[1] - features[2])
        half = np.exp(theta[:, [5]])
        ratio = repeats / half
        gained = half * -np.expm1(-ratio)
        change = half * (1 - np.exp(-ratio) * (1 + ratio)) / (1 + gained)
        return features[2] + np.log1p(gained), change


class Precision(EffectiveChinchilla):
    """Chinchilla with N_eff = N (1 - exp(-P/gamma)) for N, P the bits of a weight from the column `precision` (bf16,
    int8, ternary, or a number): Kumar et al. 2024, eq. 3."""

    name = "precision"
    names = ("E", "A", "B", "alpha", "beta", "gamma")
    beside = "precision"
    place, range, start_range = 0, (0.05, 50.0), (0.3, 10.0)
    bits: float | None = None

    def given(self, unique: np.ndarray | float | None, precision: str) -> Precision:
        out = Precision()
        out.bits = bits_of(precision) if precision else self.bits
        return out

    def third(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        """Bits of a weight."""
        return np.array([bits_of(text) for text in runs["precision"]])

    def third_at(self, log_d: np.ndarray, centre: np.ndarray) -> np.ndarray:
        if self.bits is None:
            raise ScalingError(
                f"law {self.name!r} depends on the precision of the weights, and the runs have several: give one "
                "(--precision), or make each a family (--column family=precision)"
            )
        return np.full_like(log_d, self.bits, dtype=np.float64)

    def effective(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ratio = features[2] / np.exp(theta[:, [5]])
        return features[0] + np.log(-np.expm1(-ratio)), -ratio / np.expm1(ratio)


class BrokenPower(Law):
    """L = E + A C^-c0 (1 + (C/d1)^(1/f1))^(-c1 f1), one break (Caballero et al. 2023, eq. 1); C in FLOP."""

    name = "broken-power"
    names = ("E", "A", "c0", "c1", "d1", "f1")
    exponents = ("c0",)
    inputs = ("C",)

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return self.value_jacobian(theta, features)[0]

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e, a, c0, c1, d, f = (theta[:, [k]] for k in range(6))
        width, x = np.exp(f), features[0]
        bend = (x - d) / width
        soft, slope = np.logaddexp(0.0, bend), expit(bend)
        power = a - c0 * x - c1 * width * soft
        total = np.logaddexp(e, power)
        floor, rest = np.exp(e - total), np.exp(power - total)
        edges = [-width * soft, c1 * slope, -c1 * width * (soft - bend * slope)]
        columns = [floor, rest, -rest * x, *(rest * edge for edge in edges)]
        return total, np.stack(columns, axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        e, a, c0, c1, d, f = theta.T
        middle = middles(centre)["C"]
        return np.stack([np.exp(e), np.exp(a + c0 * middle), c0, c1, np.exp(d + middle), np.exp(f)], axis=1)

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = log_loss.min() - FLOOR_DEPTH, log_loss.max() + 1.0
        left, right = features[0].min(), features[0].max()
        return np.array([low, low, -0.5, -3.0, left, -4.0]), np.array([high, high + 30, 3.0, 3.0, right, 2.0])

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        theta = PowerFloor().starts(count, log_loss, features, rng)
        place = rng.uniform(features[0].min(), features[0].max(), count)
        return np.column_stack([theta, rng.normal(size=count) * 0.1, place, rng.uniform(-2, 1, count)])


LAWS: dict[str, type[Law]] = {
    law.name: law
    for law in (Power, PowerFloor, Chinchilla, TiedChinchilla, Kaplan, Gamma, DataConstrained, Precision, BrokenPower)
}


def law_named(name: str) -> Law:
    """The law of that name; raises ScalingError listing those there are."""
    if name not in LAWS:
        raise ScalingError(f"unknown law {name!r}; choose from {', '.join(LAWS)}")
    return LAWS[name]()


def tied(name: str, share: Sequence[str] | None) -> Sequence[str]:
    """What several families have in common: `share`, or unless told (None) the irreducible loss, which is one for the
    same data and tokenizer, where the law has one."""
    return share if share is not None else ("E",) if "E" in law_named(name).names else ()


def bits_of(text: object) -> float:
    """Bits of a weight from its precision's name; raises ScalingError.

    A format such as e4m3 has a sign beside its exponent and mantissa.
    """
    word = str(text).strip().lower()
    if word in NAMED_BITS:
        return NAMED_BITS[word]
    parts = re.search(r"e(\d)m(\d)", word)
    if parts:
        return 1.0 + int(parts[1]) + int(parts[2])
    number = re.fullmatch(r"(?:[a-z_-]*?)(\d+(?:\.\d+)?)(?:[\s_-]?bits?)?", word)
    if number and 1 <= float(number[1]) <= 64:
        return float(number[1])
    raise ScalingError(f"precision {text!r} names no number of bits (bf16, int8, ternary, e4m3, 4 ...)")
