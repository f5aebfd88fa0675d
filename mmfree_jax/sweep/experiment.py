"""Experiments: what an experiment file declares, and the functions that help to declare it."""

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmfree_jax import flops
from mmfree_jax.config import Branch, ConfigError, RunConfig, require

STEADY = ("wsd", "constant")  # schedules that branches can leave
OWN = {"schedule", "decay_steps", "final_lr", "accumulate"}  # fields of OptimConfig in which a branch may differ


@dataclasses.dataclass(frozen=True)
class Study:
    """A set of runs and the comparison that they serve.

    `baseline` is the family that the others are compared with; `notes` are copied into the report's provenance (how the
    learning rates were chosen, for instance). Run names must be unique, and a branch must be listed after its trunk.
    """

    name: str
    title: str
    runs: tuple[RunConfig, ...]
    baseline: str
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.runs), f"study {self.name}: has no runs")
        # Names are folders: two runs of one name would train in one.
        twice = sorted(name for name, count in Counter(run.name for run in self.runs).items() if count > 1)
        require(not twice, f"study {self.name}: run names are used twice: {', '.join(twice)}")
        seen: dict[str, RunConfig] = {}
        for run in self.runs:
            if run.branch is not None:
                trunk = seen.get(run.branch.run)
                require(trunk is not None, f"{run.name}: its trunk {run.branch.run} is not listed before it")
                _check_branch(run, run.branch, seen[run.branch.run])
            seen[run.name] = run
        # Runs of different corpora have losses on different text, which no law can relate.
        corpora = {(run.data.corpus, run.data.vocab) for run in self.runs}
        require(len(corpora) == 1, f"study {self.name}: its runs use several corpora: {sorted(corpora)}")


def _check_branch(run: RunConfig, branch: Branch, trunk: RunConfig) -> None:
    """Up to the branch point a run must equal its trunk, because its result is reported as that of one entire run."""
    require(
        branch.step == trunk.steps or branch.step in trunk.milestones,
        f"{run.name}: branches at step {branch.step}, which is not among the milestones of {trunk.name}",
    )
    for name in ("model", "data", "seed", "precision"):
        require(getattr(run, name) == getattr(trunk, name), f"{run.name}: its {name} differs from its trunk's")
    # Both must be at the constant rate at the branch point, or the branch would not be the run that it stands for.
    for config in (run, trunk):
        schedule = config.optim.schedule
        require(schedule in STEADY, f"{config.name}: schedule={schedule} has no constant rate to branch off: use wsd")
    last = trunk.steps - trunk.optim.decay_steps
    require(branch.step <= last, f"{run.name}: branches inside the decay of {trunk.name}, which begins at step {last}")
    for name, value in dataclasses.asdict(run.optim).items():
        trunk_value = getattr(trunk.optim, name)
        same = name in OWN or value == trunk_value
        require(same, f"{run.name}: its optim.{name}={value} differs from its trunk's, {trunk_value}")


def trunk_and_decays(base: RunConfig, budgets: Sequence[int], decay: float = 0.2) -> list[RunConfig]:
    """Return a trunk at constant rate and, for each budget (steps), a branch that decays over its last `decay`
    fraction.

    Every branch is the WSD run of that budget, but costs only its decay (Hägele et al. 2024, arXiv 2405.18392; Hu et
    al. 2024, arXiv 2404.06395). So its end point is comparable with any other; a point inside a cosine run is not. The
    trunk is named NAME-trunk, the branches NAME-TOKENS, after their positions.
    """
    require(0 < decay < 1, f"decay={decay}: must be a fraction in (0, 1)")
    # Decays of a fixed share: the loss of an end point then depends on its budget, and not on how long it decayed.
    lengths = {steps: max(1, round(steps * decay)) for steps in sorted(budgets)}
    stems = [steps - tail for steps, tail in lengths.items()]
    steady = dataclasses.replace(base.optim, schedule="wsd", decay_steps=0, final_lr=0.0)
    trunk = dataclasses.replace(
        base, name=f"{base.name}-trunk", steps=max(stems), milestones=tuple(stems), optim=steady, evaluate=False
    )
    runs = [trunk]
    for steps, tail in lengths.items():
        tokens = steps * base.data.tokens_per_step
        units = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
        short = next((f"{tokens / scale:.3g}{unit}" for unit, scale in units if tokens >= scale), str(tokens))
        optim = dataclasses.replace(steady, decay_steps=tail, final_lr=base.optim.final_lr)
        branch = Branch(trunk.name, steps - tail)
        runs.append(dataclasses.replace(base, name=f"{base.name}-{short}", steps=steps, optim=optim, branch=branch))
    return runs


def run_flops(run: RunConfig) -> float:
    """Return the FLOPs of a run's own steps, without those of its trunk: an upper bound if documents are separate."""
    steps = run.steps - run.first_step
    return flops.train_flops_per_token(run.model, run.data.sequence).products * run.data.tokens_per_step * steps


def chains(runs: Iterable[RunConfig]) -> list[list[RunConfig]]:
    """Group runs by trunk, each trunk first: a group is the work of one worker, which compiles once for all of it.

    A branch of a branch belongs to the trunk of both.
    """
    # Branches are listed after their trunks, so one pass finds the group of each.
    groups: dict[str, list[RunConfig]] = {}
    group_of: dict[str, list[RunConfig]] = {}
    for run in runs:
        above = run.branch.run if run.branch else run.name
        group = group_of.get(above) or groups.setdefault(above, [])
        group_of[run.name] = group
        group.append(run)
    return list(groups.values())


def machines(chain: Sequence[RunConfig], per_machine: int, name: str) -> tuple[int, int]:
    """Return how many machines the mesh of a chain fills, and the devices on each.

    per_machine: devices in a machine; 0: all are in one. name: what a machine is called in messages.
    Raises ConfigError for meshes of different sizes, and for one that uses part of a machine.
    """
    sizes = {run.mesh.devices for run in chain}
    require(len(sizes) == 1, f"{chain[0].name}: the runs of one chain need one mesh size, not {sorted(sizes)}")
    (devices,) = sizes
    on_each = min(devices, per_machine) if per_machine else devices
    fits = devices % on_each == 0
    require(fits, f"{chain[0].name}: {devices} devices do not fill {name}s of {on_each}: change its mesh")
    return devices // on_each, on_each


def load_study(path: Path) -> Study:
    """Run an experiment file and return what its `study()` declares: a Study, or a list of runs.

    A list becomes a Study that is named after the file and whose baseline is the family of the first run.
    Raises ConfigError if there is no such function, or no run of the baseline.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such experiment file")
    # By path, not by name: an experiment file need not lie in a package, nor in the working directory.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    declare = getattr(module, "study", None)
    if not callable(declare):
        raise ConfigError(f"{path}: defines no function study() that returns a Study")
    found = declare()
    if isinstance(found, list):
        only_runs = bool(found) and all(isinstance(run, RunConfig) for run in found)
        require(only_runs, f"study {path.stem}: not a list of run configs")
        found = Study(path.stem, path.stem, tuple(found), baseline=found[0].model.family)
    require(isinstance(found, Study), f"{path}: study() returned {type(found).__name__}, not a Study or a list of runs")
    families = sorted({run.model.family for run in found.runs})
    names = ", ".join(families)
    require(found.baseline in families, f"{path}: its baseline is {found.baseline!r}, but its runs are of {names}")
    return found
