"""Scaling laws from a table of runs, and what may be said about families: `analyse(runs, Spec(...))`. Never JAX."""

from scaling.ensemble.ensemble import Ensemble, analyse, compare
from scaling.fitting.fit import fit
from scaling.spec import Spec
from scaling.tables.runs import Runs, ScalingError

__all__ = ["Ensemble", "Runs", "ScalingError", "Spec", "analyse", "compare", "fit"]
