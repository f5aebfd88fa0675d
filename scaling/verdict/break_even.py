"""The break-even cost kappa*: how cheap a ternary operation has to be for B to win."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling.verdict.compare import Comparison, compute_grid, family_frontier
from scaling.verdict.costs import ternary_share
from scaling.verdict.crossing import LEVEL

BELOW = 2.0  # decades below the measured range in which B's match of A's loss is still looked for


@dataclass(frozen=True)
class BreakEven:
    """kappa* along A's budgets `flops` (M,): what one of B's ternary operations may cost, in operations of A, for B to
    reach A's loss at A's price; estimate, low, high (M,), with 95 % of the draws between them. share: of B's operations
    that are ternary. Zero or less: no price is low enough."""

    a: str
    b: str
    flops: np.ndarray
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    share: float

    def at(self, flops: float) -> tuple[float, float, float]:
        """(estimate, low, high) at the budget nearest to this one."""
        k = int(np.argmin(np.abs(np.log(self.flops / flops))))
        return float(self.estimate[k]), float(self.low[k]), float(self.high[k])

    def sentence(self, flops: float) -> str:
        """The result at one budget in words, and over all of them."""
        value, low, high = self.at(flops)
        if high <= 0:
            return f"At {self.a}'s loss of {flops:.1e} FLOP no price of its ternary operations lets {self.b} win."
        if value <= 0:
            return (
                f"At {self.a}'s loss of {flops:.1e} FLOP it is open whether any price of its ternary operations "
                f"({self.share:.0%} of all) lets {self.b} win: κ* is {value:.2f} ({low:.2f} to {high:.2f})."
            )
        everywhere = float(self.low.min())
        always = f"; below {everywhere:.2f} it wins at any budget shown" if everywhere > 0 else ""
        return (
            f"{self.b} wins at {flops:.1e} FLOP once one of its ternary operations ({self.share:.0%} of all) costs "
            f"less than {value:.2f} ({low:.2f} to {high:.2f}) of a multiply-accumulate operation{always}."
        )


def break_even(c: Comparison, decades: float = 2.0) -> BreakEven | None:
    """kappa* from the lowest measured compute to `decades` beyond the largest. None where B has no ternary operation
    or not every run of B has them counted.

    B needs C_b FLOP for the loss that A reaches with C; with a share s of B's operations at price kappa, B is cheaper
    once (1 - s + s kappa) C_b < C. Where B does not reach that loss before the horizon, kappa* is negative.
    `c` must be on the axis "flops".
    """
    share = ternary_share(c.fit.runs.family(c.b))
    if share == 0:
        return None
    shown = (c.flops >= c.measured[0]) & (c.flops <= c.measured[1] * 10**decades * 1.01)
    log_c = np.log(c.flops[shown])
    estimate = price(c, c.fit.theta[None], log_c, share)[0]
    low, high = np.quantile(price(c, c.draws.theta, log_c, share), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return BreakEven(c.a, c.b, c.flops[shown], estimate, low, high, share)


def price(c: Comparison, theta: np.ndarray, log_c: np.ndarray, share: float) -> np.ndarray:
    """kappa* (K, M) for joint vectors (K, P) at log budgets (M,)."""
    goal = family_frontier(c.fit, theta, c.a, c.costs[c.a], log_c, c.along).loss
    wide = compute_grid(c.measured[0] / 10**BELOW, c.flops[-1])
    reached = family_frontier(c.fit, theta, c.b, c.costs[c.b], wide, c.along).loss
    need = np.stack([np.interp(-g, -row, wide, right=np.inf) for g, row in zip(goal, reached, strict=True)])
    return (np.exp(log_c - need) - (1 - share)) / share
