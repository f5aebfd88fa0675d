"""The laws, one small class each, with value and analytic Jacobian in centred coordinates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from scipy.special import expit, log_expit, logsumexp

from scaling.laws.base import EXPONENT_BOUNDS, FLOOR_DEPTH, Law, Prior, SumOfPowers, Term, middles
from scaling.laws.formats import bits_of, gaussian_error, of_each
from scaling.tables.runs import Runs, ScalingError


class Power(SumOfPowers):
    """L = A / C^alpha, with C in FLOP."""

    name = "power"
    names = ("A", "alpha")
    exponents = ("alpha",)
    inputs = ("C",)
    terms = (Term(0, ((1, 0),)),)


class PowerFloor(SumOfPowers):
    """L = E + A / C^alpha, with C in FLOP."""

    name = "power-floor"
    names = ("E", "A", "alpha")
    exponents = ("alpha",)
    inputs = ("C",)
    terms = (Term(0), Term(1, ((2, 0),)))


class Chinchilla(SumOfPowers):
    """L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, eq. 2); centred parameters (e, u, v, alpha, beta)."""

    name = "chinchilla"
    names = ("E", "A", "B", "alpha", "beta")
    exponents = ("alpha", "beta")
    terms = (Term(0), Term(1, ((3, 0),)), Term(2, ((4, 1),)))


class TiedChinchilla(SumOfPowers):
    """Chinchilla with alpha = beta: L = E + (a M^eta + b M^-eta) C^-eta, M = D/N, eta = alpha/2 (Gadre et al. 2024,
    eq. 4), for tables too small for two exponents."""

    name = "tied"
    names = ("E", "A", "B", "alpha")
    exponents = ("alpha",)
    terms = (Term(0), Term(1, ((3, 0),)), Term(2, ((3, 1),)))


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


class ExtendedChinchilla(Law):
    """Chinchilla with further, positive parameters, which say what the column that stands beside is worth; subclasses
    set the ranges of their bounds and of their starts."""

    exponents = ("alpha", "beta")
    base = Chinchilla()
    ranges: tuple[tuple[float, float], ...]
    start_ranges: tuple[tuple[float, float], ...]

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return self.value_jacobian(theta, features)[0]

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        return np.column_stack([self.base.raw(theta[:, :5], centre), np.exp(theta[:, 5:])])

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (low, high), ends = self.base.bounds(log_loss, features), np.log(self.ranges)
        return np.append(low, ends[:, 0]), np.append(high, ends[:, 1])

    def prior(self, log_loss: np.ndarray, features: np.ndarray) -> Prior:
        low, high = np.log(self.start_ranges).T
        further = (low + high) / 2, (high - low) / 2, np.full(len(low), 0.3)
        return Prior(*(np.append(a, b) for a, b in zip(self.base.prior(log_loss, features), further, strict=True)))

    def checked_share(self, share: Sequence[str]) -> tuple[str, ...]:
        """As of Chinchilla; each further parameter may be shared by itself."""
        self.base.checked_share([name for name in share if name not in self.names[5:]])
        return tuple(share)

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Those of Chinchilla, each with the further parameters shared: they belong to the data or the format."""
        return tuple((*tie, *self.names[5:]) for tie in self.base.ties())

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        theta, (low, high) = self.base.starts(count, log_loss, features, rng), np.log(self.start_ranges).T
        return np.column_stack([theta, rng.uniform(low, high, (count, len(low)))])


Effective = dict[int, tuple[np.ndarray, dict[int, np.ndarray]]]


class EffectiveChinchilla(ExtendedChinchilla):
    """Chinchilla with an effective amount in place of N, of D, or of both."""

    @abstractmethod
    def effective(self, theta: np.ndarray, features: np.ndarray) -> Effective:
        """By place (0: N, 1: D) the centred log of the effective amount (K, n), with its derivatives (K, n) by the
        centred parameter that moves it."""

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # The chain rule: the law sees the effective amount where it would see N or D, and what moves the amount moves
        # the loss through that term alone.
        amounts, seen = self.effective(theta, features), [features[0], features[1]]
        for place, (amount, _) in amounts.items():
            seen[place] = amount
        value, own = self.base.value_jacobian(theta[:, :5], np.stack(np.broadcast_arrays(*seen)))
        jacobian = np.concatenate([own, np.zeros((len(own), len(self.names) - 5, own.shape[-1]))], axis=1)
        for place, (_, changes) in amounts.items():
            # A coefficient's column is its term's share of the loss; the amount enters there with minus the exponent.
            share = -own[:, 1 + place] * theta[:, [3 + place]]
            for parameter, change in changes.items():
                jacobian[:, parameter] += share * change
        return value, jacobian


