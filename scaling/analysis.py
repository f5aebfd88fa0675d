"""A table analysed once for every verb: each family's best fit, its own ensemble, the pairs, and one list of gates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from scaling.ensemble.ensemble import Ensemble, baseline_first, compare
from scaling.fitting.fit import Fit, Gate, fit, ladder_gate
from scaling.fitting.selection import selected
from scaling.fitting.sensitivity import delta_from_noise
from scaling.lint import lint_gates
from scaling.spec import Spec
from scaling.tables.runs import Runs, ScalingError


@dataclass(frozen=True)
class Analysis:
    """What the verbs print: the rows that were selected, and the spec. Families are in the order of comparison."""

    runs: Runs
    spec: Spec
    families: tuple[str, ...]

    @classmethod
    def of(cls, runs: Runs, spec: Spec, pair: tuple[str, str] | None = None) -> Analysis:
        """Of all families, the baseline first, or of two. Raises ScalingError."""
        families = pair or tuple(baseline_first(runs, spec.baseline))
        if len(set(families)) < len(families):
            raise ScalingError(f"family {families[0]!r} cannot be compared with itself")
        chosen = runs.select(np.concatenate([np.flatnonzero(runs["family"] == f) for f in families]))
        return cls(selected(chosen, spec.select, spec.seed), replace(spec, select="all"), tuple(families))

    @cached_property
    def delta(self) -> float:
        """Huber threshold of the point fits: as given, or from the noise of the table."""
        return self.spec.delta or delta_from_noise(self.runs, self.spec.law)

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """The best single fit of every family by itself, with its certificate."""
        s = self.spec
        return {f: fit(self.runs.family(f), s.law, s.point_objective, self.delta, seed=s.seed) for f in self.families}

    @cached_property
    def own(self) -> dict[str, Ensemble]:
        """Every family's ensemble by itself, of which its parameters are told."""
        return {f: Ensemble.of(self.runs, (f,), self.spec) for f in self.families}

    @cached_property
    def pairs(self) -> tuple[Ensemble, ...]:
        """The baseline against every other family; a third family changes nothing in the pair of the others."""
        return tuple(compare(self.runs, self.families[0], other, self.spec) for other in self.families[1:])

    def ensemble(self, family: str) -> Ensemble:
        """The ensemble that answers for a family: of its pair, or its own where there is no other."""
        return next((pair for pair in self.pairs if family in pair.families), None) or self.own[family]

    @cached_property
    def gates(self) -> tuple[Gate, ...]:
        """Every check of the table, the fits and the ladders, once; all verbs answer with this list."""
        out = []
        for family in self.families:
            for gate in self.fits[family].gates:
                out.append(gate if "[" in gate.name else replace(gate, name=f"{gate.name} [{family}]"))
            out += [ladder_gate(self.runs, family), exponent_gate(self.own[family], family)]
        return (*out, *lint_gates(self.runs))

    @property
    def failed(self) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if not gate.passed)


def exponent_gate(ensemble: Ensemble, family: str) -> Gate:
    """An exponent whose interval spans more than a factor of two, or is hardly narrower than before any run, carries no
    meaning of its own."""
    slopes = [p for p in ensemble.parameters(family) if p.name in ensemble.law.exponents]
    wide = [f"{p.name} {p.low:.2g} to {p.high:.2g}" for p in slopes if p.low <= 0 or p.high > 2 * p.low]
    wide += [f"{p.name} not told by the runs" for p in slopes if not p.identified]
    known = "exponents known within a factor of two"
    return Gate(f"exponent intervals [{family}]", not wide, "; ".join(wide) if wide else known)
