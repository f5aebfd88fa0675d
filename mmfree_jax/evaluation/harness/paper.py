"""The paper's zero-shot table: its six tasks as a suite, its numbers, and a table like it with other models' rows.

Zhu et al. 2024 (Scalable MatMul-free Language Modeling, arXiv 2406.02528), Table 1: zero-shot accuracy in per cent with
lm-evaluation-harness, whose version and metrics the paper does not state. The metrics here are the usual ones for such
tables: accuracy normalised by length where continuations differ in length (ARC-challenge, HellaSwag, OpenBookQA), else
plain accuracy. A later evaluation of the released 370M model with harness 0.4.11 found an average of 39.06 where the
paper has 40.3: ARC-easy 38.85, ARC-challenge 22.27, HellaSwag 32.45, OpenBookQA 28.40, PIQA 62.68, WinoGrande 49.72. So
a difference of a point to a published number may be one of harnesses; two models are compared by running both. The
averages are as printed; the six numbers of the 370M model themselves give 39.97.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

VERSION = 1.0  # of all six tasks, as lm-eval 0.4.13 has them

# Task -> heading in the paper's table, metric.
PAPER: dict[str, tuple[str, str]] = {
    "arc_easy": ("ARCe", "acc"),
    "arc_challenge": ("ARCc", "acc_norm"),
    "hellaswag": ("HS", "acc_norm"),
    "openbookqa": ("OQ", "acc_norm"),
    "piqa": ("PQ", "acc"),
    "winogrande": ("WGe", "acc"),
}


class Published(NamedTuple):
    """A row of Table 1: model, parameters, training tokens, the six accuracies and the average as printed."""

    model: str
    size: str
    tokens: str
    scores: tuple[float, float, float, float, float, float]
    average: float


PUBLISHED = (
    Published("Transformer++", "370M", "15B", (45.0, 24.0, 34.3, 29.2, 64.0, 49.9), 41.1),
    Published("MatMul-free RWKV-4", "370M", "15B", (44.7, 22.8, 31.6, 27.8, 63.0, 50.3), 40.0),
    Published("MatMul-free LM", "370M", "15B", (42.6, 23.8, 32.8, 28.4, 63.0, 49.2), 40.3),
    Published("Transformer++", "1.3B", "100B", (54.1, 27.1, 49.3, 32.4, 70.3, 54.9), 48.0),
    Published("MatMul-free RWKV-4", "1.3B", "100B", (52.4, 25.6, 45.1, 31.0, 68.2, 50.5), 45.5),
    Published("MatMul-free LM", "1.3B", "100B", (54.0, 25.9, 44.9, 31.4, 68.4, 52.4), 46.2),
    Published("Transformer++", "2.7B", "100B", (59.7, 27.4, 54.2, 34.4, 72.5, 56.2), 50.7),
    Published("MatMul-free LM", "2.7B", "100B", (58.5, 29.7, 52.3, 35.4, 71.1, 52.1), 49.9),
)


def metric_of(task: str) -> str:
    """Return the metric that the table has for a task."""
    return PAPER[task][1]


def table(own: Sequence[tuple[str, str, str, Mapping[str, float]]]) -> str:
    """Return the paper's table in Markdown, with rows of one's own below: model, size, tokens, task -> per cent."""
    heads = ["model", "size", "tokens", *(head for head, _ in PAPER.values()), "Avg"]
    lines = [heads, ["---"] * len(heads)]
    for row in PUBLISHED:
        lines.append([f"{row.model} (paper)", row.size, row.tokens, *map(_number, (*row.scores, row.average))])
    for model, size, tokens, scores in own:
        values = [scores[task] for task in PAPER]
        lines.append([model, size, tokens, *map(_number, (*values, sum(values) / len(values)))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.1f}"
