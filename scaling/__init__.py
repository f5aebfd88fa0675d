"""Scaling-law fits from a table of runs: `Runs.read`, `fit`, `compare`. NumPy, SciPy, Matplotlib and Plotly only."""

from scaling.fitting.fit import fit
from scaling.tables.runs import Runs, ScalingError
from scaling.verdict.compare import compare

__all__ = ["Runs", "ScalingError", "compare", "fit"]