class RepeatedData(Law):
    """A law of tokens that are repeated, with the unique ones in the column U."""

    beside = "U"

    def beside_row(self, values: np.ndarray, rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Log unique tokens, centred like D: no more than D, and D where the table leaves them blank."""
        return np.fmin(np.log(values) - centre[1], rows[1])

    def habit(self, part: Runs) -> float | None:
        """inf where no run sees a token twice; a blank U says that none did."""
        return None if (part["U"] < part["D"]).any() else np.inf

    def along(self, part: Runs) -> Law:
        """On a frontier all tokens are new."""
        return self.given(np.inf)

    def untold(self, part: Runs) -> str:
        fault = f"no run repeats its tokens (U below D): law {self.name!r} has nothing to tell their worth by"
        return fault if self.habit(part) is not None else ""


def saturating(repeats: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What R repetitions are worth, R* (1 - exp(-R / R*)), with its derivatives in R and in log R*."""
    ratio = repeats / half
    left = np.exp(-ratio)
    return half * -np.expm1(-ratio), left, half * (1 - left * (1 + ratio))


class DataConstrained(RepeatedData, EffectiveChinchilla):
    """Chinchilla with D' = U (1 + R* (1 - exp(-(D/U - 1)/R*))) in place of D, U the unique tokens (Muennighoff et al.
    2023, eq. 5, its data part). R_D = R*: repetitions that are worth much."""

    name = "data-constrained"
    names: tuple[str, ...] = ("E", "A", "B", "alpha", "beta", "R_D")
    ranges: tuple[tuple[float, float], ...] = ((0.1, 1e3),)
    start_ranges: tuple[tuple[float, float], ...] = ((1.0, 60.0),)

    def effective(self, theta: np.ndarray, features: np.ndarray) -> Effective:
        gained, _, change = saturating(np.expm1(features[1] - features[2]), np.exp(theta[:, [5]]))
        return {1: (features[2] + np.log1p(gained), {5: change / (1 + gained)})}


class ExcessParameters(DataConstrained):
    """As `data-constrained`, and parameters beyond those that suit the unique tokens are discounted likewise: N' = U_N
    (1 + R_N (1 - exp(-(N/U_N - 1)/R_N))) in place of N, U_N the best size for U tokens (Muennighoff et al. 2023, eq. 5
    whole)."""

    name = "data-constrained-excess"
    names = (*DataConstrained.names, "R_N")
    ranges, start_ranges = 2 * DataConstrained.ranges, 2 * DataConstrained.start_ranges

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = super().bounds(log_loss, features)
        low[3:5] = 1e-3  # without a fall in both N and D there is no best size
        return low, high

    def effective(self, theta: np.ndarray, features: np.ndarray) -> Effective:
        """Of D as there; of N, since along a budget the best size has alpha A / N^alpha = beta B / D^beta."""
        _, u, v, alpha, beta = (theta[:, [k]] for k in range(5))
        # Along a budget 6 N D the optimum has alpha A / N^alpha = beta B / D^beta; at D = U this is U_N, in centred
        # logs.
        best = (np.log(alpha / beta) + u - v + beta * features[2]) / alpha
        over = np.clip(features[0] - best, 0.0, 50.0)  # beyond exp(50) times the best size nothing changes any more
        gained, left, change = saturating(np.expm1(over), np.exp(theta[:, [6]]))
        # A larger U_N counts in full, and leaves fewer parameters in excess of it.
        moved = np.where(over > 0, (1 - left * np.exp(over) / (1 + gained)) / alpha, 0.0)
        slopes = {1: 1.0, 2: -1.0, 3: 1 / alpha - best, 4: features[2] - 1 / beta}
        changes = {k: moved * slope for k, slope in slopes.items()} | {6: change / (1 + gained)}
        return super().effective(theta, features) | {0: (features[0] - over + np.log1p(gained), changes)}


class BoundedRepetition(RepeatedData):
    """L = E + (L0 - E) h / (1 + h), h = A/N^alpha + B/D^beta + C N^gamma / U^delta: between the loss L0 of a model that
    knows nothing and the floor, with the overfitting of many parameters to few unique tokens U ("Practical scaling
    laws", arXiv 2605.09189, where L0 is set by the kind of loss; here the runs tell it).
    Centred (e, log(L0 - E), a, b, c, alpha, beta, gamma, delta)."""

    name = "bounded"
    names = ("E", "L0", "A", "B", "C", "alpha", "beta", "gamma", "delta")
    exponents = ("alpha", "beta", "gamma", "delta")

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return self.value_jacobian(theta, features)[0]

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e, gap, a, b, c, alpha, beta, gamma, delta = (theta[:, [k]] for k in range(9))
        n, d, unique = features
        # h is how far the model is from the floor on an odds scale: h / (1 + h) takes it to a share of the whole range.
        logs = np.stack([a - alpha * n, b - beta * d, c + gamma * n - delta * unique])
        log_h = logsumexp(logs, axis=0)
        above = gap + log_expit(log_h)  # log of h / (1 + h) of the range above the floor
        total = np.logaddexp(e, above)
        rest = np.exp(above - total)
        one, two, three = rest * expit(-log_h) * np.exp(logs - log_h)
        columns = [np.exp(e - total), rest, one, two, three, -one * n, -two * d, three * n, -three * unique]
        return total, np.stack(columns, axis=1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        e, gap, a, b, c, alpha, beta, gamma, delta = theta.T
        n, d = centre
        scale = a + alpha * n, b + beta * d, c - gamma * n + delta * d
        return np.column_stack([np.exp(e), np.exp(e) + np.exp(gap), *np.exp(scale), alpha, beta, gamma, delta])

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = log_loss.min() - FLOOR_DEPTH, log_loss.max() + 1.0
        return np.array([low, low, *3 * [-30.0], *4 * [1e-3]]), np.array([high, high + 3.0, *3 * [10.0], *4 * [3.0]])

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        levels = rng.uniform([-0.7, 0.5, -3, -3, -8], [-0.1, 2.0, 0, 0, -1], (count, 5))
        levels[:, :2] += np.median(log_loss)
        return np.column_stack([levels, np.exp(rng.uniform(np.log(0.1), np.log(1.0), (count, 4)))])


class Precision(EffectiveChinchilla):
    """Chinchilla with N_eff = N (1 - exp(-P/gamma)) for N, P the bits of a weight from the column `precision` (bf16,
    int8, ternary, or a number): Kumar et al. 2024, eq. 3."""

    name = "precision"
    names = ("E", "A", "B", "alpha", "beta", "gamma")
    beside = "precision"
    ranges, start_ranges = ((0.05, 50.0),), ((0.3, 10.0),)

    def beside_row(self, values: np.ndarray, rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Bits of a weight."""
        return of_each(values, bits_of)

    def effective(self, theta: np.ndarray, features: np.ndarray) -> Effective:
        ratio = np.minimum(features[2] / np.exp(theta[:, [5]]), 500.0)
        return {0: (features[0] + np.log(-np.expm1(-ratio)), {5: -ratio / np.expm1(ratio)})}


class Capacity(EffectiveChinchilla):
    """Chinchilla with N_eff = N tanh(F b)^C for N, b = log_{1/4} of the format's mean squared error on normal numbers,
    the bits that such an error is worth at best (Panferov et al. 2025, arXiv 2506.01863, eq. 3 with its L, the limit of
    a biased method, at 1): one law for every format in the column `precision`."""

    name = "capacity"
    names = ("E", "A", "B", "alpha", "beta", "F", "C")
    beside = "precision"
    ranges, start_ranges = ((0.01, 20.0), (0.1, 5.0)), ((0.2, 2.0), (0.5, 1.5))

    def beside_row(self, values: np.ndarray, rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Bits that the format's error is worth."""
        return of_each(values, lambda text: -np.log(gaussian_error(text)) / np.log(4))

    def effective(self, theta: np.ndarray, features: np.ndarray) -> Effective:
        power, argument = np.exp(theta[:, [6]]), np.exp(theta[:, [5]]) * features[2]
        share = power * np.log(np.tanh(argument))
        # d log tanh(x) / d log x = 2 x / sinh(2 x), which is 0 where the format loses nothing.
        change = power * 2 * argument / np.sinh(2 * np.minimum(argument, 300.0))
        return {0: (features[0] + share, {5: change, 6: share})}


class Sparse(SumOfPowers):
    """L = E + (A0 + A1 (1 - S)^b) / N^alpha + B/D^beta, S the share of weights that are zero, N the others (Frantar et
    al. 2023, arXiv 2309.08520, eq. 1); column `sparsity`."""

    name = "sparse"
    names: tuple[str, ...] = ("E", "A0", "A1", "B", "alpha", "beta", "b")
    exponents: tuple[str, ...] = ("alpha", "beta")
    beside = "sparsity"
    terms: tuple[Term, ...] = (Term(0), Term(1, ((4, 0),)), Term(2, ((4, 0), (6, 2))), Term(3, ((5, 1),)))

    def beside_row(self, values: np.ndarray, rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Minus the log of the active share."""
        return -np.log1p(-values)


class Mixture(Sparse):
    """L = E + A/N^alpha + B/D^beta + C (1 - S)^c + F (1 - S)^f / N^gamma, S the share of experts that a token leaves
    idle, N all parameters (Abnar et al. 2025, arXiv 2501.12370, eq. 6; their lambda is -c and their delta -f); column
    `sparsity`."""

    name = "mixture"
    names = ("E", "A", "B", "C", "F", "alpha", "beta", "gamma", "f", "c")
    exponents = ("alpha", "beta", "gamma")
    terms = (Term(0), Term(1, ((5, 0),)), Term(2, ((6, 1),)), Term(3, ((9, 2),)), Term(4, ((7, 0), (8, 2))))


class Annealed(ExtendedChinchilla):
    """L = E + A/N^alpha + B/S^beta - G M at any point of a run: S, in place of D, the tokens seen, each weighted by the
    learning rate over its peak; M the share of the annealing that has taken effect (Tissue et al. 2024, arXiv
    2408.11029, their S1 and S2 in other units). Column `annealing`, made by `scaling.tables.curves.annealed`."""

    name = "annealed"
    names = ("E", "A", "B", "alpha", "beta", "G")
    beside = "annealing"
    ranges, start_ranges = ((1e-4, 5.0),), ((0.01, 0.3),)

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, own = self.base.value_jacobian(theta[:, :5], features[:2])
        # Linear in the annealing, hence the only law here that subtracts: its Jacobian is that of the loss, over the
        # loss.
        gain = np.exp(theta[:, [5]]) * features[2]
        loss = np.maximum(np.exp(value) - gain, 1e-3 * np.exp(value))  # a start may promise more than there is to lose
        jacobian = np.concatenate([own * np.exp(value)[:, None], -np.broadcast_to(gain, value.shape)[:, None]], axis=1)
        return np.log(loss), jacobian / loss[:, None]

    def along(self, part: Runs) -> Law:
        """On a frontier the schedule has ended: as much annealing as the family's runs have at their most."""
        return self.given(float(part["annealing"].max()))


class BrokenPower(Law):
    """L = E + A C^-c0 (1 + (C/d1)^(1/f1))^(-c1 f1), one break (Caballero et al. 2023, eq. 1); C in FLOP."""

    name = "broken-power"
    names = ("E", "A", "c0", "c1", "d1", "f1")
    exponents = ("c0",)
    inputs = ("C",)

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        return self.value_jacobian(theta, features)[0]

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Slope c0 before the break at d1, c0 + c1 after it; f1 is the width of the bend in e-folds of compute.
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


EVERY_LAW: tuple[type[Law], ...] = (
    Power,
    PowerFloor,
    Chinchilla,
    TiedChinchilla,
    Kaplan,
    Gamma,
    DataConstrained,
    ExcessParameters,
    BoundedRepetition,
    Precision,
    Capacity,
    Sparse,
    Mixture,
    Annealed,
    BrokenPower,
)
LAWS = {law.name: law for law in EVERY_LAW}


def law_named(name: str) -> Law:
    """The law of that name; raises ScalingError listing those there are."""
    if name not in LAWS:
        raise ScalingError(f"unknown law {name!r}; choose from {', '.join(LAWS)}")
    return LAWS[name]()


def tied(name: str, share: Sequence[str] | None) -> Sequence[str]:
    """What several families have in common: `share`, or unless told (None) the irreducible loss, which is one for the
    same data and tokenizer, where the law has one."""
    return share if share is not None else ("E",) if "E" in law_named(name).names else ()
