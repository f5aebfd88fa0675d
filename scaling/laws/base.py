"""Scaling laws: log-loss and its analytic Jacobian in centred coordinates, for a batch of parameter vectors at once.

Centring log N and log D (u = log A - alpha * mean log N) takes the condition number of the Chinchilla fit from 4e6 to
4e3, which is why the fits here reach the optimum from any start. Shapes: K parameter vectors, P parameters, n rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from scaling.tables.runs import FLOPS_PER_PARAMETER_TOKEN, Runs, ScalingError

EXPONENT_BOUNDS = (-0.5, 3.0)
# Prior medians: the floor is 65 % of the lowest loss, every other term 20 % of it at the middle of the ladder.
FLOOR_SHARE, TERM_SHARE = np.log(0.65), np.log(0.2)
FLOOR_SD, TERM_SD, FLOOR_APART, TERM_APART = 0.4, 1.0, 0.05, 0.5
EXPONENT_PRIOR = {"N": (0.35, 0.4), "D": (0.35, 0.4), "C": (0.15, 0.8), "beside": (0.35, 0.8)}  # median, sd of the log
EXPONENT_APART, DATA_APART = 0.2, 0.3  # the second: of the coefficient of D, as both families read the same text
FLOOR_DEPTH = 12.0  # the floor may fall to exp(-12) of the lowest loss before it counts as absent


@dataclass(frozen=True)
class Term:
    """One additive part of the loss, exp(theta[intercept] - sum of theta[slope] * features[feature]) over the pairs
    (slope, feature) of `powers`; without any it is the floor."""

    intercept: int
    powers: tuple[tuple[int, int], ...] = ()


class Prior(NamedTuple):
    """Normal prior of a law's centred parameters, exponents in logarithms: mean, sd, and `apart`, the sd of the
    difference between two families where a parameter is not shared; all (P,)."""

    mean: np.ndarray
    sd: np.ndarray
    apart: np.ndarray


class Law(ABC):
    """What a law must offer; a new one is one small subclass, and its place in `forms.LAWS`.

    names: raw parameters that users see; exponents: those of them that are exponents; inputs: what it is a function of
    ("N", "D" or "C"); beside: a column of the table that it depends on besides, and of whose worth the last of `names`
    tells. Centred vectors (K, P) have the order of `names`; features (rows, n) are centred logarithms of the inputs,
    with a last row of what stands beside.
    """

    name: str
    names: tuple[str, ...]
    exponents: tuple[str, ...]
    inputs: tuple[str, ...] = ("N", "D")
    beside: str = ""
    told: Any = None  # the value of that column in runs to come, where `given` has said it
    terms: tuple[Term, ...] = ()  # filled by sums of powers only, which a second, separable solver can take apart

    @abstractmethod
    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(K, n) log loss."""

    @abstractmethod
    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K, n) log loss and (K, P, n) derivatives with respect to the centred parameters."""

    @abstractmethod
    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """(K, P) parameters as users know them."""

    @abstractmethod
    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper box in centred coordinates, (P,) each: wide enough that only a runaway fit touches it."""

    @abstractmethod
    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(count, P) random starts."""

    def prior(self, log_loss: np.ndarray, features: np.ndarray) -> Prior:
        """What is believed before any run, from the spread of the random starts; sums of powers know better."""
        theta = self.starts(512, log_loss, features, np.random.default_rng(0))
        theta[:, self.logged] = np.log(np.maximum(theta[:, self.logged], 1e-3))
        sd = theta.std(axis=0)
        return Prior(theta.mean(axis=0), sd, 0.4 * sd)

    @property
    def logged(self) -> np.ndarray:
        """(P,) which centred parameters are exponents; an ensemble draws their logarithms, to keep them positive."""
        return np.isin(self.names, self.exponents)

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Sets of parameters that two families may share, the empty one first: equal floors or not, unless told."""
        return ((), ("E",)) if "E" in self.names else ((),)

    def checked_share(self, share: Sequence[str]) -> tuple[str, ...]:
        """What families are to share. A coefficient is shared in centred coordinates, which equals sharing it in raw
        ones only with its exponent; raises ScalingError where that is not asked for."""
        for name in share:
            if name not in self.names:
                raise ScalingError(f"cannot share {name!r}: law {self.name!r} has {', '.join(self.names)}")
        for term in self.terms:
            apart = [self.names[slope] for slope, _ in term.powers if self.names[slope] not in share]
            if apart and self.names[term.intercept] in share:
                raise ScalingError(
                    f"sharing {self.names[term.intercept]} needs {apart[0]} shared too: a coefficient has no meaning "
                    "apart from its exponent"
                )
        if not self.terms and set(share) - {"E"} and set(share) != set(self.names):
            raise ScalingError(f"law {self.name!r} can share E, or everything, or nothing")
        return tuple(share)

    def features(self, runs: Runs, centre: np.ndarray) -> np.ndarray:
        """(rows, n) features of a table's rows. Raises ScalingError where it lacks the column that stands beside, or a
        row of it says nothing."""
        rows = self.logarithms(np.log(runs["N"]), np.log(runs["D"]), np.log(runs["flops"]), centre)
        if not self.beside:
            return rows
        with np.errstate(all="ignore"):
            beside = self.beside_row(runs[self.beside], rows, centre)
        faulty = ~np.isfinite(beside)
        if faulty.any():
            what = f"column {self.beside!r} holds nothing that law {self.name!r} can use"
            raise ScalingError(f"{what} in run {runs['run_id'][faulty][0]!r}: {runs[self.beside][faulty][0]!s:.40}")
        return np.concatenate([rows, [beside]])

    def features_at(
        self, log_n: np.ndarray, log_d: np.ndarray, centre: np.ndarray, log_c: np.ndarray | None = None
    ) -> np.ndarray:
        """(rows, ...) features at any points, broadcast together; (rows, K, n) gives each vector its own points.

        log_c: log FLOP, for laws in compute. Raises ScalingError where the law needs what was not given: compute here,
        the column that stands beside by `given`.
        """
        rows = self.logarithms(log_n, log_d, log_c, centre)
        if not self.beside:
            return rows
        if self.told is None:
            each = f"or make each a family (--column family={self.beside})"
            raise ScalingError(f"law {self.name!r} depends on {self.beside}: give it (--{self.beside}), {each}")
        return np.concatenate([rows, [self.beside_row(np.full(rows.shape[1:], self.told), rows, centre)]])

    def beside_row(self, values: np.ndarray, rows: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """The last feature row, shaped like `values` of the column that stands beside; rows: those of the inputs."""
        return values

    def given(self, value: Any) -> Law:
        """The law for runs whose column `beside` has this value; None leaves it as it is."""
        out = copy(self)
        out.told = self.told if value is None else value
        return out

    def habit(self, part: Runs) -> Any:
        """What all runs of a family have in the column that stands beside; None where they differ."""
        kinds = np.unique(part[self.beside].astype(str))
        return part[self.beside][0] if len(kinds) == 1 else None

    def for_run(self, part: Runs, known: Mapping[str, Any]) -> Law:
        """The law for a run to come of a family with the runs `part`, by what is `known` of it, else by their habit.
        Raises ScalingError on what the law does not depend on."""
        idle = [name for name, value in known.items() if value is not None and name not in ("flops", self.beside)]
        if idle:
            raise ScalingError(f"{idle[0]}: the prediction of law {self.name!r} does not depend on it")
        if not self.beside:
            return self
        value = known.get(self.beside)
        return self.given(self.habit(part) if value is None else value)

    def along(self, part: Runs) -> Law:
        """The law along the frontier of a family with the runs `part`."""
        return self.given(self.habit(part)) if self.beside else self

    def untold(self, part: Runs) -> str:
        """Why rows cannot tell what the column that stands beside is worth; "" where they can, or there is none."""
        if not self.beside or self.habit(part) is None:
            return ""
        told = f"a single {self.beside} ({self.habit(part)}) tells nothing of what it is worth"
        both = f"two, in one family or in families that share {','.join(self.names)}"
        return f"{told}: law {self.name!r} needs {both}"

    def logarithms(
        self, log_n: np.ndarray, log_d: np.ndarray, log_c: np.ndarray | None, centre: np.ndarray
    ) -> np.ndarray:
        """The law's inputs, centred and stacked; raises ScalingError for a law in compute without any."""
        at, middle = {"N": log_n, "D": log_d}, middles(centre)
        if log_c is not None:
            at["C"] = log_c
        elif "C" in self.inputs:
            raise ScalingError(f"law {self.name!r} is a function of training compute: give its FLOP (--C)")
        return np.stack(np.broadcast_arrays(*(at[name] - middle[name] for name in self.inputs)))

    @property
    def has_allocation(self) -> bool:
        """Whether there is a best N and D for a budget: not where compute alone counts."""
        return set(self.inputs) == {"N", "D"}


def middles(centre: np.ndarray) -> dict[str, float]:
    """Where each input is centred; compute at 6 N D of the centres of N and D."""
    return {"N": centre[0], "D": centre[1], "C": np.log(FLOPS_PER_PARAMETER_TOKEN) + centre[0] + centre[1]}


def centre_of(runs: Runs) -> np.ndarray:
    """(mean log N, mean log D) of a table."""
    return np.array([np.log(runs["N"]).mean(), np.log(runs["D"]).mean()])


class SumOfPowers(Law):
    """L = sum of terms, each a constant or a power; each term's logarithm is linear in the centred parameters.

    Subclasses set `name`, `names`, `exponents`, `inputs` and `terms`.
    """

    def parts(self, theta: np.ndarray, features: np.ndarray) -> list[np.ndarray]:
        """Each term's part of the loss, (K, n) or (K, 1). Their exponents lie within some hundreds for any run that
        could be made, so that none overflows."""
        out = []
        for term in self.terms:
            power = theta[:, term.intercept, None]
            for slope, feature in term.powers:
                power = power - theta[:, slope, None] * features[feature]
            out.append(np.exp(power))
        return out

    def value(self, theta: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(K, n) log loss."""
        total = sum(self.parts(theta, features))
        return np.log(np.broadcast_to(total, (len(theta), features.shape[-1])))

    def value_jacobian(self, theta: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K, n) log loss and (K, P, n) derivatives: the softmax shares of the terms, times their features."""
        # log of a sum of exponentials: its gradient is the softmax, each term's share of the loss.
        parts = self.parts(theta, features)
        total = np.broadcast_to(sum(parts), (len(theta), features.shape[-1]))
        scale = 1 / total
        jacobian = np.zeros((len(theta), len(self.names), features.shape[-1]))
        for term, part in zip(self.terms, parts, strict=True):
            share = part * scale
            jacobian[:, term.intercept] += share
            for slope, feature in term.powers:
                jacobian[:, slope] -= share * features[feature]
        return np.log(total), jacobian

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """(K, P) user parameters: coefficients un-centred and exponentiated, exponents as they are."""
        middle = middles(centre)
        raw = np.array(theta, dtype=np.float64)
        for term in self.terms:  # what stands beside is not centred
            own = [(slope, self.inputs[feature]) for slope, feature in term.powers if feature < len(self.inputs)]
            shift = sum(theta[:, slope] * middle[name] for slope, name in own)
            raw[:, term.intercept] = np.exp(theta[:, term.intercept] + shift)
        return raw

    def bounds(self, log_loss: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper box in centred coordinates, (P,) each: wide enough that only a runaway fit touches it."""
        low, high = np.empty(len(self.names)), np.empty(len(self.names))
        for term in self.terms:
            low[term.intercept] = log_loss.min() - FLOOR_DEPTH
            high[term.intercept] = log_loss.max() + 1.0
            for slope, _ in term.powers:
                low[slope], high[slope] = EXPONENT_BOUNDS
        return low, high

    def prior(self, log_loss: np.ndarray, features: np.ndarray) -> Prior:
        """Medians relative to the lowest loss; two families' parameters are much nearer to each other than to these."""
        # In centred coordinates a coefficient is the size of its term at the middle of the ladder, of which something
        # is known before any run: a fraction of the loss. Raw A and B would need a prior over ten orders of
        # magnitude.
        lowest, size = log_loss.min(), len(self.names)
        mean, sd, apart = np.full(size, lowest + FLOOR_SHARE), np.full(size, FLOOR_SD), np.full(size, FLOOR_APART)
        for term in self.terms:
            for slope, feature in term.powers:
                name = (*self.inputs, "beside")[feature]
                median, spread = EXPONENT_PRIOR[name]
                # An exponent is drawn as its logarithm; one that may be negative is drawn as it is.
                middle = np.log(median) if self.logged[slope] else median
                mean[[term.intercept, slope]] = lowest + TERM_SHARE, middle
                sd[[term.intercept, slope]] = TERM_SD, spread
                apart[[term.intercept, slope]] = DATA_APART if name == "D" else TERM_APART, EXPONENT_APART
        return Prior(mean, sd, apart)

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Every combination of a shared floor, shared exponents of N (or C), and a shared term in D."""
        groups: list[tuple[str, ...]] = [("E",)] if "E" in self.names else []
        for term in (term for term in self.terms if term.powers):
            slopes = tuple(self.names[slope] for slope, _ in term.powers)
            data = [self.inputs[k] == "D" for _, k in term.powers if k < len(self.inputs)]
            groups.append((self.names[term.intercept], *slopes) if any(data) else slopes)
        # A coefficient without its exponent cannot be shared, so B goes with beta. A may differ while alpha is
        # shared: the families' curves are then parallel in log N.
        picks = product((False, True), repeat=len(groups))
        ties = (sum((g for g, on in zip(groups, picked, strict=True) if on), ()) for picked in picks)
        return tuple(dict.fromkeys(tuple(dict.fromkeys(tie)) for tie in ties))

    def starts(self, count: int, log_loss: np.ndarray, features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(count, P) random starts: exponents log-uniform over 0.05-1.5, the median loss split at random by term."""
        theta = np.empty((count, len(self.names)))
        # Shares of the median loss that add up to it: every start predicts losses of the right size.
        split = rng.dirichlet(np.ones(len(self.terms)), count)
        for k, term in enumerate(self.terms):
            theta[:, term.intercept] = np.log(np.maximum(split[:, k], 1e-3)) + np.median(log_loss)
            for slope, _ in term.powers:
                theta[:, slope] = np.exp(rng.uniform(np.log(0.05), np.log(1.5), count))
        return theta


@dataclass(frozen=True)
class Model:
    """A law bound to the rows it is fitted to, so that solvers see only parameter vectors.

    `index` (families, P of the law) says which joint parameter each family's law parameter is; one family = the
    identity. `rows` lists each family's row numbers. Shared terms are joint parameters that several families point to.
    """

    law: Law
    features: np.ndarray
    index: np.ndarray
    rows: tuple[np.ndarray, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.names)

    def value(self, theta: np.ndarray) -> np.ndarray:
        """(K, n) log loss."""
        if len(self.rows) == 1:
            return self.law.value(theta, self.features)
        out = np.empty((len(theta), self.features.shape[1]))
        for columns, rows in zip(self.index, self.rows, strict=True):
            out[:, rows] = self.law.value(theta[:, columns], self.features[:, rows])
        return out

    def value_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K, n) log loss, (K, P, n) Jacobian."""
        if len(self.rows) == 1:
            return self.law.value_jacobian(theta, self.features)
        out = np.empty((len(theta), self.features.shape[1]))
        jacobian = np.zeros((len(theta), self.size, self.features.shape[1]))
        for columns, rows in zip(self.index, self.rows, strict=True):
            value, part = self.law.value_jacobian(theta[:, columns], self.features[:, rows])
            out[:, rows] = value
            jacobian[:, columns[:, None], rows[None, :]] = part
        return out, jacobian

    def subset(self, chosen: np.ndarray) -> Model:
        """The model on some of its rows, given as sorted row numbers."""
        rows = tuple(np.flatnonzero(np.isin(chosen, r)) for r in self.rows)
        return replace(self, features=self.features[:, chosen], rows=rows)

    def sample(self, limit: int, seed: int = 0) -> np.ndarray:
        """Sorted row numbers: all of them, or `limit` at random, an equal part from each family."""
        if self.features.shape[1] <= limit:
            return np.arange(self.features.shape[1])
        rng, part = np.random.default_rng(seed), limit // len(self.rows)
        return np.sort(np.concatenate([rng.choice(rows, min(len(rows), part), replace=False) for rows in self.rows]))

    def scatter(self, per_family: Sequence[np.ndarray]) -> np.ndarray:
        """Joint vectors (K, P) from each family's own (K, p): shared entries take the first family's value."""
        theta = np.empty((len(per_family[0]), self.size))
        for columns, own in reversed(list(zip(self.index, per_family, strict=True))):
            theta[:, columns] = own
        return theta


def single_model(law: Law, runs: Runs, centre: np.ndarray) -> Model:
    """One law for the whole table."""
    every = np.arange(len(runs))
    return Model(law, law.features(runs, centre), np.arange(len(law.names))[None], (every,), law.names)


def joint_model(law: Law, runs: Runs, families: Sequence[str], share: Sequence[str], centre: np.ndarray) -> Model:
    """One law per family with the parameters in `share` common to all; raises ScalingError on a meaningless tie."""
    law.checked_share(share)
    names: list[str] = []
    index = np.empty((len(families), len(law.names)), dtype=int)
    for f, family in enumerate(families):
        for p, name in enumerate(law.names):
            label = name if name in share else f"{name}[{family}]"
            if label not in names:
                names.append(label)
            index[f, p] = names.index(label)
    rows = tuple(np.flatnonzero(runs["family"] == family) for family in families)
    return Model(law, law.features(runs, centre), index, rows, tuple(names))
