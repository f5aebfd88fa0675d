"""The optimizer, the compiled step, checkpoints, metrics and the loop that ties them together."""
