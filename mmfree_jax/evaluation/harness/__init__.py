"""lm-evaluation-harness (extra `eval`) with any model of ours: runs, imported, packed and Hugging Face folders.

model.py     the adapter, registered as `mmfree`
tasks.py     runs tasks, from the hub or from local files; items of every question, tables of scores
paper.py     the six tasks of the paper as a suite, with its published numbers

`python -m mmfree_jax.evaluation.harness run --model mmfree --model_args pretrained=FOLDER …` is the harness's own
command line with the adapter registered.
"""

from mmfree_jax.evaluation.harness.model import MMFree

__all__ = ["MMFree"]
