"""The break-even cost kappa*: how cheap a ternary operation has to be for B to win."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.tables.runs import Runs
from scaling.verdict.compare import Comparison, compute_grid, family_frontier
from scaling.verdict.crossing import LEVEL
from scaling.verdict.frontier import Cost

BELOW = 2.0  # decades below the measured range in which B's match of A's loss is still looked for


@dataclass(frozen=True)
class BreakEven:
    """kappa* along A's budgets `flops` (M,): what one of B's ternary operations may cost, in operations of A, for B to
    reach A's loss at A's price; estimate, low, high (M,), with 95 % of the draws between them. share (M,): of B's
    operations that are ternary, at the size with which the fitted B reaches that loss. Zero or less: no price is low
    enough."""

    a: str
    b: str
    flops: np.ndarray
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    share: np.ndarray

    def nearest(self, flops: float) -> int:
        """Place of the budget nearest to this one."""
        return int(np.argmin(np.abs(np.log(self.flops / flops))))

    def at(self, flops: float) -> tuple[float, float, float]:
        """(estimate, low, high) at the budget nearest to this one."""
        k = self.nearest(flops)
        return float(self.estimate[k]), float(self.low[k]), float(self.high[k])

    def sentence(self, flops: float) -> str:
        """The result at one budget in words, and over all of them."""
        value, low, high = self.at(flops)
        part = f"{self.share[self.nearest(flops)]:.0%} of all at the size that it needs there"
        if high <= 0:
            return f"At {self.a}'s loss of {flops:.1e} FLOP no price of its ternary operations lets {self.b} win."
        if value <= 0:
            return (
                f"At {self.a}'s loss of {flops:.1e} FLOP it is open whether any price of its ternary operations "
                f"({part}) lets {self.b} win: κ* is {value:.2f} ({low:.2f} to {high:.2f})."
            )
        everywhere = float(self.low.min())
        always = f"; below {everywhere:.2f} it wins at any budget shown" if everywhere > 0 else ""
        return (
            f"{self.b} wins at {flops:.1e} FLOP once one of its ternary operations ({part}) costs "
            f"less than {value:.2f} ({low:.2f} to {high:.2f}) of a multiply-accumulate operation{always}."
        )


def break_even(c: Comparison, decades: float = 2.0) -> BreakEven | None:
    """kappa* from the lowest measured compute to `decades` beyond the largest. None where B has no ternary operation,
    where not every run of B has them counted, or where the law knows no size to take their share at.

    B needs C_b FLOP for the loss that A reaches with C; with a share s of B's operations at price kappa, B is cheaper
    once (1 - s + s kappa) C_b < C. The share rises with size, as attention, head and element-wise work lose weight, and
    is that of the size at which B spends C_b, by B's own counts; constant beyond the sizes that were counted. Where B
    does not reach that loss before the horizon, kappa* is negative. `c` must be on the axis "flops".
    """
    ternary = ternary_cost(c.fit.runs.family(c.b))
    if ternary is None or not c.fit.law.has_allocation:
        return None
    shown = (c.budgets >= min(c.measured)) & (c.budgets <= max(c.measured) * 10**decades * 1.01)
    log_c = np.log(c.budgets[shown])
    estimate, share = price(c, c.fit.theta[None], log_c, ternary)
    drawn, _ = price(c, c.draws.theta, log_c, ternary)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return BreakEven(c.a, c.b, c.budgets[shown], estimate[0], low, high, share[0])


def ternary_cost(runs: Runs) -> Cost | None:
    """A family's ternary FLOP by size; None where it has none, or not every run has them counted."""
    spent = runs.columns.get("flops_ternary", np.zeros(len(runs)))
    return Cost.of(runs, spent) if (spent > 0).all() else None


def price(c: Comparison, theta: np.ndarray, log_c: np.ndarray, ternary: Cost) -> tuple[np.ndarray, np.ndarray]:
    """kappa* and B's ternary share at the size it needs, (K, M) each, for joint vectors (K, P) at log budgets (M,)."""
    goal = family_frontier(c.fit, theta, c.a, c.costs[c.a], log_c, c.along).loss
    wide = compute_grid(c.budgets[0] / 10**BELOW, c.budgets[-1])
    own = family_frontier(c.fit, theta, c.b, c.costs[c.b], wide, c.along)
    need = np.stack([np.interp(-g, -row, wide, right=np.inf) for g, row in zip(goal, own.loss, strict=True)])
    sizes = np.exp(np.stack([np.interp(x, wide, row) for x, row in zip(need, own.log_n, strict=True)]))
    share = np.minimum(ternary.rate(sizes) / c.costs[c.b].rate(sizes), 1.0)
    return (np.exp(log_c - need) - (1 - share)) / share, share
