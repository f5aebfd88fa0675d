"""A study for SLURM: two single runs, one of two processes, and a trunk with two decays.

Which of them, and how long, says the environment.
"""

import dataclasses
import os
from pathlib import Path

from mmfree_jax.config import MeshConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from tests.conftest import tiny_run


def study() -> Study:
    corpus = Path(os.environ["SLURM_STUDY_CORPUS"])
    steps = int(os.environ["SLURM_STUDY_STEPS"])
    base = tiny_run("transformer++", corpus, steps=steps, checkpoint_every=50, evaluate=False)
    wanted = os.environ["SLURM_STUDY_RUNS"].split()
    single = [dataclasses.replace(base, name=f"r{i}", seed=i) for i in range(2)]
    wide = dataclasses.replace(base, name="wide", mesh=MeshConfig(data=2))
    runs = [*single, wide, *trunk_and_decays(dataclasses.replace(base, name="t"), (6, 12))]
    return Study("s", "t", tuple(run for run in runs if run.name.split("-")[0] in wanted), "transformer++")
