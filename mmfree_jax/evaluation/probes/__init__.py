"""Synthetic tasks that separate families: each asks for one ability that text asks for rarely and mixed with others.

Every probe is a frozen dataclass of its sizes with a method `rows`; `drawing.draw` makes its rows from a seed,
`scoring` turns logits into accuracies by distance, and `tasks` writes it for lm-evaluation-harness. Nothing here needs
JAX.

    recall             associative recall: many pairs at once, so what counts is the size of the state
    copying            a string again, symbol by symbol: the state has to hold all of it
    induction          what followed last time, found by content among noise of the same symbols
    counting           how often one symbol occurred: attention averages and has to undo the average
    parity             the group of two elements: one bit that every input may flip
    permutations       a group that is not commutative: the order of inputs matters
    long-recall        few pairs, far back: what counts is how long the state lasts
"""

from mmfree_jax.evaluation.probes.copying import Copying
from mmfree_jax.evaluation.probes.counting import Counting
from mmfree_jax.evaluation.probes.drawing import Draw, Probe, draw
from mmfree_jax.evaluation.probes.induction import Induction
from mmfree_jax.evaluation.probes.recall import LongRecall, Recall
from mmfree_jax.evaluation.probes.scoring import Accuracy, score
from mmfree_jax.evaluation.probes.state_tracking import StateTracking
from mmfree_jax.evaluation.probes.tasks import write_tasks

PROBES: dict[str, Probe] = {
    "recall": Recall(),
    "copying": Copying(),
    "induction": Induction(),
    "counting": Counting(),
    "parity": StateTracking("Z2"),
    "permutations": StateTracking("S3", (1, 2, 4, 8, 16, 32)),
    "long-recall": LongRecall(),
}

__all__ = [
    "PROBES",
    "Accuracy",
    "Copying",
    "Counting",
    "Draw",
    "Induction",
    "LongRecall",
    "Probe",
    "Recall",
    "StateTracking",
    "draw",
    "score",
    "write_tasks",
]
