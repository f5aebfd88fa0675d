"""How fast the operations and the training step are here: checked, then timed against ceilings of the same run."""
