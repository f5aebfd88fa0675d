"""Scaling-law fits from a table of runs: `Runs.read`, `fit`, `compare`. NumPy, SciPy, Matplotlib and Plotly only."""

from scaling.compare import compare
from scaling.fit import fit
from scaling.runs import Runs, ScalingError

__all__ = ["Runs", "ScalingError", "compare", "fit"]
